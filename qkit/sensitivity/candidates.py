"""The formats that a layer may get, by name, with what is kept beside their codes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qkit.errors import UsageError
from qkit.planning.recipe import MOST_SPARSE
from qkit.tensor.formats import Scheme, did_you_mean, scheme

KEEP = ("bf16", "fp16", "keep")  # names for leaving a unit in the checkpoint's dtype


@dataclass(frozen=True)
class Candidate:
    """A format that units may get. scheme None: they stay as they are; outliers: percent kept in a sparse part; rank: of
    the low-rank part."""

    name: str
    scheme: Scheme | None
    outliers: float = 0.0
    rank: int = 0


def parse_candidates(text: str, group_size: int | None, option: str = "--candidates") -> tuple[Candidate, ...]:
    """The candidates of 'int4,int3+0.5%,int3+r16,nvfp4,bf16': schemes by name, intN for WNA16, bf16 for leaving a unit as
    it is.

    A percentage is that of the outliers of a sparse part, r16 a low-rank part of rank 16; group_size goes to the integer
    formats with groups; option: that the text was given to. Raises UsageError for unknown names and repetitions.
    """
    candidates: list[Candidate] = []
    for item in (part.strip().lower() for part in text.split(",")):
        if item in KEEP:
            candidates.append(Candidate("keep", None))
            continue
        base, *extras = item.split("+")
        outliers, rank = _parse_extras(extras, item, option)
        bits = base.removeprefix("int")
        name = f"W{bits}A16" if base.startswith("int") and bits.isdigit() else base
        try:
            s = scheme(name)
        except UsageError as e:
            names_known = [*(f"int{b}" for b in range(2, 9)), "nvfp4", "nvfp4a16", "mxfp4a16", "w8a8", *KEEP]
            raise UsageError(
                f"{option}: unknown '{item}'{did_you_mean(item, names_known)}: expected int2 to int8, a scheme such as nvfp4 "
                "or w8a8 ('qkit list schemes'), or bf16"
            ) from e
        if group_size is not None and s.weights.regroups:
            s = Scheme(s.name, s.weights.with_group(group_size), s.activations)
        name = s.name + (f"+{outliers:g}%" if outliers else "") + (f"+r{rank}" if rank else "")
        candidates.append(Candidate(name, s, outliers, rank))
    names = [c.name for c in candidates]
    repeated = next((n for n in names if names.count(n) > 1), None)
    if repeated is not None:
        raise UsageError(f"{option} {text}: {repeated} is named twice")
    return tuple(candidates)


def _parse_extras(parts: list[str], item: str, option: str) -> tuple[float, int]:
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
