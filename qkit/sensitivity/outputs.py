"""Output errors as their reader sees them: on the residual stream, the reader is the norm that comes next.

A linear that writes to the residual stream adds its error to something much larger than its own output, and the next norm
multiplies every channel by its gain. Our choice: with g the gains of that norm, r what it reads in the original model, and
x~ the linear's input as the candidate quantizes it,

  error = sum |(W~ x~ - W x) g|^2 / sum |r g|^2,     sums over sample tokens and channels.

The division of each token by its own norm is left out. Which linears write, and which norm reads next, is what families
declare: reads and writes of a block alternate there, in running order.

Of rows with images every token's terms have a weight in both sums: an answer's 1, a piece of an image's r^2, other text's
0, with r the gradient at images over that at answers, of the block and part that the linear is in (``balance.ratios``, with
their floor). MBQ (arXiv 2412.19509, eq. 8-13) bounds the loss change by sum g |e| over tokens, g the mean absolute gradient
of the token's kind, e the error of its output; what bounds the square of that sum, by Cauchy and Schwarz up to a factor
that all candidates share, is sum g^2 e^2. So squared errors take the square of the ratio, which is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear as product

from qkit.calibration.batches import InputRows, sample
from qkit.calibration.dataset import ANSWER, VISION
from qkit.families.structure import ModelStructure
from qkit.sensitivity.reference_model import ReferenceModel, Replacement
from qkit.sensitivity.units import Unit
from qkit.tensor.activations import quantize_activations
from qkit.transforms.balance import part_of

SAMPLE_TOKENS = 512  # our choice


def next_norms(structure: ModelStructure) -> dict[str, str]:
    """The norm that reads the residual stream after each linear that writes to it, {linear: path in the model}.

    After the last block that is the final norm. Empty for families that declare no stream.
    """
    family = structure.family
    stream = family.stream
    if stream is None:
        return {}
    norms = [norm for norm, _ in stream.reads]
    norm_paths: dict[str, str] = {}
    for i, block in enumerate(structure.blocks):
        for j, write in enumerate(stream.writes):
            if j + 1 < len(norms):
                path = f"{block.path}.{norms[j + 1]}"
            elif i + 1 < len(structure.blocks):
                path = f"{structure.blocks[i + 1].path}.{norms[0]}"
            else:
                path = family.final_norm
            norm_paths[structure.stored_name(f"{block.path}.{write}")] = path
    return norm_paths


def has_modules(unit: Unit) -> bool:
    """Whether inputs of the unit can be seen: fused experts are no modules, and embeddings have tokens for inputs."""
    return not unit.is_end and all(linear.expert is None for linear in unit.linears)


class OutputSample:
    """Inputs of linears and of norms in the original model, on tokens spread evenly over all rows.

    units: those with modules; ratios: of rows with images, by block and part, as ``balance.ratios`` gives them. Holds
    float32 [n, width] per unit and norm.
    """

    def __init__(
        self,
        model: ReferenceModel,
        units: Sequence[Unit],
        rows: InputRows,
        count: int = SAMPLE_TOKENS,
        ratios: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self._model, self._ratios, self._tokens = model, ratios, sample(rows, count)
        self._norms = next_norms(model.structure)
        paths = [model.path(u.linears[0].name) for u in units]  # all linears of such a unit read the same input
        norms = sorted({self._norms[x.name] for u in units for x in u.linears if x.name in self._norms})
        self._inputs = model.sample_inputs(rows, [*paths, *norms], count)

    def error(self, unit: Unit, replacements: Mapping[str, Replacement], weights_only: bool = False) -> float:
        """Relative squared output error with the replacements in place, mean over the unit's linears.

        Relative to the linear's own output (without its bias) where it does not write to the residual stream; with
        ``weights_only`` everywhere, and of the weights alone, activations left as they are.
        """
        weight = self._weight(unit)
        x = self._inputs[self._model.path(unit.linears[0].name)]
        errors = []
        for linear in unit.linears:
            r, w = replacements[linear.name], self._model.weight(linear.name)
            r = replace(r, activations=None) if weights_only else r
            y = product(x, w)
            quantized = x if r.activations is None else quantize_activations(x, r.activations, r.static)
            error = product(quantized, r.weight) - y
            norm = None if weights_only else self._norms.get(linear.name)
            if norm is None:
                errors.append(_energy(error, weight) / max(_energy(y, weight), 1e-30))
            else:
                gain = self._gain(norm)
                errors.append(_energy(error * gain, weight) / max(_energy(self._inputs[norm] * gain, weight), 1e-30))
        return sum(errors) / len(errors)

    def _weight(self, unit: Unit) -> Tensor | None:
        """Of every token in the sums of squares, float32 [n, 1]; None: all alike."""
        if self._tokens.kinds is None or self._tokens.sample_weight is None:
            return None
        r = self._ratios[unit.block][part_of(unit.groups[0])]
        of_kind = torch.zeros(max(VISION, ANSWER) + 1)
        of_kind[VISION], of_kind[ANSWER] = r**2, 1.0
        return (self._tokens.sample_weight * of_kind[self._tokens.kinds.long()])[:, None]

    def _gain(self, norm: str) -> Tensor:
        """What the norm multiplies each channel by, float32 [hidden]."""
        weight: Tensor = self._model.model.get_submodule(norm).weight
        return weight.detach().float() + self._model.structure.family.norm_offset


def _energy(t: Tensor, weight: Tensor | None) -> float:
    squares = t.square() if weight is None else t.square() * weight
    return float(squares.sum(dtype=torch.float64))
