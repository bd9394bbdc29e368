"""End-to-end learning of scales: what it is for, and what it may not change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import qkit_data
import torch
from conftest import Quiet, Stops
from safetensors.torch import load_file
from torch import Tensor

import qkit
from qkit.engine.end_to_end import END_TO_END
from qkit.errors import Unsupported, UsageError
from qkit.runtime.loading import load, load_tokenizer
from qkit.workflows.quantize import Request, prepare, quantize

LEARN = {"steps": 8, "batch": 8, "e2e_steps": 24}


@pytest.fixture
def asked(tmp_path: Path) -> Request:
    text = tmp_path / "text.txt"
    text.write_text(qkit_data.text_path("calibration").read_text(encoding="utf-8")[:40_000])
    return Request(
        model="tiny-llama",
        scheme="w3a16",
        method="signround",
        group_size=64,
        calib=text,
        samples=40,
        seqlen=64,
        options=LEARN,
        threads=2,
    )


class StopsAtTheWhole(Quiet):
    """Behind the blocks, in the midst of what follows."""

    def __init__(self) -> None:
        self.left = 3

    def start(self, what: str, total: int) -> None:
        self.counting = what == END_TO_END

    def step(self, amount: int = 1) -> None:
        self.left -= self.counting
        if not self.left:
            raise KeyboardInterrupt


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in Path(f"{out}.job", "journal.jsonl").read_text().splitlines()]


def sums(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


def divergence(out: Path) -> float:
    """KL divergence from the original on text that nothing was learned from, of the packed model."""
    text = qkit_data.text_path("calibration").read_text(encoding="utf-8")[60_000:100_000]
    ids = load_tokenizer("tiny-llama")(text, return_tensors="pt")["input_ids"][:, : 24 * 128].view(24, 128)

    def expected(model: Any) -> Tensor:
        with torch.inference_mode():
            return model(ids).logits.log_softmax(-1)

    true, ours = (expected(load(p, dtype=torch.float32)) for p in ("tiny-llama", out))
    return float((true.exp() * (true - ours)).sum(-1).mean())


def tensors(out: Path) -> dict[str, Tensor]:
    return {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}


def test_the_whole_model_comes_closer(asked: Request, tmp_path: Path) -> None:
    """On text that nothing was learned from; codes and all else stay as they were."""
    out, blocks = tmp_path / "out", tmp_path / "blocks"
    assert quantize(asked, out, Quiet()).ok
    quantize(replace(asked, options={**LEARN, "e2e_steps": 0}), blocks, Quiet())
    before, after = journal(out)[-1]["divergence"]
    assert after < 0.99 * before
    assert divergence(out) < 0.98 * divergence(blocks)
    mine, theirs = tensors(out), tensors(blocks)
    changed = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    assert mine.keys() == theirs.keys() and changed and all(n.endswith("weight_scale") for n in changed)


def test_nothing_depends_on_the_workers_or_on_a_stop(asked: Request, tiny: Any, tmp_path: Path) -> None:
    model = str(tiny("llama", num_hidden_layers=3))
    short = replace(asked, model=model, options={"steps": 1, "batch": 4, "e2e_steps": 4}, samples=24)
    out, other, stopped = tmp_path / "out", tmp_path / "other", tmp_path / "stopped"
    quantize(short, out, Quiet())
    quantize(replace(short, threads=3), other, Quiet())
    for listener in (Stops(9), StopsAtTheWhole()):
        with pytest.raises(KeyboardInterrupt):
            quantize(short, stopped, listener)
    assert len(journal(stopped)) == 3
    quantize(short, stopped, Quiet())
    assert sums(out) == sums(other) == sums(stopped)


@pytest.mark.parametrize("changes", [
    {"scheme": "q3_k", "group_size": None},  # behind gptq its super-scales have next to nothing left to gain
    {"scheme": "w4a8", "method": "smoothquant+signround"},
    {"scheme": "w3a16_asym", "method": "rotate+signround"},
    {"outliers": 0.5, "significant": 0.02},
], ids=str)  # fmt: skip
def test_with_activations_transforms_and_sparse_parts(asked: Request, tmp_path: Path, changes: dict[str, Any]) -> None:
    """It begins where the blocks ended: a model close to the original, which comes closer."""
    asked = replace(asked, options={"steps": 2, "batch": 8, "e2e_steps": 6}, samples=32, **changes)
    assert quantize(asked, tmp_path / "out", Quiet()).ok
    before, after = next(x["divergence"] for x in journal(tmp_path / "out") if x.get("stage") == "whole")
    assert after < before < 0.12


def test_its_memory_and_its_operations_are_told(asked: Request) -> None:
    with_it, without = (prepare(replace(asked, options={**LEARN, "e2e_steps": n})).forecast for n in (24, 0))
    weights = sum(p.shape[0] * p.shape[1] for p in prepare(asked).plan.linears.values())
    assert 0 < with_it.memory[END_TO_END]
    assert with_it.job_bytes - without.job_bytes > 2 * weights  # dequantized, in 16 or 32 bits
    assert END_TO_END not in without.operations
    head = qkit.load("tiny-llama").get_output_embeddings().weight.numel()
    # Four passes of four rows in a step; all rows once; two held-out rows, before and in four looks.
    rows = 24 * 4 * 4 + 40 + 5 * 2
    assert with_it.operations[END_TO_END] == 2 * (weights + head) * rows * asked.seqlen


def test_bad_input(asked: Request, vlm: Any) -> None:
    with pytest.raises(UsageError, match="option 'e2e_steps': expected 0 or more, found -1"):
        prepare(replace(asked, options={"e2e_steps": -1}))
    for scheme in ("mxfp4", "nvfp4"):
        with pytest.raises(UsageError, match=f"'e2e_steps' learns scales, and {scheme} has none that can be learned"):
            prepare(replace(asked, scheme=scheme, group_size=None))
    told = "option 'e2e_steps' needs the predictions of a language model, and this is none"
    for other in (
        Request(model="tiny-video", scheme="w4a8", method="gptq+signround"),
        Request(model=str(vlm("llava", True)), scheme="w4a16", method="signround", samples=4),
    ):
        with pytest.raises(Unsupported, match=told):
            prepare(replace(other, options={"e2e_steps": 4}))
