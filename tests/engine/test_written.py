"""Calibration rows that the model writes: what they are, and whole runs with them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Quiet, Stops

from qkit.engine.job import Job
from qkit.engine.synthetic_rows import BATCH, generate_rows, interleaved, with_synthetic_rows
from qkit.errors import UsageError
from qkit.runtime.loading import load
from qkit.system.parallel import workers
from qkit.workflows.quantize import Request, prepare, quantize


@pytest.fixture
def asked(tiny, tmp_path: Path) -> Request:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} and" for i in range(4000)))
    return Request(
        model=str(tiny("llama")),
        scheme="w3a16",
        method="gptq",
        group_size=32,
        calib=text,
        samples=8,
        seqlen=32,
        synthetic_samples=BATCH + 8,
        threads=1,
    )


def sums(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


def test_rows_are_drawn_from_what_the_model_expects() -> None:
    """Of such rows the mean surprise is the mean entropy; a lower temperature, or fewer candidates, would be below it."""
    model = load("tiny-llama", dtype=torch.float32)
    begin = torch.full((2 * BATCH,), model.config.bos_token_id)
    with workers(2) as pool:
        rows = generate_rows(model, begin, 24, 0, pool, lambda: None)
        again = generate_rows(model, begin, 24, 0, pool, lambda: None)
        other = generate_rows(model, begin, 24, 1, pool, lambda: None)
    assert rows.shape == (2 * BATCH, 24) and torch.equal(rows, again) and not torch.equal(rows, other)
    assert len({tuple(r) for r in rows.tolist()}) == 2 * BATCH
    with torch.inference_mode():
        expected = model(torch.cat((begin[:, None], rows), dim=1)).logits[:, :-1].log_softmax(-1)
    surprise = -expected.gather(-1, rows[..., None])[..., 0]
    away = (surprise + (expected.exp() * expected).sum(-1)).double().flatten()
    assert abs(float(away.mean())) < 4 * float(away.std()) / len(away) ** 0.5
    assert float(surprise.mean()) > 1


@pytest.mark.parametrize(("texts", "synthetic"), [(128, 48), (128, 192), (8, 8), (3, 0), (0, 5)])
def test_rows_that_are_held_out_are_like_all_rows(texts: int, synthetic: int) -> None:
    order = interleaved(texts, synthetic)
    rows = texts + synthetic
    assert sorted(order.tolist()) == list(range(rows))
    for kind in (order[order < texts], order[order >= texts]):
        assert kind.tolist() == sorted(kind.tolist())
    held = order[-16:] if rows > 16 else order
    assert abs(int((held < texts).sum()) - len(held) * texts / rows) <= 1


def test_they_are_among_those_of_the_text(asked: Request, tmp_path: Path) -> None:
    prepared = prepare(asked)
    with Job.open(tmp_path / "job", {"of": "this test"}) as job, workers(1) as pool:
        rows = with_synthetic_rows(prepared.plan, prepared.structure, job, pool, Quiet()).calibration
    texts = prepared.plan.calibration.tokens
    of_text = interleaved(len(texts), BATCH + 8) < len(texts)
    assert torch.equal(rows.tokens[of_text], texts) and len(rows.tokens) == len(texts) + BATCH + 8


def test_nothing_depends_on_the_workers_and_a_stopped_run_goes_on(asked: Request, tmp_path: Path) -> None:
    out, other, stopped, plain = (tmp_path / name for name in ("out", "other", "stopped", "plain"))
    quantize(asked, out, Quiet(), keep_job=True)
    assert json.loads((tmp_path / "out.job" / "job.json").read_text())["plan"]["calibration"]["written"] == BATCH + 8
    quantize(replace(asked, threads=3), other, Quiet())
    assert sums(other) == sums(out)
    for phases in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            quantize(asked, stopped, Stops(phases))
    quantize(asked, stopped, Quiet())
    assert sums(stopped) == sums(out)
    assert not list((tmp_path / "stopped.job").rglob("written*"))
    quantize(replace(asked, synthetic_samples=0), plain, Quiet())
    assert sums(plain) != sums(out)


def test_they_are_counted(asked: Request) -> None:
    with_them, without = prepare(asked), prepare(replace(asked, synthetic_samples=0))
    assert with_them.forecast.job_bytes > without.forecast.job_bytes
    assert with_them.forecast.operations["forward passes"] == pytest.approx(
        (8 + BATCH + 8) / 8 * without.forecast.operations["forward passes"]
    )
    assert with_them.forecast.memory["synthetic samples"] > 2 * with_them.structure.parameters


OTHERS = [{"method": "awq"}, {"method": "gptq+signround", "options": {"steps": 8, "batch": 4}}, {"significant": 0.1}]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_with_other_methods(asked: Request, tmp_path: Path, changes) -> None:
    assert quantize(replace(asked, **changes), tmp_path / "out", Quiet()).ok


def test_bad_input(asked: Request, vlm) -> None:
    with pytest.raises(UsageError, match=f"--synthetic-samples {BATCH + 8}: this method uses no calibration samples"):
        prepare(replace(asked, method="rtn"))
    with pytest.raises(UsageError, match="--synthetic-samples -1: expected 0 or more"):
        prepare(replace(asked, synthetic_samples=-1))
    with pytest.raises(
        UsageError, match=r"--synthetic-samples 3: synthetic samples are text, and a .* is calibrated on more than text"
    ):
        prepare(
            Request(
                model=str(vlm("llava", processor=True)), scheme="w4a16", method="gptq", samples=6, synthetic_samples=3
            )
        )
