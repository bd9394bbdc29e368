"""Weights that make up for the change of their inputs: the least squares, and whole runs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Quiet, Stops

from qkit.calibration.statistics import Stats
from qkit.errors import Unsupported, UsageError
from qkit.runtime.loading import load, load_tokenizer
from qkit.solvers.gptq import aim as compensated
from qkit.workflows.quantize import Request, prepare, quantize

TOKENS, WIDTH = 600, 24


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """(x, x'): what enters a linear behind quantized ones, and in the original model, float32 [TOKENS, WIDTH]."""
    g = torch.Generator().manual_seed(0)
    original = torch.randn(TOKENS, WIDTH, generator=g) @ torch.randn(WIDTH, WIDTH, generator=g)
    return original + original @ (0.1 * torch.randn(WIDTH, WIDTH, generator=g)), original


def stats_of(x: torch.Tensor, original: torch.Tensor) -> Stats:
    hessian = x.T @ x / len(x)
    return Stats(
        tokens=len(x), mean_square=hessian.diagonal(), sample=x, hessian=hessian, drift=(original - x).T @ x / len(x)
    )


def test_it_is_the_least_squares_of_the_original_outputs() -> None:
    x, original = inputs()
    w = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = torch.linalg.lstsq(x.double(), (original @ w.T).double()).solution.T.float()
    stats = stats_of(x, original)
    (whole,) = compensated([w], stats, {"compensate": 1.0, "damp": 1e-7})
    assert float((whole - wanted).norm() / wanted.norm()) < 1e-3 < float((w - wanted).norm() / wanted.norm())
    (half,) = compensated([w], stats, {"compensate": 0.5, "damp": 1e-7})
    torch.testing.assert_close(half, (w + whole) / 2, rtol=1e-4, atol=1e-5)
    (damped,) = compensated([w], stats, {"compensate": 1.0, "damp": 1e4})
    torch.testing.assert_close(damped, w, rtol=1e-2, atol=1e-3)


def test_scaled_inputs_have_scaled_drift() -> None:
    x, original = inputs()
    scale = torch.linspace(0.5, 2, WIDTH)
    found, wanted = stats_of(x, original).divided_by(scale), stats_of(x / scale, original / scale)
    torch.testing.assert_close(found.drift, wanted.drift, rtol=1e-4, atol=1e-5)


def test_what_gives_nothing_changes_nothing() -> None:
    x, original = inputs()
    w = [torch.randn(7, WIDTH)]
    stats = stats_of(x, original)
    nothing = replace(stats, drift=None), replace(stats, drift=torch.full((WIDTH, WIDTH), torch.nan))
    assert all(compensated(w, s, {"compensate": 1.0}) is w for s in nothing)
    assert compensated(w, stats, {"compensate": 0.0}) is w
    assert compensated(w, replace(stats, hessian=-stats.hessian), {"compensate": 1.0}) is w


@pytest.mark.parametrize(("scheme", "run_dtype", "dtype"), [
    ("w4a16", "bfloat16", "bfloat16"), ("w4a16", "float32", "float32"), ("w8a16", "bfloat16", "float32"),
])  # fmt: skip
def test_products_are_as_exact_as_the_weights_need(asked: Request, scheme: str, run_dtype: str, dtype: str) -> None:
    plan = prepare(replace(asked, scheme=scheme)).plan
    assert {p.drift_dtype(run_dtype) for p in plan.linears.values()} == {dtype}


# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tiny, tmp_path: Path) -> Request:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} and" for i in range(4000)))
    return Request(
        model=str(tiny("llama", num_hidden_layers=3)),
        scheme="w2a16",
        method="gptq",
        group_size=32,
        calib=text,
        samples=32,
        seqlen=32,
        options={"compensate": 1.0},
        threads=1,
    )


def logits_error(out: Path, asked: Request) -> float:
    """Of a packed model on its calibration rows, against the original."""
    ids = load_tokenizer(asked.model)(asked.calib.read_text(), return_tensors="pt")["input_ids"][:, : 32 * 32]
    ours, true = (load(str(p), dtype=torch.float32)(ids.view(-1, 32)).logits for p in (out, asked.model))
    return float((ours - true).square().mean())


def sums(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}


def test_errors_of_earlier_layers_are_made_up_for(asked: Request, tmp_path: Path) -> None:
    errors = []
    for share in (0.0, 0.5, 1.0):
        out = tmp_path / f"{share}"
        assert quantize(replace(asked, options={"compensate": share}), out, Quiet()).ok
        errors.append(logits_error(out, asked))
    assert errors[2] < errors[1] < 0.97 * errors[0]


def test_what_a_transform_divides_inputs_by_is_no_error(asked: Request, tmp_path: Path) -> None:
    """Of a trained model, whose inputs SmoothQuant divides by far: those of the original model are divided alike."""
    asked = replace(asked, model="tiny-llama", scheme="w8a8", method="smoothquant+gptq", samples=16)
    errors = []
    for share in (0.0, 0.5):
        out = tmp_path / f"{share}"
        assert quantize(replace(asked, options={"compensate": share}), out, Quiet()).ok
        errors.append(logits_error(out, asked))
    assert errors[1] < 1.5 * errors[0]


def test_nothing_depends_on_the_workers_and_a_stopped_run_goes_on(asked: Request, tmp_path: Path) -> None:
    out, other, stopped = (tmp_path / name for name in ("out", "other", "stopped"))
    quantize(asked, out, Quiet())
    quantize(replace(asked, threads=3), other, Quiet())
    assert sums(other) == sums(out)
    for phases in (12, 5):
        with pytest.raises(KeyboardInterrupt):
            quantize(asked, stopped, Stops(phases))
    quantize(asked, stopped, Quiet())
    assert sums(stopped) == sums(out)
    assert not list(tmp_path.rglob(".tmp-*"))


OTHERS = [{"method": "awq+gptq"}, {"method": "gptq+signround"}, {"scheme": "w4a8"}, {"outliers": 1.0}]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_with_other_parts_of_a_method(asked: Request, tmp_path: Path, changes) -> None:
    if "signround" in changes.get("method", ""):
        changes["options"] = {"compensate": 0.5, "steps": 8, "batch": 4}
    assert quantize(replace(asked, **changes), tmp_path / "out", Quiet()).ok


def test_experts_go_without(asked: Request, tiny, tmp_path: Path) -> None:
    """Their attention does not."""
    mixtral = replace(asked, model=str(tiny("mixtral")))
    found = []
    for share in (0.0, 1.0):
        assert quantize(replace(mixtral, options={"compensate": share}), tmp_path / f"{share}", Quiet()).ok
        found.append(sums(tmp_path / f"{share}"))
    assert found[0] != found[1]


def test_rows_with_pictures(vlm, tmp_path: Path) -> None:
    request = Request(
        model=str(vlm("llava", processor=True)),
        scheme="w4a16",
        method="gptq",
        samples=6,
        options={"compensate": 0.5},
        threads=2,
        targets={"vision": "w4a16", "projector": "w4a16"},
    )
    assert quantize(request, tmp_path / "out", Quiet()).ok


def test_bad_input(asked: Request, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"option 'compensate': expected 0 to 1, found 1\.5"):
        prepare(replace(asked, options={"compensate": 1.5}))
    with pytest.raises(UsageError, match=r"option 'sweeps': expected 0 or more, found -1"):
        prepare(replace(asked, options={"sweeps": -1}))
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")
    from tiny_dits import make_pipeline

    pipeline = Request(
        model=str(make_pipeline(tmp_path / "wan", steps=3)), scheme="w4a8", method="gptq", options={"compensate": 0.5}
    )
    with pytest.raises(Unsupported, match="option 'compensate' needs samples of one shape"):
        prepare(pipeline)
