"""Modality-balanced scales for vision-language models: errors at pieces of pictures weigh less than errors at answers.

MBQ (Li et al., arXiv 2412.19509): to first order the loss changes by at most |g_v| |Y_v - Yq_v| + |g_l| |Y_l - Yq_l|
(eqs. 8-13), with g the mean absolute gradient of the answers' loss at a module's outputs, over pieces of pictures (v)
and over answers (l). So the scale search (``scales.search``, with the candidates of AWQ) takes the mean absolute
error of answers plus r = g_v / g_l times that of pictures. r is measured at the output projection of attention, for
the linears of attention, and at the last linear of the MLP, for those of the MLP (so in the authors' code), or at each
linear for itself (so in the paper's text; the option ratios=linear); it is no less than the median of all blocks (in
the authors' code, not in the paper). Other text and padding weigh nothing.

Ours: errors are taken at the outputs of the group itself, as in our AWQ. Inputs are what the quantized blocks before give,
for outputs and for what they are compared with; the option inputs=original takes those of a model that is not
quantized (the paper's default), inputs=distort these for what outputs are to be, and those of the quantized blocks for
what they are made from (the paper's option of that name).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qkit.calibration.dataset import ANSWER, KINDS, VISION, Calibration
from qkit.errors import BadCalibration
from qkit.families.blocks import LinearGroup
from qkit.families.structure import ModelStructure
from qkit.tensor.formats import Scheme
from qkit.transforms.scales import Loss, awq_candidates, smooth_block
from qkit.transforms.state import BlockState
from qkit.transforms.table import RATIOS

PARTS = ("attention", "mlp")
# A need: for each block {part, or linear: how much an error at a piece of an image weighs beside one at an answer}.
MODALITY_WEIGHTS = "modality_weights"


def part_of(group: LinearGroup) -> str:
    """Of PARTS: where in the block the group is."""
    return PARTS[0] if "att" in group.hook else PARTS[1]


def mbq(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """AWQ of a block with absolute errors, balanced."""
    smooth_block(state, schemes, awq_candidates, balanced_error)


def mbq_mse(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """AWQ of a block with squared errors, balanced."""
    smooth_block(state, schemes, awq_candidates, partial(balanced_error, power=2))


def balanced_error(state: BlockState, group: LinearGroup, power: int = 1) -> Loss:
    """Mean of |error|^power over answers, plus r times that over pieces of pictures, by the tokens that the sample stands
    for."""
    stats = state.stats[group.key]
    if stats.kinds is None:  # a tower: all that it sees are pictures
        return lambda outputs, references: float(
            sum((o - x).abs().pow(power).sum().double() for o, x in zip(outputs, references, strict=True))
        )
    assert stats.sample_weight is not None
    balance = state.given[MODALITY_WEIGHTS]
    weights = []
    for name in group.declared.linears:
        counted = torch.zeros(len(KINDS))
        counted[VISION], counted[ANSWER] = balance.get(name) or balance[part_of(group)], 1.0
        weights.append(stats.sample_weight * counted[stats.kinds.long()])

    def loss(outputs: list[Tensor], references: list[Tensor]) -> float:
        each = [(o - x).abs().pow(power).sum(1) for o, x in zip(outputs, references, strict=True)]
        return float(sum((e * w).sum().double() for e, w in zip(each, weights, strict=True)))

    return loss


def gradients(
    model: Any,
    structure: ModelStructure,
    rows: Calibration,
    step: Callable[[], object] = lambda: None,
    each: str = RATIOS[0],
) -> list[dict[str, tuple[float, float]]]:
    """By block and part, (vision, answer): mean absolute gradient of the mean loss of answers at the part's output.

    model: loaded whole; rows: with kinds; each: of RATIOS; with "linear" by the linear's name in the block instead of by
    part. One forward and one backward pass for each row.
    Raises BadCalibration where there is no gradient at answers.
    """
    assert rows.inputs is not None and rows.kinds is not None
    places = {
        (i, name if each == "linear" else part_of(g)): f"{block.path}.{name}"
        for i, block in enumerate(structure.blocks)
        for g in block.groups
        for name in g.declared.linears
        if each == "linear" or len(g.declared.linears) == 1
    }
    sums = {key: [0.0, 0.0] for key in places}
    outputs: dict[tuple[int, str], Tensor] = {}

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (args[0] if args else kwargs["hidden_states"]).requires_grad_()

    def keep(key: tuple[int, str]) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs[key] = output

        return hook

    handles = [model.get_submodule(structure.blocks[0].path).register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_hook(keep(key)) for key, name in places.items()]
    try:
        for row, kinds in zip(rows.inputs, rows.kinds, strict=True):
            ids = row["input_ids"][0]
            kinds = kinds[: len(ids)]
            answers = (kinds == ANSWER).nonzero()[:, 0]
            logits = model(**row, use_cache=False).logits[0, answers - 1].float()
            functional.cross_entropy(logits, ids[answers]).backward()
            for key, output in outputs.items():
                assert output.grad is not None
                size = output.grad[0].abs().mean(1)
                for i, kind in enumerate((VISION, ANSWER)):
                    here = size[kinds == kind]
                    sums[key][i] += float(here.sum()) / max(1, len(here)) / len(rows.inputs)
            outputs.clear()
            step()
    finally:
        for handle in handles:
            handle.remove()
    if not all(answer for _, answer in sums.values()):
        raise BadCalibration(
            f"{rows.source}: answers of one token, whose predictions influence no other token: no gradient "
            "to balance errors at images with: use longer answers, or a chat template that ends them"
        )
    return [{key: (v, a) for (at, key), (v, a) in sums.items() if at == i} for i in range(len(structure.blocks))]


def ratios(found: list[dict[str, tuple[float, float]]]) -> list[dict[str, float]]:
    """By block and part (or linear): r, no less than the median of the part over all blocks."""
    raw = [{part: vision / answer for part, (vision, answer) in block.items()} for block in found]
    middle = {part: median(block[part] for block in raw if part in block) for part in {p for b in raw for p in b}}
    return [{part: max(r, middle[part]) for part, r in block.items()} for block in raw]
