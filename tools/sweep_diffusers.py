"""Quantizes a tiny random model of every transformer class of diffusers, and of its common U-Nets, and prints one line a class.

    python tools/sweep_diffusers.py --json out.json [--only NAME]

A class is fully supported when rtn and gptq both quantize it (a true refusal of gptq counts too), every linear of its blocks is
quantized or listed with a reason, and ``qkit.load`` gives the output of the original class with the dequantized weights.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sweep_diffusers_arguments import arguments
from sweep_diffusers_cases import CASES, UNETS

TOLERANCE = 1e-5
SEED_OF_CALIBRATION = 100


@dataclass(frozen=True)
class Case:
    """One class of diffusers. config: its settings, call: arguments; both empty where nobody has written them."""

    name: str
    config: dict[str, Any]
    call: dict[str, Any]
    kind: str = "transformer"


def transformer_classes() -> list[str]:
    """Names of all transformer classes of the installed diffusers."""
    import diffusers

    found = []
    for name in sorted(dir(diffusers)):
        value = getattr(diffusers, name, None)
        if (
            inspect.isclass(value)
            and issubclass(value, diffusers.ModelMixin)
            and ".models.transformers." in value.__module__
        ):
            found.append(name)
    return found


def cases() -> list[Case]:
    """A case of every transformer class of the installed diffusers, and of its U-Nets."""
    import diffusers

    listed = [Case(name, *CASES.get(name, ({}, {}))) for name in transformer_classes()]
    return [*listed, *(Case(name, *case, kind="unet") for name, case in UNETS.items() if hasattr(diffusers, name))]


class Calls:
    """Calls of a model in place of a pipeline."""

    def __init__(self, call: dict[str, Any]) -> None:
        self._call = call

    def calls(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Two calls with other values than those that results are compared on."""
        yield from (arguments(self._call, SEED_OF_CALIBRATION + i) for i in range(2))


class Silent:
    """No progress is shown."""

    def start(self, what: str, total: int) -> None: ...
    def step(self, amount: int = 1) -> None: ...


