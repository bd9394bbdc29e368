"""The original model as measures need it: weights, gradients of its loss, and what quantized units change in its logits.

``WholeOriginal`` has the model in memory and does whatever a measure asks for; ``chained_original.py`` has a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qkit.calibration.dataset import Calibration
from qkit.families.structure import ModelStructure
from qkit.files.offload import Chunks
from qkit.runtime import loading
from qkit.sensitivity.reference_model import ReferenceModel, Replacement
from qkit.sensitivity.units import Unit
from qkit.system.parallel import Workers

# A unit, and what makes its stand-ins, {linear: stand-in}: they are made when they are needed, and not kept.
Change = tuple[Unit, Callable[[], Mapping[str, Replacement]]]


class Original(Protocol):
    """The original model and the rows that losses are measured on."""

    @property
    def base_loss(self) -> float:
        """Its loss, in nats a scored token."""

    def weight(self, name: str) -> Tensor:
        """The weight of a linear or of an end, float32 [out, in]."""

    def gradients(self, names: Sequence[str], squares: bool = False) -> Iterator[dict[str, Tensor]]:
        """{linear: gradient of the mean loss, float32 [out, in]} of these linears, part after part of the model.

        squares: instead the mean over rows of the squared gradient of a row's mean loss, the diagonal of the empirical Fisher
        matrix
        """

    def changed(self, changes: Sequence[Change]) -> tuple[float, float]:
        """The loss with these units replaced, and the mean KL divergence from the original; in nats a scored token."""


@dataclass(frozen=True)
class WholeOriginal:
    """The original model in memory. reference: its log probabilities of the scored tokens of ``rows``, batch by batch"""

    model: ReferenceModel
    rows: Calibration
    reference: Chunks
    base_loss: float

    @staticmethod
    def load(structure: ModelStructure, rows: Calibration, folder: Path, pool: Workers) -> WholeOriginal:
        """The model in float32. folder: for log probabilities that are too large for memory"""
        model = ReferenceModel(loading.load_checkpoint(structure.checkpoint, torch.float32), structure, pool)
        reference = model.log_probs(rows, folder)
        return WholeOriginal(model, rows, reference, model.compare(rows, reference)[0])

    def weight(self, name: str) -> Tensor:
        """A view of the current weight."""
        return self.model.weight(name)

    def gradients(self, names: Sequence[str], squares: bool = False) -> Iterator[dict[str, Tensor]]:
        """All of them at once."""
        yield self.model.gradients(self.rows, list(names), squares)[1]

    def changed(self, changes: Sequence[Change]) -> tuple[float, float]:
        """See ``Original``."""
        with self.model.replaced({name: r for _, made in changes for name, r in made().items()}):
            return self.model.compare(self.rows, self.reference)
