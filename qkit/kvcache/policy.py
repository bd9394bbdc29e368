"""Policies of quantized caches as plain data, and their names for users."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.errors import UsageError
from qkit.files.folder import RECORD, read_record

WIDTHS = (2, 3, 4, 8, 16)
KINDS = {
    "progressive": "first and newest tokens at 16 bits, other tokens halved in width when the budget is reached (PM-KVQ)",
    "kivi": "keys by channel, values by token, newest tokens at 16 bits (KIVI)",
    "rtn": "round to nearest, by token, for all tokens",
    "hierarchical": "4-bit codes and 4-bit codes of their error, read as 4 or 8 bits (QuantSpec)",
    "xquant": "inputs of attention, from which keys and values are computed again (XQuant)",
    "xquant-cl": "as xquant, with the difference of inputs between neighboring layers (XQuant-CL)",
    "fp": "8-bit floats (e4m3) with static scales for the keys and the values of a layer, as engines use them",
    "fp-head": "8-bit floats (e4m3) with static scales for every head of keys and of values",
    "nvfp": "4-bit floats with a scale for 16 channels, and static scales of these for the keys and the values of a layer",
    "rotate": "as int, after a Hadamard transform of the keys and values of every head",
}
STATIC = ("fp", "fp-head", "nvfp")  # with scales that are measured beforehand and stand in the checkpoint
ALIASES = {"pm-kvq": "progressive", "pmkvq": "progressive", "int": "rtn"}
WIDTHS_OF = {
    "progressive": (8, 4, 2),
    "hierarchical": (8,),
    "fp": (8,),
    "fp-head": (8,),
    "nvfp": (4,),
}  # others: 2, 3, 4, 8
ANCHORS, ANCHOR_BITS = 3, 4  # xquant-cl: layers that have at least so many bits (XQuant-CL: "the first 3 layers")
SHORT = {"progressive": "pm-kvq:", "rtn": "int"}  # how users write them
NAMED = {"fp-head": "fp8_head"}  # kinds whose name has no bits at its end


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """The policy of a cache: how keys and values are stored.

    kind:   of KINDS
    widths: bits of the body; progressive: the final widths that layers may get, the largest first
    group:  numbers that share a scale, at most (head_dim when that is less)
    sink:   first tokens that stay at 16 bits; window: newest tokens that do, before a group of that many moves on; keep: of the
            newest, those that always stay
    start:  bits of the body at first, progressive only; 2: what a direct rounding to 2 bits in the same layout would give
    finals, budgets, length: progressive only: by layer the width at ``length`` tokens of a sequence, and the bytes that a
            sequence may take (those of a batch add up; the paper budgets the batch)
    """

    kind: str
    widths: tuple[int, ...]
    group: int = 128
    sink: int = 0
    window: int = 0
    keep: int = 0
    start: int = 16
    finals: tuple[int, ...] | None = None
    budgets: tuple[int, ...] | None = None
    length: int | None = None

    @property
    def name(self) -> str:
        """The name for users, such as 'kivi2'."""
        return NAMED.get(self.kind) or SHORT.get(self.kind, self.kind) + "-".join(map(str, self.widths))

    @property
    def is_static(self) -> bool:
        """Whether scales stand in the checkpoint."""
        return self.kind in STATIC

    def widths_of(self, layers: int) -> tuple[int, ...]:
        """Final bits of each layer's body."""
        final = self.widths[-1]
        if self.kind != "xquant-cl":
            return self.finals or (final,) * layers
        return tuple(max(final, ANCHOR_BITS) if i < ANCHORS else final for i in range(layers))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary, for qkit.json."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if v is not None}

    @staticmethod
    def from_json(data: dict[str, Any]) -> CachePolicy:
        """The policy of a dictionary made by ``to_json``. Raises UsageError for other data."""
        try:
            lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return checked(CachePolicy(**lists))
        except TypeError as e:
            raise UsageError(f"kv policy {data}: {e}; it was not written by this version of qkit") from e


