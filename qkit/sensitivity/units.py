"""The units of a decision: linears that must agree on a format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.errors import Unsupported, UsageError
from qkit.families.blocks import LANGUAGE, Group, Linear, LinearGroup
from qkit.families.ends import EMBEDDINGS, HEAD, ends_of
from qkit.families.structure import ModelStructure
from qkit.planning.deciding import split_width
from qkit.planning.recipe import AUTO, parse_end
from qkit.planning.sizes import linear_bytes
from qkit.sensitivity.candidates import Candidate
from qkit.tensor.formats import Format, fit_group
from qkit.tensor.sparse import outlier_count
from qkit.verification.engines import holds_siglip


@dataclass(frozen=True)
class Unit:
    """Linears of block ``block`` that engines load as one, or that share fused experts: they get one scheme.

    part: of the model, as ``ModelStructure.sequences`` names it; place: of the block among all that a probe goes through.
    The embeddings and the output head are units of their own parts, EMBEDDINGS and HEAD (tied ones: EMBEDDINGS), in no block.
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
    def is_end(self) -> bool:
        """Whether it is the embeddings or the output head."""
        return self.part in (EMBEDDINGS, HEAD)

    @property
    def weights(self) -> int:
        """The number of weights."""
        return sum(x.shape[0] * x.shape[1] for x in self.linears)


def parts_of(structure: ModelStructure, images: bool, ends: Sequence[str] = ()) -> tuple[str, ...]:
    """The parts of the model that a profile covers: the language model, ``ends`` where they are asked for and, with images,
    the towers before it, but for a SigLIP tower, which transformers cannot load packed."""
    config = structure.checkpoint.config
    names = {s.name: [x.name for b in s.blocks for x in b.linears] for s in structure.towers if images}
    return (*(part for part, linears in names.items() if not holds_siglip(config, linears)), LANGUAGE, *ends)


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
    return (*units, *_end_units(structure, [p for p in parts if p in (EMBEDDINGS, HEAD)]))


def _end_units(structure: ModelStructure, parts: Sequence[str]) -> Iterator[Unit]:
    """Units of the embeddings and the head; tied ones are one, whichever was asked for. Raises UsageError for a head that
    there is not, Unsupported as ``ends_of``."""
    if not parts:
        return
    ends = ends_of(structure, " and ".join(f"--{part}" for part in parts))
    if HEAD in parts and ends.head is None:
        raise UsageError(f"--{HEAD} {AUTO}: this model has no output head with a matrix of its own: leave it out")
    wanted = {EMBEDDINGS: ends.embeddings} if ends.tied else {EMBEDDINGS: ends.embeddings, HEAD: ends.head}
    for part, end in wanted.items():
        if end is not None and (ends.tied or part in parts):
            linear = Linear(name=end.name, param=f"{end.path}.weight", shape=end.shape)
            yield Unit(end.name, -1, (LinearGroup((linear,), Group(()), end.path),), part, -1)


def end_format(candidate: Candidate, width: int) -> Format | None:
    """The format of an end of a model under a candidate; None where the candidate is none for it: only integers without zero
    points and with nothing beside them are."""
    s = candidate.scheme
    plain = s is not None and s.activations is None and s.weights.kind == "int" and s.weights.symmetric
    if s is None or not plain or candidate.outliers or candidate.rank:
        return None
    return fit_group(parse_end(f"int{s.weights.bits}", EMBEDDINGS).weights, width)


def unit_format(unit: Unit, candidate: Candidate, ranks: int = 1) -> Format:
    """The weight format of all linears of a unit under a candidate. ranks: GPUs that share each of them. Raises Unsupported."""
    assert candidate.scheme is not None
    return fit_group(candidate.scheme.weights, *(split_width(x, ranks) for x in unit.linears))


def unit_bytes(unit: Unit, candidate: Candidate, structure: ModelStructure, ranks: int = 1) -> int | None:
    """Bytes of the unit's weights as that candidate stores them, scales included; None where it does not apply. ranks: GPUs
    that share each of them"""
    if unit.is_end and candidate.scheme is not None:
        (end,) = unit.linears
        fmt = end_format(candidate, end.shape[1])
        return None if fmt is None else linear_bytes(fmt, None, end.shape, structure.dtype)
    if candidate.scheme is None:
        return sum(structure.checkpoint.tensors[f"{x.name}.weight"].nbytes for x in unit.linears)
    try:
        weights = unit_format(unit, candidate, ranks)
    except Unsupported:
        return None
    total = 0
    for linear in unit.linears:
        sparse_count = outlier_count(candidate.outliers, linear.shape)
        total += linear_bytes(
            weights, candidate.scheme.activations, linear.shape, structure.dtype, sparse_count, candidate.rank
        )
    return total