def make(case: Case, folder: Path) -> Any:
    """The tiny model of a case, saved in ``folder``. Weights that begin as zeros, or without a value, are random."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, case.name)(**case.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            stacked = parameter.dim() == 3 and len(parameter) > 1  # made with torch.empty: whatever was in memory
            if stacked or not parameter.isfinite().all() or not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return model


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """One line of the result. ``folder`` is filled and left as it is.

    Fields: class, kind, rtn and gptq (ok, or the reason), coverage (of the weights of linears in blocks), load (largest
    relative difference of ``qkit.load`` from fake quantization), stock (the same for diffusers' own loader), reason, seconds.
    """
    began = time.monotonic()
    line: dict[str, Any] = {"class": case.name, "kind": case.kind, "rtn": "", "gptq": "", "coverage": 0.0, "load": None}
    line |= {"stock": None, "reason": ""}
    if not case.config and not case.call:
        return line | {"rtn": "no case", "gptq": "no case", "reason": "no tiny config of this class is written yet"}
    try:
        model = make(case, folder / "source")
        expected = output(model, case)
        assert expected.isfinite().all(), "the tiny model's own output is not finite"
    except Exception as e:  # a fault of the case, not of qkit
        return line | {"rtn": "no case", "gptq": "no case", "reason": f"the tiny model does not run: {_first(e)}"}
    for method in ("rtn", "gptq"):
        line[method] = _method(case, method, folder, line)
    line["reason"] = "; ".join(f"{m}: {line[m]}" for m in ("rtn", "gptq") if line[m] != "ok")
    return line | {"seconds": round(time.monotonic() - began, 1)}


def _method(case: Case, method: str, folder: Path, line: dict[str, Any]) -> str:
    """'ok', or why not. Fills the other fields of the line."""
    from qkit.calibration.dataset import Calibration
    from qkit.errors import QkitError
    from qkit.workflows.quantize import Request, prepare, quantize

    tokens = torch.empty(2, 0, dtype=torch.int64)
    trajectory: Any = Calls(case.call)
    rows = Calibration(source="calls", samples=2, seqlen=0, digest="0" * 64, tokens=tokens, trajectory=trajectory)
    try:
        request = Request(model=str(folder / "source"), scheme="w4a16", method=method, threads=1)
        prepared = prepare(request, rows if method == "gptq" else None)
        quantize(request, folder / method, Silent(), prepared=prepared)
    except QkitError as e:
        return f"refused: {str(e).replace(str(folder) + '/', '')}"
    except Exception as e:
        return f"crash: {type(e).__name__}: {_first(e)}"
    plan, structure = prepared.plan, prepared.structure
    line["coverage"] = coverage(plan, structure)
    load, stock = differences(case, folder / "source", folder / method)
    line["load"], line["stock"] = max(load, line["load"] or 0.0), max(stock, line["stock"] or 0.0)
    return "ok" if max(load, stock) <= TOLERANCE else f"load differs: {load:.1e}, stock {stock:.1e}"


def coverage(plan: Any, structure: Any) -> float:
    """The share of linears and fused experts in blocks, by weights, that is quantized or skipped because it modulates."""
    from qkit.families.dit import MODULATION

    done = total = 0
    for block in structure.blocks:
        module = structure.model.get_submodule(block.path)
        experts = [x.name for x in block.linears if x.expert is not None]
        done += sum(math.prod(plan.linears[name].shape) for name in experts if name in plan.linears)
        for name, p in module.named_parameters():
            owner = f"{block.path}.{name}".removesuffix(".weight")
            is_linear = isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear) and name.endswith(
                ".weight"
            )
            if is_linear or (p.dim() == 3 and "experts" in name):
                total += p.numel()
                done += p.numel() * (owner in plan.linears or plan.skipped.get(owner) == MODULATION)
    return done / total


def differences(case: Case, source: Path, packed: Path) -> tuple[float, float]:
    """Largest differences from fake quantization, relative to the largest value: of ``qkit.load``, and of diffusers' loader."""
    import diffusers

    import qkit
    from qkit.files.checkpoint import Checkpoint
    from qkit.runtime.loading import PackedStructure
    from qkit.tensor.compressed_tensors import read
    from qkit.tensor.qtensor import dequantize

    class_of_model = getattr(diffusers, case.name)
    structure, reference = (
        PackedStructure(Checkpoint.open(packed, quantized=True)),
        class_of_model.from_pretrained(source).eval(),
    )
    stored: dict[str, dict[str, Tensor]] = {}
    for name in structure.checkpoint.tensors:
        owner, _, leaf = name.rpartition(".")
        if owner in structure.formats:
            stored.setdefault(owner, {})[leaf] = structure.checkpoint.read(name)
    for block, linear in ((b, x) for b in structure.blocks for x in b.linears if x.name in structure.formats):
        weight = dequantize(read(stored[linear.name], structure.formats[linear.name][0], linear.shape))
        linear.view(reference.get_submodule(block.path)).copy_(weight)
    expected = output(reference, case)
    own = output(qkit.load(packed, dtype=torch.float32), case)
    stock = output(class_of_model.from_pretrained(packed, torch_dtype=torch.float32).eval(), case)
    return _difference(own, expected), _difference(stock, expected)


def _difference(found: Tensor, expected: Tensor) -> float:
    value = float((found - expected).abs().max() / expected.abs().max())
    return value if value == value else float("inf")


def output(model: Any, case: Case) -> Tensor:
    """All floating-point results of a call, flat, float32."""
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.extend([value.float().flatten()] if value.is_floating_point() else [])
        elif isinstance(value, dict):
            list(map(walk, value.values()))
        elif isinstance(value, (tuple, list)):
            list(map(walk, value))

    torch.manual_seed(1)
    with torch.inference_mode():
        walk(model(**arguments(case.call)))
    return torch.cat(found)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def is_full(line: dict[str, Any]) -> bool:
    """Whether a class counts: rtn works, gptq works or is refused in a sentence, and nothing of the blocks is left out."""
    calibrated = line["gptq"] == "ok" or line["gptq"].startswith("refused: ")
    return bool(line["rtn"] == "ok" and calibrated and line["coverage"] == 1.0)


def total(lines: list[dict[str, Any]]) -> str:
    """The last line of the table."""
    parts = []
    for kind, word in (("transformer", "transformers"), ("unet", "U-Nets")):
        mine = [x for x in lines if x["kind"] == kind]
        if mine:
            full, calibrated = sum(map(is_full, mine)), sum(x["gptq"] == "ok" for x in mine)
            parts.append(f"{word}: {full} of {len(mine)} ({full / len(mine):.0%}), with gptq {calibrated}")
    return "; ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Runs all cases, or those whose name holds --only."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the lines")
    parser.add_argument("--only", default="", help="part of a class's name")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = []
    for case in (c for c in cases() if options.only in c.name):
        folder = Path(tempfile.mkdtemp(prefix="sweep-"))
        try:
            line = run_case(case, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            gc.collect()
        lines.append(line)
        load = "" if line["load"] is None else f"{line['load']:.0e}"
        mark = "ok  " if is_full(line) else "FAIL"
        print(f"{mark} {case.name:42} coverage {line['coverage']:.0%} load {load} {line['reason'][:300]}", flush=True)
    print(total(lines))
    if options.json:
        options.json.write_text(json.dumps({"lines": lines, "total": total(lines)}, indent=1))
    return 0 if all(map(is_full, lines)) else 1


if __name__ == "__main__":
    sys.exit(main())