@dataclass(frozen=True)
class CacheRequest:
    """A user's request for a cache.

    kv:     name of a policy; scale_keys: search scales of keys and fold them into the projections
    memory: bytes of the cache for one sequence of ``length`` tokens (None: the model's longest)
    """

    kv: str
    memory: int | None = None
    length: int | None = None
    scale_keys: bool = False


def stored(folder: Path) -> CachePolicy | None:
    """The policy in the record of a quantized folder; None where there is none. Raises UsageError."""
    record = read_record(folder)
    data = None if record is None else record.get("kv")
    if data is None:
        return None
    from qkit.files.schema import KvPolicy, validate  # here: the help of commands does not wait for pydantic

    validate(KvPolicy, data, f"{folder / RECORD}: kv", "run 'qkit verify' on the folder")
    return CachePolicy.from_json(data)


def parse(text: str) -> CachePolicy:
    """A policy by name: pm-kvq:4-2, pm-kvq:2, kivi2, int8, fp8, fp8_head, nvfp4, rotate4. Raises UsageError, which names the
    known kinds."""
    named = {name: kind for kind, name in NAMED.items()}.get(text.strip().lower())
    if named is not None:
        return checked(CachePolicy(kind=named, widths=WIDTHS_OF[named]))
    match = re.fullmatch(r"([a-z-]+?):?(\d+(?:-\d+)*)", text.strip().lower())
    kind = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or kind not in KINDS:
        raise UsageError(
            f"kv policy {text!r} is not known: expected one kind with its bits, such as pm-kvq:4-2, kivi2, int8, rotate4, "
            "hierarchical8, xquant4, xquant-cl2, fp8, fp8_head or nvfp4 ('qkit list caches')"
        )
    widths = tuple(sorted({int(w) for w in match[2].split("-")}, reverse=True))
    defaults: dict[str, dict[str, Any]] = {
        "progressive": {"sink": 1, "window": 128},
        "kivi": {"group": 32, "window": 128},
        "xquant": {"group": 32, "window": 128},
        "xquant-cl": {"group": 32, "window": 128},
        "hierarchical": {"window": 128, "keep": 128},
    }
    return checked(replace(CachePolicy(kind=kind, widths=widths), **defaults.get(kind, {})))


def checked(p: CachePolicy) -> CachePolicy:
    """The policy itself. Raises UsageError for one with invalid values."""
    if p.kind == "hierarchical" and p.widths != (8,):
        raise UsageError(f"kv policy {p.name}: it has 4 and 4 bits, read as 4 or as 8: write hierarchical8")
    if p.kind not in KINDS:
        raise UsageError(f"kv policy of kind {p.kind!r}: expected one of {', '.join(KINDS)}")
    allowed = WIDTHS_OF.get(p.kind, tuple(w for w in WIDTHS if w < 16))
    bad = [w for w in p.widths if w not in allowed]
    if bad or not p.widths:
        raise UsageError(
            f"kv policy {p.name}: {', '.join(map(str, bad)) or 'no'} bits; expected some of {', '.join(map(str, allowed))}"
        )
    if p.kind != "progressive" and len(p.widths) > 1:
        raise UsageError(f"kv policy {p.name}: {len(p.widths)} widths; only pm-kvq chooses between widths, give one")
    if p.group < 8 or p.group % 8 or min(p.sink, p.window, p.keep) < 0:
        raise UsageError(
            f"kv policy {p.name}: group {p.group}, sink {p.sink}, window {p.window}: expected a group that is a multiple of 8 "
            "and no negative numbers"
        )
    if p.kind in ("kivi", "hierarchical", "xquant") and (p.window == 0 or p.window % p.group):
        raise UsageError(
            f"kv policy {p.name}: a window of {p.window} tokens; keys by channel need a multiple of the group, {p.group}"
        )
    if p.budgets is not None and p.kind != "progressive":
        raise UsageError(f"kv policy {p.name}: budgets are for pm-kvq, whose width follows them")
    return p
