"""What is decided about: units (linears that must agree on a format) and candidates (what they may become)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkit.blocks import LANGUAGE, Linear, LinearGroup
from qkit.errors import Unsupported, UsageError
from qkit.families.outline import Outline
from qkit.formats import Scheme, did_you_mean, fit_group, scheme
from qkit.preflight import holds_siglip
from qkit.recipe import MOST_SPARSE
from qkit.sizes import linear_bytes
from qkit.sparse import outlier_count

KEEP = ("bf16", "fp16", "keep")  # names for leaving a unit in the checkpoint's dtype


@dataclass(frozen=True)
class Candidate:
    """A scheme that units may get; scheme None: they stay as they are. outliers: percent kept in a sparse part; rank: of the
    low-rank part."""

    name: str
    scheme: Scheme | None
    outliers: float = 0.0
    rank: int = 0


@dataclass(frozen=True)
class Unit:
    """Linears of block ``block`` that engines load as one, or that share fused experts: they get one scheme.

    part: of the model, as ``Outline.sequences`` names it; place: of the block among all that a probe goes through
    """

    key: str
    block: int
    groups: tuple[LinearGroup, ...]
    part: str
    place: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for g in self.groups for linear in g.linears)

    @property
    def weights(self) -> int:
        """How many weights."""
        return sum(x.shape[0] * x.shape[1] for x in self.linears)


def parse_candidates(text: str, group_size: int | None, option: str = "--candidates") -> tuple[Candidate, ...]:
    """'int4,int3+0.5%,int3+r16,nvfp4,bf16' -> candidates: schemes by name, intN for WNA16, bf16 for leaving a unit as it is.

    A percentage is that of the outliers of a sparse part, r16 a low-rank part of rank 16; group_size goes to the integer
    formats with groups; option: that the text was given to. Raises UsageError for unknown names and repetitions.
    """
    found: list[Candidate] = []
    for item in (part.strip().lower() for part in text.split(",")):
        if item in KEEP:
            found.append(Candidate("keep", None))
            continue
        plain, *beside = item.split("+")
        outliers, rank = _beside(beside, item, option)
        bits = plain.removeprefix("int")
        name = f"W{bits}A16" if plain.startswith("int") and bits.isdigit() else plain
        try:
            s = scheme(name)
        except UsageError as e:
            known = [*(f"int{b}" for b in range(2, 9)), "nvfp4", "nvfp4a16", "mxfp4a16", "w8a8", *KEEP]
            raise UsageError(
                f"{option}: unknown '{item}'{did_you_mean(item, known)}: expected int2 to int8, a scheme such as nvfp4 or w8a8 "
                "('qkit list schemes'), or bf16"
            ) from e
        if group_size is not None and s.weights.regroups:
            s = Scheme(s.name, s.weights.with_group(group_size), s.activations)
        name = s.name + (f"+{outliers:g}%" if outliers else "") + (f"+r{rank}" if rank else "")
        found.append(Candidate(name, s, outliers, rank))
    names = [c.name for c in found]
    repeated = next((n for n in names if names.count(n) > 1), None)
    if repeated is not None:
        raise UsageError(f"{option} {text}: {repeated} is named twice")
    return tuple(found)


def _beside(parts: list[str], item: str, option: str) -> tuple[float, int]:
    """(percent of outliers, rank) of what stands behind a scheme; at most one of each."""
    outliers, rank = 0.0, 0
    for part in parts:
        if re.fullmatch(r"r[1-9][0-9]{0,5}", part) and not rank:
            rank = int(part[1:])
            continue
        share = re.fullmatch(r"([0-9]*\.?[0-9]+)%?", part)
        value = float(share[1]) if share and not outliers else 0.0
        if not 0 < value <= MOST_SPARSE:
            raise UsageError(
                f"{option}: '{item}': expected a percentage of outliers above 0 and up to {MOST_SPARSE:g}, as in int3+0.5%, "
                "or a rank, as in int3+r16"
            )
        outliers = value
    return outliers, rank


def parts_of(outline: Outline, pictures: bool) -> tuple[str, ...]:
    """The parts of the model that a profile is of: the language model, and with rows of pictures what is before it, but for a
    SigLIP tower, which transformers cannot load packed."""
    config = outline.checkpoint.config
    names = {s.name: [x.name for b in s.blocks for x in b.linears] for s in outline.towers if pictures}
    return (*(part for part, linears in names.items() if not holds_siglip(config, linears)), LANGUAGE)


def parts_named(request: Mapping[str, Any]) -> Sequence[str]:
    """The same of a profile that was made, by what it says of itself."""
    found: Sequence[str] = request.get("parts", (LANGUAGE,))
    return found


def units_of(outline: Outline, parts: Sequence[str] = (LANGUAGE,)) -> tuple[Unit, ...]:
    """All units of these parts in running order. The experts of a block are one: engines run them as one product."""
    units: list[Unit] = []
    blocks = [(s.name, block) for s in outline.sequences if s.name in parts for block in s.blocks]
    for place, (part, block) in enumerate(blocks):
        for groups in block.units:
            units.append(Unit(groups[0].key, block.index, groups, part, place))
    return tuple(units)


def unit_bytes(unit: Unit, candidate: Candidate, outline: Outline) -> int | None:
    """Bytes of the unit's weights as that candidate stores them, scales included; None where it does not apply."""
    if candidate.scheme is None:
        return sum(outline.checkpoint.tensors[f"{x.name}.weight"].nbytes for x in unit.linears)
    try:
        weights = fit_group(candidate.scheme.weights, *(x.shape[1] for x in unit.linears))
    except Unsupported:
        return None
    total = 0
    for linear in unit.linears:
        kept = outlier_count(candidate.outliers, linear.shape)
        total += linear_bytes(weights, candidate.scheme.activations, linear.shape, outline.dtype, kept, candidate.rank)
    return total
