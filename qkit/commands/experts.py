"""What commands ask and say of routed experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from qkit.files.record import packed_record

_Command = TypeVar("_Command", bound=Callable[..., Any])
_EXPERT = re.compile(r"expert.*\.\d+\.\w+$")


def expert_options(scheme: Callable[..., Any], calibration: Callable[..., Any]) -> Callable[[_Command], _Command]:
    """The options about routed experts. scheme, calibration: ``in_group`` of their groups."""
    options = [
        calibration(
            "--calibrate-all-experts",
            is_flag=True,
            help="Measure every routed expert on all tokens, and not only on those that the router sends to it.",
        ),
        calibration(
            "--expert-share",
            type=float,
            metavar="SHARE",
            help="Share of all tokens on which every routed expert is measured, beside those that the router sends to it (0.1: "
            "every tenth token).",
        ),
        scheme(
            "--prune-experts",
            type=float,
            metavar="SHARE",
            help="Share of the routed experts of each block to leave out, those that contribute least (0.25: a quarter).",
        ),
    ]

    def add(command: _Command) -> _Command:
        for decorate in reversed(options):
            command = decorate(command)
        return command

    return add


def left_out(out: Path) -> Iterator[str]:
    """The experts that a result leaves out, by block, with their scores."""
    record = packed_record(out).get("experts")
    if record is None:
        return
    for module, block in record["blocks"].items():
        kept, scores = block["kept"], block["scores"]
        lost = ", ".join(f"{e} ({scores[e]:.3g})" for e in range(record["before"]) if e not in kept)
        least = min(scores[e] for e in kept)
        yield f"{module}: left out {lost}; the lowest score of those that stay is {least:.3g}"


def tokens_seen(out: Path) -> Iterator[str]:
    """How many routed experts saw too few tokens to be measured, and how many the least and the most of them saw."""
    from qkit.engine.solving import FEW_TOKENS

    record = packed_record(out)
    tokens = {n: x["tokens"] for n, x in record["linears"].items() if _EXPERT.search(n) and x.get("tokens") is not None}
    if not tokens:
        return
    few, least, most = sum(t < FEW_TOKENS for t in tokens.values()), min(tokens.values()), max(tokens.values())
    line = f"routed experts: {least if least == most else f'{least} to {most}'} calibration tokens each"
    if few:
        line += (
            f"; {few} of {len(tokens)} linears saw fewer than {FEW_TOKENS} and were rounded to nearest (more samples, "
            "--expert-share 0.1 or --calibrate-all-experts measures them)"
        )
    yield line
