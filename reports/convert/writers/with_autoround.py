"""Files of AutoRound: see common.py. Its environment:

python3.11 -m venv autoround && autoround/bin/pip install torch==2.13.0 auto-round==0.16.1 compressed-tensors==0.20.1
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from auto_round import AutoRound
from common import ROWS, TOKENS, plain, rows, run, tokenizer


def write(model: Path, text: Path, out: Path, layout: str, scheme: str = "W4A16", **options: object) -> None:
    """One file. options: what differs from the scheme"""
    data = torch.utils.data.DataLoader(rows(model, text), batch_size=4)
    made = AutoRound(
        plain(model),
        tokenizer(model),
        scheme=scheme,
        dataset=data,
        iters=0,
        disable_opt_rtn=True,
        nsamples=ROWS,
        seqlen=TOKENS,
        batch_size=4,
        device_map="cpu",
        **options,
    )
    made.quantize_and_save(str(out / "made"), format=layout)
    for file in [f for f in (out / "made").rglob("*") if f.is_file()]:  # in a folder that AutoRound names
        file.rename(out / file.name)
    shutil.rmtree(out / "made")


GROUPS = {"group_size": 32}
run(
    {
        "autoround-w4g32-sym": partial(write, layout="auto_round", **GROUPS),
        "autoround-gptq-w4g32-asym": partial(write, layout="auto_round:auto_gptq", sym=False, **GROUPS),
        "awq-w4g32-asym": partial(write, layout="auto_awq", sym=False, **GROUPS),
        "awq-w4g32-sym": partial(write, layout="auto_awq", **GROUPS),
        "gptq-w2g32-sym": partial(write, layout="auto_gptq", scheme="W2A16", **GROUPS),
        "gptq-w3g32-sym": partial(write, layout="auto_gptq", scheme="W3A16", **GROUPS),
        "gptq-w4-channel-sym": partial(write, layout="auto_gptq", group_size=-1),
        "gptq-w4g32-asym": partial(write, layout="auto_gptq", sym=False, **GROUPS),
        "gptq-w4g32-sym": partial(write, layout="auto_gptq", **GROUPS),
        "gptq-w8g32-sym": partial(write, layout="auto_gptq", scheme="W8A16", **GROUPS),
        "llmc-mxfp4": partial(write, layout="llm_compressor", scheme="MXFP4"),
        "llmc-nvfp4": partial(write, layout="llm_compressor", scheme="NVFP4"),
    }
)
