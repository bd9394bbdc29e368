"""What engines say of the formats of a file (``verification.engines``)."""

from __future__ import annotations

from qkit.diagnosis.expected import weight_names
from qkit.diagnosis.findings import FAULT, WARNING, Findings
from qkit.diagnosis.opened import Opened
from qkit.diagnosis.words import is_awq
from qkit.tensor.formats import Format
from qkit.verification.layout_engines import LAYOUTS
from qkit.verification.model_engines import EngineRow, LinearStorage, engine_rows
from qkit.verification.vllm_table import format_key, known

_TITLES = {"vllm": "vLLM", "transformers": "transformers + compressed-tensors", "llama.cpp": "llama.cpp"}
_DOUBT = ("may be wrong", "does not fit", "takes groups")
_LAYOUTS = {("int", "model"): "pack-quantized", ("fp8", "model"): "float-quantized", ("fp4", "e4m3"): "nvfp4-pack-quantized",
            ("fp4", "e8m0"): "mxfp4-pack-quantized"}  # fmt: skip


def _packing(weights: Format, method: str) -> str:
    """The name of a layout in the tables of engines; asymmetric GPTQ goes by the name of its second version there."""
    if method in LAYOUTS:
        return "gptq_v2" if method == "gptq" and not weights.symmetric else method
    return _LAYOUTS[weights.kind, weights.scale]


def check_kernels(opened: Opened, engine: str | None, findings: Findings) -> list[EngineRow]:
    """One row for each combination of formats and engine. engine: the one that the file is for, None for any"""
    compressed = opened.method in ("compressed-tensors", "qkit")
    method = str(opened.method) if opened.method in ("qkit", *LAYOUTS) else "compressed-tensors"
    if opened.method == "auto-round":
        method = "awq" if is_awq(opened) else "gptq"
    parts = {
        layer.name: LinearStorage(
            layer.weights,
            layer.activations,
            layer.packing if compressed else _packing(layer.weights, method),
            (layer.shape[-2], layer.shape[-1]),
        )
        for layer in opened.layers.values()
        if layer.weights is not None and layer.shape is not None and len(layer.shape) >= 2
    }
    if engine == "llama.cpp":
        findings.fault(
            "engine",
            sorted(parts),
            "llama.cpp reads GGUF alone",
            "a GGUF file",
            "convert the model to GGUF, or use another engine",
            6,
        )
    if not parts:
        return []
    if method == "compressed-tensors" and not compressed:  # what the table was not asked about is not judged
        parts = {n: p for n, p in parts.items() if known(format_key(*p.kind))}
    skipped = {n: "plain" for n in weight_names(opened)}
    rows = engine_rows(parts, skipped, opened.config, method)
    if method == "compressed-tensors" and not compressed:  # FP8 and MXFP4 of other layouts: vLLM's kernels are the same
        rows = [row for row in rows if row.engine.startswith(_TITLES["vllm"])]
    for row in rows:
        asked = engine is not None and row.engine.startswith(_TITLES[engine])
        if row.loads_as is None and (
            asked or (engine is None and row.engine.startswith(_TITLES["vllm"]) and method == "compressed-tensors")
        ):
            names = [n for n, p in parts.items() if str(p.weights) == row.weights and p.packing == row.packing]
            findings.add(
                FAULT if asked else WARNING, "engine", names, f"{row.engine} does not load {row.weights} with inputs "
                f"{row.activations}, stored as {row.packing}: {'; '.join(row.limits)}", "a format that it has a kernel for",
                "quantize these layers in another scheme, or use another engine", 6,
            )  # fmt: skip
        doubts = [limit for limit in row.limits if row.loads_as and any(d in limit for d in _DOUBT)]
        if doubts and (engine is None or asked):
            names = [n for n, p in parts.items() if str(p.weights) == row.weights and p.packing == row.packing]
            findings.warn(
                "groups", names, f"{row.engine}: {'; '.join(doubts)}", "a group that its kernels know: 32, 64, 128, or one "
                "scale for a channel", "quantize again with --group-size 64 or 32", 6,
            )  # fmt: skip
    return rows
