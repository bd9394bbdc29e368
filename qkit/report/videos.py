"""The page of samples of a diffusion pipeline: frames beside the original's, errors along the trajectory, and the decisions
at every step in every block."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qkit.report.figures import FIGURES, png
from qkit.report.page import data_uri, page
from qkit.system.extras import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FRAMES, _WIDE = 9, 96  # of a strip: how many, and pixels of each


def strip(frames: Tensor) -> str:
    """The data address of an image of some frames [n, height, width, 3] from 0 to 1, side by side."""
    with needs("a page of videos", "report"):
        from PIL import Image

    chosen = sorted({round(i * (len(frames) - 1) / max(1, _FRAMES - 1)) for i in range(_FRAMES)})
    data = (frames[chosen].clamp(0, 1) * 255).round().byte().numpy()
    height = max(1, round(_WIDE * data.shape[1] / data.shape[2]))
    resample = Image.Resampling.NEAREST if data.shape[2] < _WIDE else Image.Resampling.LANCZOS
    canvas = Image.new("RGB", (len(data) * (_WIDE + 2) - 2, height), "white")
    for i, frame in enumerate(data):
        canvas.paste(Image.fromarray(frame).resize((_WIDE, height), resample), (i * (_WIDE + 2), 0))
    buffer = io.BytesIO()
    canvas.save(buffer, format="png")
    return data_uri(buffer.getvalue())


def strips(samples: Sequence[Any], baseline_samples: Sequence[Any]) -> list[dict[str, str]]:
    """The strips of the model's samples (``qkit.evaluation.video.Video``), and of a baseline's if there is one."""
    rows = [{"prompt": v.prompt, "ours": strip(v.frames), "theirs": ""} for v in samples]
    for entry, v in zip(rows, baseline_samples, strict=False):
        entry["theirs"] = strip(v.frames)
    return rows


def videos_page(measured: Mapping[str, Any], shown: Sequence[Mapping[str, str]]) -> str:
    """The page of measured["videos"] (of ``qkit.evaluation.measure``); shown: as ``strips`` gives them."""
    figures = measured["videos"]
    images = {}
    if "latent_errors" in figures:
        images["error of latents along the trajectory"] = error_curve(figures["latent_errors"])
    if "bits" in figures:
        widest = max(
            8.0, *(v for row in figures["bits"] for v in row if v is not None)
        )  # 16 where inputs stay as they are
        images["mean bits of inputs, by step and block"] = step_map(figures["bits"], "bits", 4, widest)
        images["share of runs that the cache saved"] = step_map(figures["skips"], "share", 0, 1)
    return page(
        "videos",
        model=measured["model"],
        baseline=measured["baseline"],
        rows=[
            (name.replace("_", " "), _format_figure(value)) for name, value in figures.items() if _format_figure(value)
        ],
        pictures={name: data_uri(png(figure)) for name, figure in images.items()},
        strips=shown,
    )


def _format_figure(value: Any) -> str:
    """A figure with its interval; nothing of lists by step."""
    if isinstance(value, (int, float)):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) == 3 and not isinstance(value[0], list):
        return f"{value[0]:.4g} [{value[1]:.4g}, {value[2]:.4g}]"
    return ""


def error_curve(errors: Sequence[float]) -> Figure:
    """The figure of the mean relative error of the transformer's input, step by step."""
    with FIGURES:
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(errors) + 1), errors, "o-", ms=3, color="C0")
    axes.set_xlabel("step")
    axes.set_ylabel("relative L2 error")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return figure


def step_map(rows: Sequence[Sequence[float | None]], label: str, low: float, high: float) -> Figure:
    """The figure with a colour for every (step, block); rows: by block, by step; None where nothing was computed."""
    import numpy as np

    with FIGURES:
        from matplotlib.figure import Figure

    cells = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
    figure = Figure(figsize=(1.6 + 0.24 * cells.shape[1], 1.3 + 0.2 * cells.shape[0]), layout="constrained")
    axes = figure.subplots()
    extent = (0.5, cells.shape[1] + 0.5, cells.shape[0] + 0.5, 0.5)  # steps and blocks count from 1
    image = axes.imshow(
        cells, aspect="auto", vmin=low, vmax=high, cmap="viridis", interpolation="nearest", extent=extent
    )
    axes.set_xlabel("step")
    axes.set_ylabel("block")
    figure.colorbar(image, label=label)
    return figure
