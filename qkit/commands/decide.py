"""What is said of a request before it is planned, and what had to be measured first: shared by quantize and plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qkit.commands.budget import show_allocation
from qkit.commands.cache import show_cache
from qkit.commands.common import Reporter, command_line
from qkit.workflows.options import QuantizeOptions
from qkit.workflows.resolve import ResolvedRequest, look_ahead, measure_first


def resolve_request(options: QuantizeOptions, out: Path, work: Path | None, console: Console) -> ResolvedRequest:
    """The request of a command, with what has to be measured first; says so, and what was decided."""
    look = look_ahead(options)
    show_ahead(look.decided, "measured first", console)
    reporter = Reporter(console, command_line())
    with reporter.running():
        return measure_first(look, options, out, work, reporter, lambda sentence: console.print(Text(sentence)))


def show_ahead(found: ResolvedRequest, when: str, console: Console) -> None:
    """What was decided without asking, whether a budget can be met, and what is measured. when: the words before it."""
    for sentence in (*found.said, *([] if found.reach is None else [str(found.reach)])):
        console.print(Text(sentence))
    for each in found.first:
        console.print(Text(f"{when}: {each}"))


def show_decided(found: ResolvedRequest, console: Console) -> None:
    """The allocation and the cache, where there are any."""
    if found.budgeted is not None:
        show_allocation(found.budgeted, console)
    if found.cache is not None:
        show_cache(found.cache, console)


def decided_json(found: ResolvedRequest) -> dict[str, Any]:
    """The machine's copy of ``show_decided`` and ``show_ahead``."""
    data: dict[str, Any] = {}
    if found.budgeted is not None:
        data["allocation"] = asdict(found.budgeted.allocation)
    if found.cache is not None:
        data["kv"] = {"policy": found.cache.policy.to_json(), "bytes": found.cache.bytes}
    if found.reach is not None:
        data["budget"] = asdict(found.reach)
    if found.first:
        data["measured_first"] = [asdict(each) for each in found.first]
    return data
