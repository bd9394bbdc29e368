"""The influence of errors: the change of a run's final latents when inputs are NVFP4 at one step only, or in one block only.

A linear's error is relative to its own output, and does not show its effect on the result: steps of a sampler differ in length,
later steps correct earlier ones, and blocks add more or less to their inputs. 6Bit-Diffusion has one threshold for all;
weighting predicted errors by their influence is ours. It needs runs of the sampler for every step and block.

With D the squared distance of the latents at the end, and E the sum of squares of the errors of linears that are isolated,
the influence is sqrt(D / E); of a linear at a step it is taken to be the product of the step's and the block's, either
with mean 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qkit.diffusion.controller import RuleController
from qkit.diffusion.fitting import Observation
from qkit.diffusion.policy import NARROW, PURE
from qkit.diffusion.trajectory import sample

PROMPTS = 2  # runs for every step and every block


@dataclass(frozen=True)
class Influence:
    """Influence, with mean 1. by_time: (time, influence) of steps, times ascending; by_block: of the blocks."""

    by_time: tuple[tuple[float, float], ...]
    by_block: tuple[float, ...]


def influence_of(
    pipeline: Any,
    controller: RuleController,
    observations: Sequence[Observation],
    samples: Sequence[tuple[str, int]],
    call: dict[str, Any],
    step: Callable[[], object],
) -> Influence:
    """The influence of errors at every step and in every block.

    pipeline: packed, with ``controller`` attached; observations: errors of its linears
    samples:  (prompt, seed) of each run; call: arguments of the pipeline; step: called after each step and block
    """
    by_step, by_block, times = defaultdict[int, float](float), defaultdict[int, float](float), dict[int, float]()
    for s in observations:
        by_step[s.step] += s.error**2
        by_block[s.block] += s.error**2
        times[s.step] = s.time

    def ends(steps: tuple[int, ...], blocks: tuple[int, ...]) -> list[Tensor]:
        controller.rule = lambda step, block, linear: NARROW if step in steps or block in blocks else PURE
        latents = []
        for prompt, seed in samples[:PROMPTS]:
            controller.reset()
            latents.append(sample(pipeline, prompt, call, seed))
        return latents

    exact_ends = ends((), ())

    def worth(energy: float, latents: Iterable[Tensor]) -> float:
        distance = sum(float((a - b).double().square().sum()) for a, b in zip(latents, exact_ends, strict=True))
        step()
        return math.sqrt(distance / max(energy, 1e-30))

    of_steps = {s: worth(by_step[s], ends((s,), ())) for s in sorted(by_step)}
    of_blocks = [worth(by_block[b], ends((), (b,))) for b in range(1 + max(by_block))]
    mean = sum(of_steps.values()) / len(of_steps)
    return Influence(
        tuple(sorted((times[s], round(w / max(mean, 1e-30), 6)) for s, w in of_steps.items())),
        tuple(round(w * len(of_blocks) / max(sum(of_blocks), 1e-30), 6) for w in of_blocks),
    )
