"""The video reference pipeline: what its card says, and the commands of the README on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import qkit_data
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")

from qkit_data import clip_classifier
from qkit_data.clips import clip

from qkit.diffusion.trajectory import sampling_of
from qkit.evaluation.video import held_out, make_video
from qkit.runtime.loading import load

MODEL = qkit_data.model_path("tiny-video")
CLIPS = 60


def test_the_classifier_knows_drawn_clips() -> None:
    """Shapes, colours and motions of clips that it was not trained on."""
    clips = [clip(seed) for seed in range(CLIPS)]
    frames = torch.stack([torch.from_numpy(c.frames) for c in clips]).float() / 255
    _, right = clip_classifier.recognised(clip_classifier.load_classifier(), frames, [c.labels for c in clips])
    assert right.all(1).double().mean() >= 0.95
    assert [clip_classifier.labels_of(c.prompt) for c in clips] == [c.labels for c in clips]


def test_samples_move_as_they_are_told() -> None:
    """Small, fast, and a classifier sees what was asked for: motion and colour nearly always, the shape mostly."""
    assert sum(f.stat().st_size for f in (MODEL / "transformer").iterdir()) <= 10e6
    pipeline, sampling = load("tiny-video", dtype=torch.float32), sampling_of(MODEL, None, {})
    pipeline.set_progress_bar_config(disable=True)
    chosen = [held_out(sampling, i) for i in range(16)]
    videos = [make_video(pipeline, prompt, sampling.call, seed) for prompt, seed in chosen]
    labels = [clip_classifier.labels_of(prompt) for prompt, _ in chosen]
    _, right = clip_classifier.recognised(
        clip_classifier.load_classifier(), torch.stack([v.frames for v in videos]), labels
    )
    shape, color, motion = right.double().mean(0).tolist()
    assert motion >= 0.85 and color >= 0.7 and shape >= 0.5
    assert sampling.call["num_inference_steps"] == 20


@pytest.mark.parametrize(
    ("scheme", "options", "most"),
    [
        ("w8a8", (), 0.05),
        ("w4a8", ("--method", "gptq", "--samples", 8, "--call", "num_inference_steps=8"), 0.35),
        ("nvfp4", ("--method", "gptq", "--samples", 16, "--call", "num_inference_steps=8"), 0.4),
        ("6bit", ("--samples", 8, "--policy", "skips=0.2", "--call", "num_inference_steps=8"), 0.5),
    ],
)
def test_quantized_pipelines_sample(run, tmp_path: Path, scheme: str, options: tuple[str, ...], most: float) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    code, _, err = run("quantize", "--model", "tiny-video", "--scheme", scheme, *options, "--out", out)
    assert code == 0 and run("verify", out)[0] == 0, err
    code, _, err = run("eval", out, "--baseline", "tiny-video", "--videos", 2, "--json", figures)
    assert code == 0, err
    measured = json.loads(figures.read_text())
    found = measured["videos"]
    assert found["nonfinite"] == 0 and 1e-4 < found["latent_error"][0] < most and "recognised" in found
    assert measured["size"]["bytes"] < 0.6 * measured["size"]["baseline_bytes"]
    if scheme == "6bit":
        assert 5 < found["width"][0] < 7.5 and 0.02 < found["skipped"][0] < 0.35
