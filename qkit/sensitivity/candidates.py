"""The formats that a layer may get, by name, with what is kept beside their codes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qkit.errors import UsageError
from qkit.planning.recipe import MOST_SPARSE
from qkit.tensor.formats import GGUF_SCHEMES, SCHEMES, Scheme, did_you_mean, fit_gguf, scheme

KEEP = ("bf16", "fp16", "keep")  # names for leaving a unit in the checkpoint's dtype
GGUF = "gguf"  # the name for all types of GGUF that a budget chooses from by default
GGUF_TYPES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")


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
    items = [part.strip().lower() for part in text.split(",")]
    for item in (name for part in items for name in (GGUF_TYPES if part == GGUF else (part,))):
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
            names_known = [*(f"int{b}" for b in range(2, 9)), GGUF, *KEEP, *map(str.lower, (*SCHEMES, *GGUF_SCHEMES))]
            raise UsageError(
                f"{option}: unknown '{item}': expected int2 to int8, a scheme such as nvfp4 or w8a8, a type of GGUF such as "
                f"q4_k, gguf for all of those, or bf16 ('qkit list schemes' has all names){did_you_mean(item, names_known, 3)}"
            ) from e
        if group_size is not None and s.weights.regroups:
            s = Scheme(s.name, s.weights.with_group(group_size), s.activations)
        name = s.name + (f"+{outliers:g}%" if outliers else "") + (f"+r{rank}" if rank else "")
        candidates.append(Candidate(name, s, outliers, rank))
    names = [c.name for c in candidates]
    repeated = next((n for n in names if names.count(n) > 1), None)
    if repeated is not None:
        raise UsageError(f"{option} {text}: {repeated} is named twice")
    _check_kinds(candidates, group_size, option)
    return tuple(candidates)


def are_gguf(candidates: Sequence[Candidate]) -> bool:
    """Whether these are types of GGUF."""
    return any(c.scheme is not None and c.scheme.weights.gguf for c in candidates)


def for_widths(candidates: Sequence[Candidate], widths: Iterable[int]) -> tuple[Candidate, ...]:
    """The candidates with the types of GGUF that layers of these widths get: those whose blocks divide one, and for the others
    what llama.cpp takes in the place of a type. Candidates of other kinds as they are."""
    if not are_gguf(candidates):
        return tuple(candidates)
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.scheme is None:
            found[candidate.name] = candidate
            continue
        for fmt in (fit_gguf(candidate.scheme.weights, width) for width in sorted(widths, reverse=True)):
            if fmt is not None:
                found.setdefault(fmt.name.upper(), Candidate(fmt.name.upper(), scheme(fmt.name)))
    return tuple(found.values())


def _check_kinds(candidates: Sequence[Candidate], group_size: int | None, option: str) -> None:
    """Raises UsageError for types of GGUF beside others, or with what they do not have."""
    if not are_gguf(candidates):
        return
    other = next((c for c in candidates if c.scheme is not None and not c.scheme.weights.gguf), None)
    if other is not None:
        gguf = next(c for c in candidates if c.scheme is not None and c.scheme.weights.gguf)
        raise UsageError(
            f"{option}: {gguf.name} is a type of GGUF and {other.name} is not, and one file has one kind: leave one of them out"
        )
    beside = next((c for c in candidates if c.outliers or c.rank), None)
    if beside is not None:
        raise UsageError(
            f"{option}: {beside.name}: a GGUF file has no sparse and no low-rank parts: name the type alone"
        )
    if group_size is not None:
        raise UsageError(f"--group-size {group_size}: the types of GGUF have groups of their own: leave it out")


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
