"""The units of a decision: linears that must agree on a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.errors import Unsupported
from qkit.families.blocks import LANGUAGE, Linear, LinearGroup
from qkit.families.structure import ModelStructure
from qkit.planning.sizes import linear_bytes
from qkit.sensitivity.candidates import Candidate
from qkit.tensor.formats import fit_group
from qkit.tensor.sparse import outlier_count
from qkit.verification.engines import holds_siglip


@dataclass(frozen=True)
class Unit:
    """Linears of block ``block`` that engines load as one, or that share fused experts: they get one scheme.

    part: of the model, as ``ModelStructure.sequences`` names it; place: of the block among all that a probe goes through
    """

    key: str
    block: int
    groups: tuple[LinearGroup, ...]
    part: str
    place: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of all groups, in order."""
        return tuple(linear for g in self.groups for linear in g.linears)

    @property
    def weights(self) -> int:
        """The number of weights."""
        return sum(x.shape[0] * x.shape[1] for x in self.linears)


def parts_of(structure: ModelStructure, images: bool) -> tuple[str, ...]:
    """The parts of the model that a profile covers: the language model and, with images, the towers before it, but for a
    SigLIP tower, which transformers cannot load packed."""
    config = structure.checkpoint.config
    names = {s.name: [x.name for b in s.blocks for x in b.linears] for s in structure.towers if images}
    return (*(part for part, linears in names.items() if not holds_siglip(config, linears)), LANGUAGE)


def recorded_parts(request: Mapping[str, Any]) -> Sequence[str]:
    """The parts that an existing profile covers, from its request."""
    parts: Sequence[str] = request.get("parts", (LANGUAGE,))
    return parts


def units_of(structure: ModelStructure, parts: Sequence[str] = (LANGUAGE,)) -> tuple[Unit, ...]:
    """All units of these parts in running order. The experts of a block are one: engines run them as one product."""
    units: list[Unit] = []
    blocks = [(s.name, block) for s in structure.sequences if s.name in parts for block in s.blocks]
    for place, (part, block) in enumerate(blocks):
        for groups in block.units:
            units.append(Unit(groups[0].key, block.index, groups, part, place))
    return tuple(units)


def unit_bytes(unit: Unit, candidate: Candidate, structure: ModelStructure) -> int | None:
    """Bytes of the unit's weights as that candidate stores them, scales included; None where it does not apply."""
    if candidate.scheme is None:
        return sum(structure.checkpoint.tensors[f"{x.name}.weight"].nbytes for x in unit.linears)
    try:
        weights = fit_group(candidate.scheme.weights, *(x.shape[1] for x in unit.linears))
    except Unsupported:
        return None
    total = 0
    for linear in unit.linears:
        sparse_count = outlier_count(candidate.outliers, linear.shape)
        total += linear_bytes(
            weights, candidate.scheme.activations, linear.shape, structure.dtype, sparse_count, candidate.rank
        )
    return total
