"""Tokens weighted by their effect on the loss: the weights, what a Hessian makes of them, and a run that uses them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quiet, Stops
from torch import Tensor

from qkit.engine.job import Job
from qkit.errors import Unsupported
from qkit.sensitivity import token_weights as module
from qkit.system.parallel import workers
from qkit.workflows.quantize import Request, prepare, quantize

ROWS, LENGTH = 8, 32


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i * i % 97} and" for i in range(2000)))
    return file


def asked(model: Any, text: Path, **changes: Any) -> Request:
    given = {"method": "gptq", "group_size": 32, "samples": ROWS, "seqlen": LENGTH, "threads": 1, **changes}
    return Request(model=str(model), scheme="w3a16", calib=text, options={"guided": True}, **given)


def weights(request: Request, folder: Path) -> list[dict[str, Tensor]]:
    """In float32."""
    prepared = prepare(request)
    plan = replace(prepared.plan, run_dtype="float32")
    with Job.open(folder, {}) as job, workers(request.threads) as pool:
        return module.token_weights(plan, prepared.structure, job, pool, Quiet())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
def test_a_chain_gives_what_the_whole_model_gives(
    family: str, tiny: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny(family, torch.float32), text)
    ours = weights(request, tmp_path / "chain")
    monkeypatch.setattr(module, "chain_of", lambda *_: None)
    true = weights(request, tmp_path / "whole")
    assert len(ours) > 1 and all(len(of_block) >= 6 for of_block in ours)
    for of_block, of_whole in zip(ours, true, strict=True):
        assert list(of_block) == list(of_whole)
        for name, w in of_block.items():
            assert w.shape == (ROWS, LENGTH) and float(w.mean()) == pytest.approx(1.0, abs=1e-5)
            assert float(w.std()) > 0.05, name
            torch.testing.assert_close(w, of_whole[name], rtol=2e-3, atol=1e-4)


def test_nothing_depends_on_what_is_held_or_on_the_workers(
    tiny: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny("llama", torch.float32), text)
    monkeypatch.setattr(module, "PIECE_TOKENS", 2 * LENGTH)
    together = weights(request, tmp_path / "together")
    monkeypatch.setattr(module, "rows_at_a_time", lambda plan, structure: 3)
    apart = weights(replace(request, threads=3), tmp_path / "apart")
    for one, other in zip(together, apart, strict=True):
        assert all(torch.equal(w, other[name]) for name, w in one.items())


def sums(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


def test_a_run_and_one_that_stopped(tiny: Any, text: Path, tmp_path: Path) -> None:
    request = asked(tiny("llama"), text)
    out, other, stopped, plain = (tmp_path / name for name in ("out", "other", "stopped", "plain"))
    assert quantize(request, out, Quiet()).ok
    quantize(replace(request, threads=3), other, Quiet())
    with pytest.raises(KeyboardInterrupt):
        quantize(request, stopped, Stops(12))
    quantize(request, stopped, Quiet())
    quantize(replace(request, options={}), plain, Quiet())
    assert sums(out) == sums(other) == sums(stopped) != sums(plain)


def test_rotated_weights_have_the_same_tokens(tiny: Any, text: Path, tmp_path: Path) -> None:
    request = asked(tiny("llama", torch.float32), text)
    plain, rotated = (weights(replace(request, method=m), tmp_path / m) for m in ("gptq", "rotate+gptq"))
    for one, other in zip(plain, rotated, strict=True):
        assert all(torch.equal(w, other[name]) for name, w in one.items())


def test_its_cost_is_told(tiny: Any, text: Path) -> None:
    request = asked(tiny("llama"), text)
    guided, plain = prepare(request), prepare(replace(request, options={}))
    added = set(guided.forecast.memory) - set(plain.forecast.memory)
    assert added == {"tokens weighted by the loss"}
    assert guided.forecast.operations["tokens weighted by the loss"] > plain.forecast.operations["forward passes"]
    assert guided.forecast.job_bytes > plain.forecast.job_bytes


def test_a_model_without_predictions_is_refused() -> None:
    with pytest.raises(Unsupported, match="option 'guided' needs the predictions of a language model of texts alone"):
        prepare(Request(model="tiny-video", scheme="w4a8", method="gptq", options={"guided": True}))
