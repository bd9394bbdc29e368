"""How numbers are stored, as qkit.json says it, and what of that is impossible.

Part of the independent proof of a packed checkpoint (see ``verify.py``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How numbers are stored: the fields of a format in qkit.json, without its name."""

    kind: str
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    symmetric: bool
    scale: str
    dynamic: bool

    def __str__(self) -> str:
        if self.scale != "model":  # these formats fix their groups
            return self.stem + (" dynamic" if self.dynamic else "")
        parts = [self.stem, "dynamic " + self.strategy if self.dynamic else self.strategy]
        parts += [str(self.group)] if self.group else []
        parts += ["x".join(map(str, self.block))] if self.block else []
        return " ".join([*parts, *([] if self.symmetric else ["asymmetric"])])

    @property
    def stem(self) -> str:
        """The beginning of the names of such formats."""
        if self.scale in ("f16", "super"):
            return f"iq{self.bits}_" if self.kind == "nl4" else f"q{self.bits}_"
        return {"e4m3": "nvfp4", "e8m0": f"mx{self.kind}"}.get(self.scale) or (
            f"int{self.bits}" if self.kind == "int" else self.kind
        )


def spec_fault(spec: Spec, weight: bool) -> str | None:
    """The reason why ``spec`` is impossible, or None."""
    strategies = ["tensor", "group", "tensor_group", *(["channel", "block"] if weight else ["token"])]
    wide = {"fp4": 4, "fp8": 8}.get(spec.kind, spec.bits)
    faults = {
        f"strategy {spec.strategy} is none of {', '.join(strategies)}": spec.strategy not in strategies,
        f"{spec.bits} bits of kind {spec.kind}, expected {wide}": spec.bits != wide,
        f"strategy {spec.strategy} with group {spec.group}": (spec.group is None)
        == (spec.strategy in ("group", "tensor_group")),
        f"strategy {spec.strategy} with block {spec.block}": (spec.block is None) == (spec.strategy == "block"),
        f"a float format ({spec.kind}) cannot be asymmetric": spec.kind in ("fp4", "fp8") and not spec.symmetric,
        "a weight cannot be dynamic": weight and spec.dynamic,
        "strategy token has to be dynamic": spec.strategy == "token" and not spec.dynamic,
        f"scale {spec.scale} with strategy {spec.strategy}, group {spec.group}": _scale_fault(spec),
    }
    return next((fault for fault, wrong in faults.items() if wrong), None)


def _scale_fault(spec: Spec) -> bool:
    if spec.scale == "e4m3" or spec.strategy == "tensor_group":
        return (spec.scale, spec.strategy, spec.group, spec.kind) != ("e4m3", "tensor_group", 16, "fp4")
    if spec.scale == "e8m0":
        return spec.kind == "int" or (spec.strategy, spec.group) != ("group", 32)
    if spec.scale in ("f16", "super") or spec.kind in ("uint", "nl4"):
        groups = {"f16": (32,), "super": (16, 32)}.get(spec.scale, ())
        return spec.strategy != "group" or spec.group not in groups or spec.symmetric == (spec.kind == "uint")
    return spec.kind == "fp4"
