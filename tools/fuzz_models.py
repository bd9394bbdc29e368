"""The models whose files ``fuzz_targets`` mutates, and what a sound one gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import qkit_data
import torch
import transformers

from qkit.calibration.mixture import Layout, mixed_rows
from qkit.calibration.sources import CalibSource
from qkit.planning.request import Request
from qkit.runtime.loading import load_tokenizer
from qkit.workflows.quantize import prepare

SIZES = dict(
    vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip


def make_model(folder: Path, family: str = "llama", shard: str = "5GB", **changes: Any) -> Path:
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(qkit_data.model_path("tiny-llama") / name, folder / name)
    return folder


def planned(folder: Path) -> tuple[int, int, int]:
    plan = prepare(Request(model=str(folder), scheme="w4a16", threads=1)).plan
    weights = sum(p.shape[0] * p.shape[1] for p in plan.linears.values())
    return len(plan.linears) + len(plan.skipped), plan.source_bytes, weights


def plan_again(folder: Path, expected: tuple[int, int, int]) -> str | None:
    """A plan of a mutated model has to be that of the sound one: its tensors are the same."""
    found = planned(folder)
    return None if found == expected else f"planned {found}, expected {expected}"


def tokens(folder: Path) -> str | None:
    """What is used of a tokenizer: the ids of a text, and the special tokens."""
    tokenizer = load_tokenizer(folder)
    text = folder.parent / "text.txt"
    mixed_rows([CalibSource(str(text))], tokenizer, Layout(samples=2, seqlen=16), SIZES["vocab_size"])
    return None
