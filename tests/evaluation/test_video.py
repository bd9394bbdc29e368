"""Figures of videos: metrics whose values are known, and the command on a small pipeline."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")

from qkit_data import clip_classifier
from qkit_data.clips import COLORS, FRAMES, MOTIONS, SHAPES, SIZE, WORDS, clip
from safetensors.torch import save_file
from tiny_dits import make_pipeline

import qkit
from qkit.diffusion.controller import RAN, SKIPPED, StepChoice
from qkit.evaluation.video import (
    PEAK_DB,
    Video,
    figures_by_step,
    flickering,
    latent_errors,
    motion,
    psnr,
    sample_figures,
    ssim,
)
from qkit.files.checkpoint import Checkpoint
from qkit.runtime.loading import PackedStructure


def frames(seed: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 24, 24, 3, generator=torch.Generator().manual_seed(seed))


def test_metrics_of_equal_frames() -> None:
    x = frames(0)
    assert psnr(x, x) == PEAK_DB and ssim(x, x) == pytest.approx(1)
    assert math.isnan(psnr(x * math.nan, x))


def test_psnr_is_the_error_in_decibels() -> None:
    x = torch.full((2, 8, 8, 3), 0.5)
    assert psnr(x, x + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(x, x + 0.01) == pytest.approx(40, abs=1e-3)


def test_ssim_falls_with_noise_and_sees_a_constant_shift_of_structure() -> None:
    """Of constant frames only the means count: (2 a b + c1) / (a a + b b + c1)."""
    a, b = torch.full((1, 24, 24, 3), 0.4), torch.full((1, 24, 24, 3), 0.6)
    assert ssim(a, b) == pytest.approx((2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4), abs=1e-6)
    x, noise = torch.from_numpy(clip(3).frames).float() / 255, torch.randn(FRAMES, SIZE, SIZE, 3)
    values = [ssim(x, x + s * noise) for s in (0.01, 0.05, 0.2)]
    assert values == sorted(values, reverse=True) and values[0] > 0.8 and values[-1] < 0.5


def test_flickering_and_motion_by_their_definitions() -> None:
    still = frames(1, 1).expand(5, -1, -1, -1)
    assert flickering(still) == 1 and motion(still) == 0
    blink = torch.zeros(4, 8, 8, 3)
    blink[1::2] = 1
    assert flickering(blink) == 0 and motion(blink) == 1 and motion(blink[:3]) == 0
    assert math.isnan(flickering(still[:1]))


def test_latent_errors_are_relative_by_step() -> None:
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        Video(frames=frames(0), latents=(x, 1.1 * x, 1.5 * x), seconds=1.0),
        Video(frames=frames(0), latents=(x, x, x), seconds=2.0),
    )
    assert latent_errors(ours, theirs) == pytest.approx([0, 0.1, 0.5], rel=1e-4)
    found = sample_figures([ours, ours], [theirs, theirs])
    assert found["latent_error"][0] == pytest.approx(0.5, rel=1e-4) and found["psnr"][0] == PEAK_DB
    assert found["seconds"] == 1.0 and found["baseline_seconds"] == 2.0 and "width" not in found


def test_clips_are_what_their_words_say() -> None:
    seen = [clip(i) for i in range(300)]
    assert {w for c in seen for w in c.prompt.split()} == set(WORDS)
    assert len({c.prompt for c in seen}) > 80 and {c.labels[2] for c in seen} == set(range(len(MOTIONS)))
    for c in seen[:60]:
        _, color, shape, verb = c.prompt.split()[:4]
        assert SHAPES[c.labels[0]] == shape and list(COLORS)[c.labels[1]] == color
        assert MOTIONS[c.labels[2]].split()[0] == verb
        assert c.frames.shape == (FRAMES, SIZE, SIZE, 3) and c.frames.dtype.name == "uint8"
        assert (clip(c.labels[0] + 7).frames == clip(c.labels[0] + 7).frames).all()
    left = next(c for c in seen if "moves left" in c.prompt)
    bright = (left.frames.max(-1) > 100).any(1)  # [frames, columns]
    centers = [float(row.nonzero()[0].mean()) for row in bright]
    assert centers[0] > centers[4] > centers[-1]


def test_maps_by_step_and_block() -> None:
    """Of two runs with two branches: block 0 runs at step 0 and is skipped by one run at step 1."""
    made = {0: ("int8_token", "nvfp4_dynamic"), 1: ("nvfp4_dynamic", None)}
    logs = []
    for run_number in (0, 1):
        log = []
        for step, choices in made.items():
            for branch in (0, 1):
                said = choices[run_number]
                log.append(StepChoice(step, branch, 0, "", SKIPPED if said is None else RAN))
                log += [StepChoice(step, branch, 0, name, said) for name in "xy" if said is not None]
        logs.append(tuple(log))
    assert figures_by_step(logs) == {"bits": [[6.0, 4.0]], "skips": [[0.0, 0.5]]}


def test_eval_of_a_pipeline(run, tmp_path: Path) -> None:
    source = make_pipeline(tmp_path / "wan", steps=4)
    code, _, err = run("quantize", "--model", source, "--scheme", "w4a8", "--out", tmp_path / "out")
    assert code == 0, err
    report = tmp_path / "figures.json"
    page = tmp_path / "page.html"
    code, out, err = run(
        "eval", tmp_path / "out", "--baseline", source, "--videos", 3, "--json", report, "--report", page
    )
    assert code == 0 and "PSNR, dB" in out and not err, err  # what diffusers says of the ordinary is not said
    assert page.read_text().count("data:image/png") == 1 + 2 * 3 and "a red ball moves left" in page.read_text()
    found = json.loads(report.read_text())["videos"]
    assert found["videos"] == 3 and 5 < found["psnr"][0] < 90 and 0 < found["latent_error"][0] < 1
    assert len(found["latent_errors"]) == 4 and found["latent_errors"][0] == 0 and found["nonfinite"] == 0
    assert json.loads(report.read_text())["size"]["bytes"] < json.loads(report.read_text())["size"]["baseline_bytes"]
    code, _, err = run("eval", "tiny-llama", "--videos", 3)
    assert code == 2 and "made by diffusion pipelines" in err
    code, _, err = run("eval", tmp_path / "out", "--videos", 3, "--text", "a.txt")
    assert code == 2 and "leave one of them out" in err


def test_check_of_a_pipeline(run, tmp_path: Path) -> None:
    source = make_pipeline(tmp_path / "wan", steps=4)
    assert run("quantize", "--model", source, "--scheme", "w8a8", "--out", tmp_path / "out")[0] == 0
    budget = tmp_path / "budget.yaml"
    budget.write_text('psnr: 10\nssim: 0.2\nlatent_error: 0.5\nflickering: ">=-20%"\nvideos: 2\nsize: 0.9x\n')
    code, out, err = run("check", tmp_path / "out", "--budget", budget)  # the original is where the job says
    assert code == 0 and "psnr" in out, err
    budget.write_text("latent_error: 0.000001\nwidth: 5\nvideos: 2\n")
    code, _, err = run("check", tmp_path / "out", "--budget", budget)
    assert code == 4 and "latent_error, width" in err  # no controller, no width: not measured is not kept
    for line, said in (
        ("psnr: 25dB", "does not fit 'psnr'"),
        ("psnr: +2%", "does not fit"),
        ("ssim: 3", "out of range"),
    ):
        budget.write_text(line + "\n")
        code, _, err = run("check", tmp_path / "out", "--budget", budget)
        assert code == 3 and said in err


def test_smoothquant_in_a_pipeline(run, tmp_path: Path) -> None:
    """Scales at run time where nothing before a linear can take them; what is loaded is the same function."""
    source = make_pipeline(tmp_path / "wan", steps=4)
    out = tmp_path / "out"
    code, _, err = run(
        "quantize",
        "--model",
        source,
        "--scheme",
        "w8a8",
        "--method",
        "smoothquant+hadamard",
        "--samples",
        8,
        "--out",
        out,
    )
    assert code == 0 and run("verify", out)[0] == 0, err
    structure = PackedStructure(Checkpoint.open(out / "transformer", quantized=True))
    assert len(structure.scaled) >= 4 and len(structure.rotated) == 20
    packed, original = (qkit.load(p, dtype=torch.float32).transformer for p in (out, source))
    g = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=g), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=g),
    }  # fmt: skip
    with torch.inference_mode():
        a, b = (m(**call).sample for m in (packed, original))
    assert 0 < (a - b).norm() < 0.03 * b.norm()


def test_samples_of_drawn_clips_are_classified_where_the_classifier_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An untrained classifier still gives figures; without its weights there are none."""
    clips = [clip(i) for i in range(3)]
    made = [
        Video(frames=torch.from_numpy(c.frames).float() / 255, latents=(torch.ones(1),), seconds=1.0, prompt=c.prompt)
        for c in clips
    ]
    monkeypatch.setattr(clip_classifier, "FILE", tmp_path / "clip_classifier.safetensors")
    assert "recognised" not in sample_figures(made, made)
    save_file(clip_classifier.ClipClassifier().state_dict(), clip_classifier.FILE)
    found = sample_figures(made, made)
    assert found["recognised"][0] == found["baseline_recognised"][0] and found["feature_distance"] < 1e-3
    assert [clip_classifier.labels_of(c.prompt) for c in clips] == [
        c.labels for c in clips
    ] and clip_classifier.labels_of("a cat") is None
