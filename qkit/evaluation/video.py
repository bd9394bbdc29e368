"""The cost of quantizing a diffusion pipeline: samples of both models for the same prompts and seeds.

Paired with the original: PSNR and SSIM of frames, and how far the latents are from the original's, step by step. Of each
model by itself: flickering as VBench defines it (arXiv 2311.17982, temporal flickering: mean absolute difference of
neighbouring frames, from 255), and how much moves. Images are clips of one frame.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkit.diffusion.clock import Clock
from qkit.diffusion.controller import SKIPPED, StepChoice
from qkit.diffusion.pipeline import quiet
from qkit.diffusion.policy import BITS, mean_width
from qkit.diffusion.trajectory import Sampling, sampling_of, subject
from qkit.evaluation.metrics import bootstrap_ci
from qkit.files.folder import DENOISER
from qkit.system.extras import needs
from qkit.system.progress import NamedAdvance

SEEDS = 1_000_000  # from here on: calibration and policies have others
PEAK_DB = 100.0  # of frames that are equal


@dataclass(frozen=True, kw_only=True)
class Video:
    """A sample of a diffusion pipeline.

    frames: float32 [n, height, width, 3] from 0 to 1; latents: what the transformer was given at each step, first branch;
    width, skipped, log: of a controller (``diffusion.controller``), if there is one; seconds: of the whole pipeline.
    """

    frames: Tensor
    latents: tuple[Tensor, ...]
    seconds: float
    width: float = math.nan
    skipped: float = math.nan
    prompt: str = ""
    log: tuple[StepChoice, ...] = ()


def make_video(pipeline: Any, prompt: str, call: dict[str, Any], seed: int) -> Video:
    """The sample of a pipeline for a prompt and a seed."""
    model = getattr(pipeline, DENOISER)
    signature = inspect.signature(model.forward)
    clock, latents = Clock(), list[Tensor]()

    def note_latents(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        clock.tick(arguments["timestep"], arguments["hidden_states"])
        if clock.step == len(latents):
            latents.append(arguments["hidden_states"][:1].float().cpu().clone())

    steps = getattr(model, "steps", None)
    if steps is not None:
        steps.reset()
    handle = model.register_forward_pre_hook(note_latents, with_kwargs=True)
    began = time.perf_counter()
    try:
        with torch.inference_mode(), quiet():
            generator = torch.Generator().manual_seed(seed)
            output = pipeline(**subject(pipeline, prompt), **call, generator=generator, output_type="np")
    finally:
        handle.remove()
    seconds = time.perf_counter() - began
    frames = output.frames[0] if hasattr(output, "frames") else output.images
    width, skipped, log = (math.nan, math.nan, ()) if steps is None else (steps.width, steps.skipped, tuple(steps.log))
    return Video(
        frames=torch.as_tensor(np.asarray(frames)).float(),
        latents=tuple(latents),
        seconds=seconds,
        width=width,
        skipped=skipped,
        prompt=prompt,
        log=log,
    )


def psnr(a: Tensor, b: Tensor) -> float:
    """The peak signal-to-noise ratio of frames from 0 to 1, in dB, at most PEAK_DB."""
    error = float((a.double() - b.double()).square().mean())
    if not math.isfinite(error):
        return math.nan
    return PEAK_DB if error <= 0 else min(PEAK_DB, -10 * math.log10(error))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of frames [n, height, width, 3] from 0 to 1: by frame and channel, windows of a
    Gaussian of 1.5 pixels cut at 11, K1 = 0.01, K2 = 0.03, mean over all."""

    with needs("the structural similarity of videos", "diffusion"):
        from scipy.ndimage import gaussian_filter

    def blur(x: Any) -> Any:
        return gaussian_filter(x, sigma=(0, 1.5, 1.5, 0), truncate=3.4)

    x, y = a.double().numpy(), b.double().numpy()
    mx, my = blur(x), blur(y)
    vx, vy, covariance = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))))


def flickering(frames: Tensor) -> float:
    """VBench's temporal flickering, from 0 to 1, the higher the steadier; NaN of one frame."""
    if len(frames) < 2:
        return math.nan
    return 1 - float((frames[1:] - frames[:-1]).abs().mean())


def motion(frames: Tensor) -> float:
    """Share of pixels whose change from first to last frame can be seen, more than a tenth of the range in some channel."""
    return float(((frames[-1] - frames[0]).abs().amax(-1) > 0.1).float().mean())


def latent_errors(video: Video, baseline_video: Video) -> list[float]:
    """The relative L2 error of the transformer's input, step by step; the first step's is 0."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(video.latents, baseline_video.latents, strict=True)]


def held_out(sampling: Sampling, index: int) -> tuple[str, int]:
    """The prompt and the seed of a held-out sample: prompts from the last on (calibration uses the first), and seeds of its
    own."""
    return sampling.prompts[-1 - index % len(sampling.prompts)], SEEDS + index


def make_videos(
    pipeline: Any, folder: Path, count: int, baseline: Any = None, progress: NamedAdvance | None = None
) -> tuple[list[Video], list[Video]]:
    """The samples of both models for ``count`` prompts and seeds of the folder's sampling.json; none of a missing baseline."""
    sampling: Sampling = sampling_of(folder, None, {})
    videos, baseline_videos = list[Video](), list[Video]()
    for i in range(count):
        prompt, seed = held_out(sampling, i)
        videos.append(make_video(pipeline, prompt, sampling.call, seed))
        if baseline is not None:
            baseline_videos.append(make_video(baseline, prompt, sampling.call, seed))
        if progress is not None:
            progress("videos", i + 1, count)
    return videos, baseline_videos


