"""The units of a decision: linears that must agree on a format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkit.errors import Unsupported, UsageError
from qkit.families.blocks import LANGUAGE, Group, Linear, LinearGroup
from qkit.families.ends import EMBEDDINGS, HEAD, ends_of
from qkit.families.structure import ModelStructure
from qkit.planning.deciding import split_width
from qkit.planning.recipe import AUTO, parse_end
from qkit.planning.sizes import linear_bytes
from qkit.sensitivity.candidates import Candidate
from qkit.tensor.formats import COMMON_COLUMNS, Format, fit_group
from qkit.tensor.gguf_blocks import aligned
from qkit.tensor.sparse import outlier_count
from qkit.verification.engines import holds_siglip

_SCALE_BYTES = 128  # of a tensor of one number in a GGUF file, with its name and place, at most


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


def profiled_units(structure: ModelStructure, request: Mapping[str, Any]) -> tuple[Unit, ...]:
    """The units of a profile, from its request."""
    return units_of(structure, recorded_parts(request), bool(request.get("gguf")))


def units_of(structure: ModelStructure, parts: Sequence[str] = (LANGUAGE,), gguf: bool = False) -> tuple[Unit, ...]:
    """All units of these parts in running order. The experts of a block are one: engines run them as one product.

    gguf: each linear is a unit, since every tensor of a GGUF file has a type of its own; those that no type has are left out
    """
    units: list[Unit] = []
    blocks = [(s.name, block) for s in structure.sequences if s.name in parts for block in s.blocks]
    for place, (part, block) in enumerate(blocks):
        alone = [(replace(g, linears=(x,)),) for g in block.groups for x in g.linears]
        for groups in alone if gguf else block.units:
            units.append(Unit(groups[0].key, block.index, groups, part, place))
    units += _end_units(structure, [p for p in parts if p in (EMBEDDINGS, HEAD)])
    return tuple(u for u in units if not gguf or all(x.shape[1] % COMMON_COLUMNS == 0 for x in u.linears))


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


def unit_format(unit: Unit, candidate: Candidate, ranks: int = 1) -> Format | None:
    """The format of the unit's weights under a candidate that quantizes; None where it is none for this unit. ranks: GPUs that
    share each of its linears"""
    assert candidate.scheme is not None
    fmt, widths = candidate.scheme.weights, [x.shape[1] for x in unit.linears]
    if unit.is_end:
        return end_format(candidate, widths[0])
    if fmt.gguf:  # for other widths another type is a candidate
        return fmt if all(width % fmt.columns == 0 for width in widths) else None
    try:
        return fit_group(fmt, *(split_width(x, ranks) for x in unit.linears))
    except Unsupported:
        return None


def applies(unit: Unit, candidate: Candidate) -> bool:
    """Whether the unit can have that candidate."""
    return candidate.scheme is None or unit_format(unit, candidate) is not None


def end_format(candidate: Candidate, width: int) -> Format | None:
    """The format of an end of a model under a candidate; None where the candidate is none for it: only integers without zero
    points and with nothing beside them are, and types of GGUF."""
    s = candidate.scheme
    if s is not None and s.weights.gguf:
        return s.weights if s.weights.for_lookups and width % s.weights.columns == 0 else None
    plain = s is not None and s.activations is None and s.weights.kind == "int" and s.weights.symmetric
    if s is None or not plain or candidate.outliers or candidate.rank:
        return None
    return fit_group(parse_end(f"int{s.weights.bits}", EMBEDDINGS).weights, width)


def unit_bytes(unit: Unit, candidate: Candidate, structure: ModelStructure, ranks: int = 1) -> int | None:
    """Bytes of the unit's weights as that candidate stores them, scales included; None where it does not apply. ranks: GPUs
    that share each of them"""
    if candidate.scheme is None:
        return sum(structure.checkpoint.tensors[f"{x.name}.weight"].nbytes for x in unit.linears)
    weights = unit_format(unit, candidate, ranks)
    if weights is None:
        return None
    if weights.gguf:
        beside = _SCALE_BYTES if weights.scale == "e4m3" else 0
        return sum(aligned(linear_bytes(weights, None, x.shape, structure.dtype)) + beside for x in unit.linears)
    activations = None if unit.is_end else candidate.scheme.activations
    total = 0
    for linear in unit.linears:
        sparse_count = outlier_count(candidate.outliers, linear.shape)
        total += linear_bytes(weights, activations, linear.shape, structure.dtype, sparse_count, candidate.rank)
    return total
