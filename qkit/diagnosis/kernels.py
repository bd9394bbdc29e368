"""What engines say of the formats of a file: the tables of ``verification``, asked as ``qkit verify`` asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from qkit.diagnosis.expected import weight_names
from qkit.diagnosis.findings import FAULT, WARNING, Findings
from qkit.diagnosis.layers import Layer
from qkit.diagnosis.opened import Opened
from qkit.diagnosis.words import is_awq
from qkit.tensor.formats import Format
from qkit.verification.cache_engines import cache_kind
from qkit.verification.gguf_engines import gguf_rows
from qkit.verification.layout_engines import LAYOUTS
from qkit.verification.model_engines import EngineLine, EngineRow, LinearStorage, engine_lines, engine_rows
from qkit.verification.record import USES
from qkit.verification.spec import Spec
from qkit.verification.vllm_table import format_key, known

TITLES = {"vllm": "vLLM", "transformers": "transformers", "llama.cpp": "llama.cpp"}
_DOUBT = ("may be wrong", "does not fit", "takes groups")
_LAYOUTS = {("int", "model"): "pack-quantized", ("fp8", "model"): "float-quantized", ("fp4", "e4m3"): "nvfp4-pack-quantized",
            ("fp4", "e8m0"): "mxfp4-pack-quantized"}  # fmt: skip
_TABLES = ("embed_tokens", "wte", "word_embeddings")
_OTHER = "quantize again in formats that it loads ('qkit plan' shows them), or use another engine"
Names = Callable[[EngineRow], Sequence[str]]


def check_kernels(opened: Opened, engine: str | None, findings: Findings) -> list[EngineRow]:
    """One row for each combination of formats and engine. engine: the one that the file is for, None for any"""
    if engine == "llama.cpp":
        findings.fault("engine", opened.folder.name, "llama.cpp reads GGUF alone", "a GGUF file",
                       "convert the model to GGUF, or use another engine", 6)  # fmt: skip
        return []
    method, compressed = _method(opened), _is_compressed(opened)
    parts = _parts(opened)
    if method == "compressed-tensors" and not compressed:  # what the table was not asked about is not judged
        parts = {n: p for n, p in parts.items() if known(format_key(*p.kind))}
    rows = []
    if parts:
        skipped = {n: "plain" for n in weight_names(opened)}
        config = {**opened.config, "quantization_config": opened.quantization}
        refusal = opened.record.get("stock_refusal", "")
        rows = engine_rows(
            parts, skipped, opened.config, method, refusal if isinstance(refusal, str) else "", cache=cache_kind(config)
        )
    if method == "compressed-tensors" and not compressed:  # FP8 and MXFP4 of other layouts: vLLM's kernels are the same
        rows = [row for row in rows if row.engine.startswith(TITLES["vllm"])]

    def names_of(row: EngineRow) -> list[str]:
        return [n for n, p in parts.items() if str(p.weights) == row.weights and p.packing == row.packing]

    left = [layer.name for layer in opened.layers.values() if layer.name not in parts]
    if engine is not None and (left or not rows):
        _not_judged(engine, left or [opened.folder.name], findings)
    judge(rows, names_of, engine, findings, unasked=method == "compressed-tensors")
    return rows


def check_gguf_kernels(types: Mapping[str, str], engine: str | None, findings: Findings) -> list[EngineRow]:
    """One row for each engine. types: {tensor: its type} of the quantized tensors"""
    strange = [name for name, dtype in types.items() if dtype.startswith("type ")]
    if strange or not types:  # a type that llama.cpp does not have is a fault already
        return []
    rows = gguf_rows(types.values())
    judge(rows, lambda row: list(types), engine, findings, unasked=False)
    return rows


def answer_of(rows: Sequence[EngineRow], engine: str | None) -> list[EngineLine]:
    """The answer of each engine for the whole file, as ``qkit verify`` gives it; of one engine where it is asked for."""
    return [line for line in engine_lines(rows) if engine is None or line.engine.startswith(TITLES[engine])]


def judge(rows: Sequence[EngineRow], names_of: Names, engine: str | None, findings: Findings, unasked: bool) -> None:
    """Note what an engine does not load: a fault where it is asked for. unasked: whether vLLM is judged where no engine is"""
    before = len(findings.entries)
    for row in rows:
        asked = engine is not None and row.engine.startswith(TITLES[engine])
        if row.loads_as is None and (asked or (engine is None and unasked and row.engine.startswith(TITLES["vllm"]))):
            findings.add(
                FAULT if asked else WARNING, "engine", names_of(row), f"{row.engine} does not load {row.weights} with inputs "
                f"{row.activations}, stored as {row.packing}: {'; '.join(row.limits)}", "a file that it loads", _OTHER, 6,
            )  # fmt: skip
        doubts = [limit for limit in row.limits if row.loads_as and any(d in limit for d in _DOUBT)]
        if doubts and (engine is None or asked):
            findings.warn(
                "groups", names_of(row), f"{row.engine}: {'; '.join(doubts)}", "a group that its kernels know: 32, 64, 128, "
                "or one scale for a channel", "quantize again with --group-size 64 or 32", 6,
            )  # fmt: skip
    if (
        engine is not None and len(findings.entries) == before
    ):  # each format by itself is fine; together they may not be
        for line in answer_of(rows, engine):
            if not line.loads:
                names = [name for row in rows if row.engine == line.engine for name in names_of(row)]
                found = f"{line.engine} does not load the file: {'; '.join(line.notes)}"
                findings.fault("engine", names, found, "formats that it loads together", _OTHER, 6)


def _not_judged(engine: str, names: Sequence[str], findings: Findings) -> None:
    findings.warn(
        "engine", names, f"qkit does not know whether {TITLES[engine]} loads this format", "a format of its tables",
        f"load the file in {TITLES[engine]} to see it", 2,
    )  # fmt: skip


def _is_compressed(opened: Opened) -> bool:
    """Whether the layers have the names of layouts that compressed-tensors gives them."""
    return opened.method in ("compressed-tensors", "qkit") or "llm_compressor" in str(
        opened.quantization.get("packing_format", "")
    )


def _method(opened: Opened) -> str:
    """The name of the layout in the tables."""
    if opened.method == "auto-round":
        packing = str(opened.quantization.get("packing_format", ""))
        return "awq" if is_awq(opened) else "compressed-tensors" if "llm_compressor" in packing else "gptq"
    return str(opened.method) if opened.method in ("qkit", *LAYOUTS) else "compressed-tensors"


def _parts(opened: Opened) -> dict[str, LinearStorage]:
    """The quantized layers whose formats are known."""
    method, compressed = _method(opened), _is_compressed(opened)
    return {
        layer.name: LinearStorage(
            _spec(layer.weights),
            _spec(layer.activations) if layer.activations is not None else None,
            layer.packing if compressed else _packing(layer.weights, method),
            (layer.shape[-2], layer.shape[-1]),
            _uses(opened, layer),
        )
        for layer in opened.layers.values()
        if layer.weights is not None and layer.shape is not None and len(layer.shape) >= 2
    }


def _spec(fmt: Format) -> Spec:
    """A format as the tables of verification name it."""
    return Spec(**{f.name: getattr(fmt, f.name) for f in fields(Spec)})


def _packing(weights: Format, method: str) -> str:
    """The name of a layout in the tables of engines; asymmetric GPTQ goes by the name of its second version there."""
    if method in LAYOUTS:
        return "gptq_v2" if method == "gptq" and not weights.symmetric else method
    return _LAYOUTS[weights.kind, weights.scale]


def _uses(opened: Opened, layer: Layer) -> tuple[str, ...]:
    """What a matrix outside the blocks is for."""
    linears: Any = opened.record.get("linears")
    recorded = linears.get(layer.name) if isinstance(linears, dict) else None
    if isinstance(recorded, dict):
        told = recorded.get("uses")
        return tuple(use for use in USES if isinstance(told, list) and use in told)
    leaf = layer.name.rpartition(".")[2]
    if leaf in _TABLES:
        return USES if opened.text.get("tie_word_embeddings") else USES[:1]
    return USES[1:] if leaf == "lm_head" else ()
