"""The input width of each linear of a diffusion transformer, the same at all steps: MixDQ (arXiv 2405.17873, sections 3.3
and 3.4).

Linears that shape the content of a sample (feed-forward, cross-attention) are scored by SSIM of the sample's frames, all
others by SQNR of the transformer's outputs for the same inputs. The two scores are never put on one scale: each group is
solved by itself, for several ways to share the budget out between them, and of the resulting configurations the one is used
whose samples are nearest to those of inputs as they are.

Ours: widths are 4 (NVFP4) and 8 (INT8), both measured; PROMPTS for the scores and PICKED for the pick (MixDQ: 32, and one);
every linear counts the same in the mean width, as in the log of a run, so that MixDQ's integer program is solved by
sorting.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from qkit.diffusion.controller import Controller, RuleController
from qkit.diffusion.policy import BITS, NARROW, PURE, WIDE
from qkit.evaluation.video import make_video, ssim
from qkit.files.folder import DENOISER
from qkit.system.progress import Progress

PROMPTS, PICKED = 2, 4
SPLITS = 10  # ratios of the mean widths of both groups, from 0.46 to 1.36: MixDQ's
RATIOS = (0.46, 1.36)
EVERY = 4  # calls of the transformer of which one is kept for its outputs
_CONTENT = ("ff", "attn2")  # how a part of the name of a linear begins


def is_content(name: str) -> bool:
    """Whether samples decide the width of a linear, and not the noise in outputs."""
    return any(part.startswith(_CONTENT) for part in name.split("."))


def allocate(
    pipeline: Any,
    controller: RuleController,
    linears: Sequence[str],
    samples: Sequence[tuple[str, int]],
    call: dict[str, Any],
    width: float,
    progress: Progress,
) -> dict[str, str]:
    """The input width of every linear, NARROW or WIDE, at most ``width`` bits on average.

    pipeline: packed, with ``controller`` attached; samples: (prompt, seed), PICKED or more of them
    """
    model = getattr(pipeline, DENOISER)
    calls: list[dict[str, Any]] = []
    signature, numbers = inspect.signature(model.forward), count()

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if next(numbers) % EVERY == 0:
            calls.append(dict(signature.bind(*args, **kwargs).arguments))

    def use_widths(widths: Mapping[str, str]) -> None:
        controller.rule = lambda step, block, linear: widths.get(linear, PURE)

    use_widths({})
    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        true = [make_video(pipeline, prompt, call, seed).frames for prompt, seed in samples[:PROMPTS]]
    finally:
        handle.remove()
    outputs = [_output(model, controller, c) for c in calls]
    progress.start("score inputs of linears", 2 * len(linears))
    scores: dict[str, dict[str, float]] = {}
    for name in linears:
        scores[name] = {}
        for choice in (NARROW, WIDE):
            use_widths({name: choice})
            if is_content(name):
                videos = [make_video(pipeline, p, call, s).frames for p, s in samples[:PROMPTS]]
                scores[name][choice] = sum(map(ssim, videos, true)) / len(true)
            else:
                scores[name][choice] = sqnr([_output(model, controller, c) for c in calls], outputs)
            progress.step()
    configurations = splits(scores, width)
    use_widths({})
    best = [make_video(pipeline, p, call, s).frames for p, s in samples[:PICKED]]

    def distance(widths: dict[str, str]) -> float:
        use_widths(widths)
        frames = [make_video(pipeline, p, call, s).frames for p, s in samples[:PICKED]]
        return sum(float((a - b).square().mean()) for a, b in zip(frames, best, strict=True))

    return min(configurations, key=distance)


def splits(scores: Mapping[str, Mapping[str, float]], width: float) -> list[dict[str, str]]:
    """The configurations of all shares of the budget, each the best of its share, without repetitions.

    scores: by linear and NARROW or WIDE, the higher the better
    """
    content = [n for n in scores if is_content(n)]
    other_linears = [n for n in scores if not is_content(n)]
    if not content or not other_linears:
        return [best_of(scores, list(scores), width)]
    share, configurations = len(content) / len(other_linears), list[dict[str, str]]()
    for i in range(SPLITS):
        ratio = RATIOS[0] + (RATIOS[1] - RATIOS[0]) * i / (SPLITS - 1)
        quality = width * (1 + share) / (ratio * share + 1)
        if all(BITS[NARROW] <= w <= BITS[WIDE] for w in (quality, ratio * quality)):
            configuration = best_of(scores, content, ratio * quality) | best_of(scores, other_linears, quality)
            if configuration not in configurations:
                configurations.append(configuration)
    return configurations or [best_of(scores, content, width) | best_of(scores, other_linears, width)]


def best_of(scores: Mapping[str, Mapping[str, float]], names: Sequence[str], width: float) -> dict[str, str]:
    """The choice for these linears with the highest sum of scores, at most ``width`` bits on average."""
    wide = int((width - BITS[NARROW]) * len(names) / (BITS[WIDE] - BITS[NARROW]) + 1e-9)
    gains = sorted(names, key=lambda n: scores[n][NARROW] - scores[n][WIDE])
    return {n: WIDE if n in gains[:wide] else NARROW for n in names}


def sqnr(outputs: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Signal to quantization noise over all tensors, dB, at most 100."""
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(outputs, true, strict=True))
    signal = sum(float(b.double().square().sum()) for b in true)
    return min(100.0, 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)))


def _output(model: Any, controller: Controller, call: dict[str, Any]) -> Tensor:
    controller.reset()
    with torch.inference_mode():
        out = model(**{**call, "return_dict": False})[0]
    result: Tensor = out.float()
    return result