def sample_figures(videos: list[Video], baseline_videos: list[Video]) -> dict[str, Any]:
    """The figures of samples, [mean, low, high] with 95 % intervals over them. baseline_videos: the baseline's, by the same
    prompts and seeds, or none.

    Figures: videos, frames, seconds (median), nonfinite, flickering, motion; with a controller width, skipped and
    ``figures_by_step``; with a baseline baseline_seconds, psnr, ssim, latent_error (at the last step), latent_errors (mean by
    step), flickering_change and motion_change; and what ``recognition`` gives.
    """
    values: dict[str, Any] = {
        "videos": len(videos),
        "frames": len(videos[0].frames),
        "seconds": float(np.median([v.seconds for v in videos])),
        "nonfinite": sum(not bool(v.frames.isfinite().all()) for v in videos),
        "flickering": interval([flickering(v.frames) for v in videos]),
        "motion": interval([motion(v.frames) for v in videos]),
    }
    if not math.isnan(videos[0].width):
        values |= {"width": interval([v.width for v in videos]), "skipped": interval([v.skipped for v in videos])}
        values |= figures_by_step([v.log for v in videos])
    if baseline_videos:
        pairs_of_videos = list(zip(videos, baseline_videos, strict=True))
        errors = [latent_errors(a, b) for a, b in pairs_of_videos]
        values |= {
            "baseline_seconds": float(np.median([v.seconds for v in baseline_videos])),
            "psnr": interval([psnr(a.frames, b.frames) for a, b in pairs_of_videos]),
            "ssim": interval([ssim(a.frames, b.frames) for a, b in pairs_of_videos]),
            "latent_error": interval([e[-1] for e in errors]),
            "latent_errors": [round(float(x), 6) for x in np.mean(errors, 0)],
            "flickering_change": interval([flickering(a.frames) - flickering(b.frames) for a, b in pairs_of_videos]),
            "motion_change": interval([motion(a.frames) - motion(b.frames) for a, b in pairs_of_videos]),
        }
    return values | recognition(videos, baseline_videos)


def figures_by_step(logs: list[tuple[StepChoice, ...]]) -> dict[str, list[list[float | None]]]:
    """The decisions by block and step: {"bits": mean bits of inputs, None where nothing was computed, "skips": share of
    skipped runs}."""
    blocks, steps = (1 + max(getattr(c, field) for log in logs for c in log) for field in ("block", "step"))
    widths: dict[tuple[int, int], list[int]] = {}
    runs: dict[tuple[int, int], dict[tuple[int, int], bool]] = {}
    for number, log in enumerate(logs):
        for c in log:
            cell = (c.block, c.step)
            if not c.linear:
                runs.setdefault(cell, {})[number, c.branch] = c.choice == SKIPPED
            else:
                widths.setdefault(cell, []).append(BITS[c.choice])

    def table(cell_value: Callable[[tuple[int, int]], float | None]) -> list[list[float | None]]:
        return [[cell_value((b, s)) for s in range(steps)] for b in range(blocks)]

    def share(cell: tuple[int, int]) -> float | None:
        skips = runs.get(cell)
        return None if not skips else round(sum(skips.values()) / len(skips), 4)

    return {
        "bits": table(lambda cell: round(mean_width(widths[cell]), 4) if cell in widths else None),
        "skips": table(share),
    }


def recognition(videos: list[Video], baseline_videos: list[Video]) -> dict[str, Any]:
    """The share of samples whose shape, colour and motion the classifier recognises, where prompts are those of drawn clips
    and its weights are there; in percent, and with a baseline the Frechet distance between its features of both; else
    nothing."""
    if find_spec("qkit_data") is None:
        return {}
    from qkit_data import clip_classifier

    labels = [clip_classifier.labels_of(v.prompt) for v in videos]
    valid_labels = [x for x in labels if x is not None]
    if (
        not clip_classifier.FILE.is_file()
        or len(valid_labels) < len(videos)
        or not clip_classifier.fits(torch.stack([v.frames for v in videos[:1]]))
    ):
        return {}
    network = clip_classifier.load_classifier()
    features, right = clip_classifier.recognised(network, torch.stack([v.frames for v in videos]), valid_labels)
    shares: dict[str, Any] = {"recognised": interval((100.0 * right.all(1)).tolist())}
    if baseline_videos:
        before, expected = clip_classifier.recognised(
            network, torch.stack([v.frames for v in baseline_videos]), valid_labels
        )
        change = 100.0 * (right.all(1).double() - expected.all(1).double())
        shares["baseline_recognised"] = interval((100.0 * expected.all(1)).tolist())
        shares["recognised_change"] = interval(change.tolist())
        if len(videos) > 1:
            shares["feature_distance"] = round(frechet(features.double(), before.double()), 6)
    return shares


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance between normal distributions fitted to features [n, d] and [m, d] (as in FID, Heusel et al.
    2017)."""
    covariance_a, covariance_b = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    # The trace of the root of a product of covariances is the sum of the roots of its eigenvalues.
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariance_a @ covariance_b).real, 0, None)).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots)


def interval(values: list[float]) -> list[float]:
    """The mean with its 95 % bootstrap interval, [mean, low, high]; the ends are NaN of one value."""
    mean_interval = bootstrap_ci(torch.tensor(values, dtype=torch.float64))
    return [round(mean_interval.mean, 6), *(round(x, 6) for x in mean_interval.ends)]
