"""Files of llm-compressor, in the layout of compressed-tensors: see common.py. Its environment:

python3.11 -m venv llmcompressor && llmcompressor/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from common import ROWS, TOKENS, plain, rows, run, tokenizer
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier


def write(model: Path, text: Path, out: Path, modifier: type = QuantizationModifier, **options: object) -> None:
    """One file, of all linears but the head."""
    ids = rows(model, text).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * TOKENS] * ROWS})
    oneshot(
        model=plain(model),
        tokenizer=tokenizer(model),
        dataset=data,
        recipe=modifier(ignore=["lm_head"], **options),
        num_calibration_samples=ROWS,
        max_seq_length=TOKENS,
        output_dir=str(out),
    )


def weights(bits: int, **fields: object) -> dict[str, object]:
    """Integer weights alone, as a config group of all linears."""
    groups = {"strategy": "group", "group_size": 32} | fields
    return {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", "symmetric": True} | groups}


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
MIXED = {
    "attention": {**weights(8, strategy="channel", group_size=None), "targets": ["re:.*self_attn.*"]},
    "mlp": {**weights(4), "targets": ["re:.*mlp.*"]},
}
scheme = partial(partial, write, targets="Linear")
run(
    {
        "fp8-block": scheme(scheme="FP8_BLOCK"),
        "fp8-dynamic": scheme(scheme="FP8_DYNAMIC"),
        "fp8-static": scheme(scheme="FP8"),
        "fp8-static-kv": scheme(scheme="FP8", kv_cache_scheme=CACHE),
        "mixed-w4-w8": partial(write, config_groups=MIXED),
        "nvfp4": scheme(scheme="NVFP4"),
        "nvfp4a16": scheme(scheme="NVFP4A16"),
        "w4a16-asym-g128": scheme(scheme="W4A16_ASYM"),
        "w4a16-g128": scheme(scheme="W4A16"),
        "w4a16-g32-gptq": partial(write, modifier=GPTQModifier, config_groups={"g": weights(4)}),
        "w8a16": scheme(scheme="W8A16"),
        "w8a8": scheme(scheme="INT8"),
        "w4a16-g32-static": partial(write, modifier=GPTQModifier, config_groups={"g": weights(4)}, actorder="static"),
        "w4a8": scheme(scheme="W4A8"),
        "mxfp4": scheme(scheme="MXFP4"),
        "mxfp8": scheme(scheme="MXFP8"),
    }
)
