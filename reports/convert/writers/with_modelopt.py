"""Files of ModelOpt, in its layout of Hugging Face checkpoints: see common.py. Its environment:

python3.11 -m venv modelopt && modelopt/bin/pip install torch==2.13.0 'nvidia-modelopt[hf]==0.47.0'
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
from common import plain, rows, run
from modelopt.torch.export import export_hf_checkpoint


def write(model: Path, text: Path, out: Path, config: str, kv: str | None = None, attention: str | None = None) -> None:
    """One file. kv: configuration of the cache; attention: of the linears of attention, where it is another"""
    network, data = plain(model), rows(model, text)
    asked: dict[str, Any] = copy.deepcopy(getattr(mtq, config))
    if kv is not None:
        asked["quant_cfg"] += copy.deepcopy(getattr(mtq, kv)["quant_cfg"])
    if attention is not None:
        asked["quant_cfg"] += [
            {**rule, "quantizer_name": f"*self_attn{rule['quantizer_name']}"}
            for rule in copy.deepcopy(getattr(mtq, attention)["quant_cfg"])
            if rule["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")
        ]

    def forward(quantized: Any) -> None:
        for some in data.split(4):
            quantized(some)

    mtq.quantize(network, asked, forward)
    export_hf_checkpoint(network, export_dir=str(out))


run(
    {
        "fp8": partial(write, config="FP8_DEFAULT_CFG"),
        "fp8-kv": partial(write, config="FP8_DEFAULT_CFG", kv="FP8_KV_CFG"),
        "fp8-pbwo": partial(write, config="FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
        "fp8-pcpt": partial(write, config="FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        "mxfp8": partial(write, config="MXFP8_DEFAULT_CFG"),
        "nvfp4": partial(write, config="NVFP4_DEFAULT_CFG"),
        "nvfp4-kv": partial(write, config="NVFP4_DEFAULT_CFG", kv="FP8_KV_CFG"),
        "nvfp4-mlp-fp8-attn": partial(write, config="NVFP4_DEFAULT_CFG", attention="FP8_DEFAULT_CFG"),
        "w4a16-nvfp4": partial(write, config="W4A16_NVFP4_CFG"),
        "mxfp4": partial(write, config="MXFP4_DEFAULT_CFG"),
        "w4a16-awq": partial(write, config="INT4_AWQ_CFG"),
    }
)
