"""Files of real writers: read, converted to each layout, and read back, with every weight compared.

    ENGINES=DIR python reports/convert/matrix.py CORPUS WORK OUT.json [WRITER/NAME ..]
CORPUS has the folders WRITER/NAME that make_corpus.py makes; WORK gets the converted ones. Readers of the tools run in their
own environments, which ENGINES has by name: gptqmodel, autoround, modelopt, stock (transformers and compressed-tensors) and
mlx. With ONLY=mlx in the environment OUT.json gets the conversions to that layout beside the figures that it has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qkit.errors import QkitError
from qkit.files.checkpoint import Checkpoint
from qkit.files.sources.packed import open_packed
from qkit.system.progress import Silent
from qkit.tensor.qtensor import QTensor, dequantize
from qkit.workflows.convert import EXPORTS, convert

THOROUGH = "THOROUGH" in os.environ  # other readers for the converted files too, and not for the sources alone
ONLY = os.environ.get("ONLY")
SCRIPT, OF_MLX = (Path(__file__).with_name(name) for name in ("own_readers.py", "mlx_reader.py"))


def reader_of(method: str, config: dict[str, Any]) -> tuple[str, str] | None:
    """(kind of own_readers.py, environment) for a layout."""
    if method == "compressed-tensors":
        return "compressed-tensors", "stock"
    if method == "gptq" and (config.get("sym") is not False or config.get("checkpoint_format") == "gptq_v2"):
        return "gptqmodel", "gptqmodel"
    table = {
        "awq": ("awq", "gptqmodel"),
        "auto-round": ("autoround", "autoround"),
        "modelopt": ("modelopt", "modelopt"),
        "mlx": ("weights", "mlx"),
    }
    return table.get(method)


def own_weights(engines: Path, folder: Path, file: Path) -> dict[str, torch.Tensor] | str:
    """What the layout's own reader decodes, or why it does not."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    reader = reader_of(config["quant_method"], config)
    if reader is None:
        return "GPTQModel loads version 1 with zero points only from itself"
    kind, environment = reader
    two = {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "2"}
    command = [str(engines / environment / "bin" / "python"), str(OF_MLX if environment == "mlx" else SCRIPT), kind, str(file), str(folder)]
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **two}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=env)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    found = load_file(file)
    file.unlink()
    return found or "it decodes none of the layers"


def with_rounded_scales(q: QTensor, dtype: torch.dtype) -> QTensor:
    """The weight as a reader has it that keeps scales in its own dtype: float16 ones in bfloat16 lose three bits."""
    scale = q.params.scale.to(dtype).to(torch.float32) if q.format.scale == "model" else q.params.scale
    return replace(q, params=replace(q.params, scale=scale))


def compared(folder: Path, own: dict[str, torch.Tensor] | str) -> dict[str, Any]:
    """qkit's plain weights against those of the other reader, in the dtype of that reader."""
    if isinstance(own, str):
        return {"reader": own}
    # Plain weights in float32, for the comparison: rounded to the other reader's dtype as it does itself.
    checkpoint = Checkpoint.open(folder)
    packed = open_packed(folder)
    equal, rounded, largest, missing = 0, 0, 0.0, []
    for name, linear in packed.linears.items():
        theirs = own.get(f"{name}.weight")
        if theirs is None:
            missing.append(name)
            continue
        q = linear.read(checkpoint)[0]
        mine = dequantize(q).to(theirs.dtype)
        if torch.equal(mine, theirs):
            equal += 1
        elif torch.equal(dequantize(with_rounded_scales(q, theirs.dtype)).to(theirs.dtype), theirs):
            rounded += 1
        else:
            apart = (mine.float() - theirs.float()).abs() / theirs.float().abs().clamp_min(1e-30)
            largest = max(largest, float(apart.max()))
    dtype = str(next(iter(own.values())).dtype).removeprefix("torch.")
    return {"linears": len(packed.linears), "equal": equal, "equal with its rounded scales": rounded, "dtype": dtype,
            "largest": largest, "missing": len(missing)}


def again(first: Path, second: Path) -> dict[str, Any]:
    """Float32 weights of two folders."""
    a, b = open_packed(first), open_packed(second)
    assert a.linears.keys() == b.linears.keys()
    equal, largest = 0, 0.0
    for name in a.linears:
        x, y = (dequantize(p.linears[name].read(p.checkpoint)[0]) for p in (a, b))
        equal += torch.equal(x, y)
        largest = max(largest, float(((x - y).abs() / x.abs().clamp_min(1e-30)).max()))
    return {"linears": len(a.linears), "equal": equal, "largest": largest}


def one(engines: Path, source: Path, work: Path, known: dict[str, Any]) -> dict[str, Any]:
    """All that is asked of one file, or ONLY one layout beside what is known."""
    row: dict[str, Any] = dict(known)
    try:
        open_packed(source)
    except QkitError as error:
        return {"refused": str(error).replace(f"{source.parents[1]}/", "")}
    if ONLY is None:
        row["read"] = compared(source, own_weights(engines, source, work / "own.safetensors"))
    for export in EXPORTS if ONLY is None else (ONLY,):
        out = work / f"{source.parent.name}-{source.name}-{export}"
        try:
            done = convert(str(source), export, out, Silent(), overwrite=True)
        except QkitError as error:
            row[export] = {"refused": str(error).replace(f"{source.parents[1]}/", "")}
            continue
        row[export] = {
            "equal": done.equal,
            "linears": done.linears,
            "difference": done.difference,
            **again(source, out),
        }
        said = json.loads((source / "config.json").read_text())["quantization_config"]["quant_method"]
        if (THOROUGH or export == "mlx") and said != export:
            row[export]["own reader"] = compared(out, own_weights(engines, out, work / "own.safetensors"))
    return row


if __name__ == "__main__":
    if "ENGINES" not in os.environ:
        sys.exit("ENGINES is not set: name the folder that has the environments of the readers")
    engines = Path(os.environ["ENGINES"])
    corpus, work, file = (Path(a) for a in sys.argv[1:4])
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    names = sys.argv[4:] or sorted(str(p.parent.relative_to(corpus)) for p in corpus.glob("*/*/config.json"))
    rows |= json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        rows[name] = one(engines, corpus / name, work, rows.get(name, {}) if ONLY else {})
        file.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        print(name, json.dumps(rows[name])[:300], flush=True)
