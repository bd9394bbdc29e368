"""The engines that load a result in GGUF, as seen by running them: llama.cpp, transformers 5.24 and vLLM 0.32."""

from __future__ import annotations

from collections.abc import Iterable

from qkit.verification.engine_types import OWN, STOCK_TABLE, TABLE, VLLM_TABLE
from qkit.verification.model_engines import EngineRow

PACKING = "GGUF"
_PREFIX = "GGUF_"  # of schemes whose names in the file are shorter
_UNREAD = "NVFP4"  # the type that transformers does not decode
_ROUNDS = "on a CPU it rounds the inputs of quantized layers to 8 bits"
_DECODES = "with gguf_file='model.gguf' and GgufConfig(dequantize=True), decoded to floats"


def gguf_rows(names: Iterable[str]) -> list[EngineRow]:
    """One row for every engine. names: of the formats of all quantized weights"""
    types = [name.upper().removeprefix(_PREFIX) for name in names]
    unread = _UNREAD in types
    refusal = f"transformers 5.24 does not decode {_UNREAD}"
    fits: list[tuple[str, str | None, str, str]] = [
        ("llama.cpp", "a GGUF file", _ROUNDS, TABLE.format("llama.cpp")),
        ("transformers", None if unread else "float weights", refusal if unread else _DECODES, STOCK_TABLE),
        ("vLLM", None, "vLLM 0.32 reads no GGUF files", VLLM_TABLE),
        ("qkit", "qkit.load", "float32 weights", OWN),
    ]
    return [
        EngineRow(
            weights=", ".join(dict.fromkeys(types)),
            activations="as they are",
            packing=PACKING,
            linears=len(types),
            engine=engine,
            loads_as=loads_as,
            limits=(limit,),
            known=known,
        )
        for engine, loads_as, limit, known in fits
    ]
