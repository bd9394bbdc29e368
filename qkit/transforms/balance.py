"""Modality-balanced scales for vision-language models: errors at image tokens weigh less than errors at answer tokens.

MBQ (Li et al., arXiv 2412.19509): to first order the loss changes by at most |g_v| |Y_v - Yq_v| + |g_l| |Y_l - Yq_l|
(eqs. 8-13), with g the mean absolute gradient of the answers' loss at a module's outputs, over image tokens (v)
and over answer tokens (l). So the scale search (``scales.search``, with the candidates of AWQ) minimizes the mean absolute
error at answers plus r = g_v / g_l times that at images. r is measured at the output projection of attention, for
the linears of attention, and at the last linear of the MLP, for those of the MLP (so in the authors' code), or at each
linear (so in the paper's text; the option ratios=linear); it is no less than the median of all blocks (in
the authors' code, not in the paper). Other text and padding weigh nothing.

Our choices: errors are measured at the outputs of the group itself, as in our AWQ. Inputs come from the quantized blocks
before, for outputs and for reference outputs. The option inputs=original uses inputs of the original model for both (the
paper's default); inputs=distort uses those for the reference outputs only (the paper's option of that name).
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
    """The part of the block that has the group, one of PARTS."""
    return PARTS[0] if "att" in group.hook else PARTS[1]


def mbq(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """Apply AWQ with balanced absolute errors to a block."""
    smooth_block(state, schemes, awq_candidates, balanced_error)


def mbq_mse(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """Apply AWQ with balanced squared errors to a block."""
    smooth_block(state, schemes, awq_candidates, partial(balanced_error, power=2))


def balanced_error(state: BlockState, group: LinearGroup, power: int = 1) -> Loss:
    """A loss: |error|^power at answer tokens plus r times that at image tokens, weighted by ``Stats.sample_weight``."""
    stats = state.stats[group.key]
    if stats.kinds is None:  # a tower: all its tokens are image tokens
        return lambda outputs, references: float(
            sum((o - x).abs().pow(power).sum().double() for o, x in zip(outputs, references, strict=True))
        )
    assert stats.sample_weight is not None
    balance = state.original_values[MODALITY_WEIGHTS]
    weights = []
    for name in group.declared.linears:
        kind_weights = torch.zeros(len(KINDS), device=stats.kinds.device)
        kind_weights[VISION], kind_weights[ANSWER] = balance.get(name) or balance[part_of(group)], 1.0
        weights.append(stats.sample_weight * kind_weights[stats.kinds.long()])

    def loss(outputs: list[Tensor], references: list[Tensor]) -> float:
        token_errors = [(o - x).abs().pow(power).sum(1) for o, x in zip(outputs, references, strict=True)]
        return float(sum((e * w).sum().double() for e, w in zip(token_errors, weights, strict=True)))

    return loss


def gradients(
    model: Any,
    structure: ModelStructure,
    rows: Calibration,
    step: Callable[[], object] = lambda: None,
    ratios_by: str = RATIOS[0],
) -> list[dict[str, tuple[float, float]]]:
    """For each block, {part: (vision, answer)}: mean absolute gradients of the answer loss at the part's output.

    model: the complete model; rows: with kinds; ratios_by: of RATIOS; "linear" gives {linear name in the block: ...} instead.
    Runs one forward and one backward pass for each row. Raises BadCalibration where answers have no gradient.
    """
    assert rows.inputs is not None and rows.kinds is not None
    module_paths = {
        (i, name if ratios_by == "linear" else part_of(g)): f"{block.path}.{name}"
        for i, block in enumerate(structure.blocks)
        for g in block.groups
        for name in g.declared.linears
        if ratios_by == "linear" or len(g.declared.linears) == 1
    }
    sums = {key: [0.0, 0.0] for key in module_paths}
    outputs: dict[tuple[int, str], Tensor] = {}

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (args[0] if args else kwargs["hidden_states"]).requires_grad_()

    def keep(key: tuple[int, str]) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs[key] = output

        return hook

    handles = [model.get_submodule(structure.blocks[0].path).register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [model.get_submodule(name).register_forward_hook(keep(key)) for key, name in module_paths.items()]
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
                    magnitudes = size[kinds == kind]
                    sums[key][i] += float(magnitudes.sum()) / max(1, len(magnitudes)) / len(rows.inputs)
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


def ratios(gradients_by_block: list[dict[str, tuple[float, float]]]) -> list[dict[str, float]]:
    """For each block, {part or linear: r}; r is at least the median of the part over all blocks."""
    raw = [{part: vision / answer for part, (vision, answer) in block.items()} for block in gradients_by_block]
    middle = {part: median(block[part] for block in raw if part in block) for part in {p for b in raw for p in b}}
    return [{part: max(r, middle[part]) for part, r in block.items()} for block in raw]
