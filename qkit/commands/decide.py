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


def show_ahead(resolved: ResolvedRequest, when: str, console: Console) -> None:
    """What was decided without asking, whether a budget can be met, and what is measured. when: the words before it."""
    for sentence in (*resolved.said, *([] if resolved.reach is None else [str(resolved.reach)])):
        console.print(Text(sentence))
    for each in resolved.first:
        console.print(Text(f"{when}: {each}"))


def show_decided(resolved: ResolvedRequest, console: Console) -> None:
    """The allocation, the cache and the method, where they were decided."""
    if resolved.budgeted is not None:
        show_allocation(resolved.budgeted, console)
    if resolved.cache is not None:
        show_cache(resolved.cache, console)
    for sentence in () if resolved.quality is None else resolved.quality.sentences():
        console.print(Text(sentence))


def decided_json(resolved: ResolvedRequest) -> dict[str, Any]:
    """The machine's copy of ``show_decided`` and ``show_ahead``."""
    data: dict[str, Any] = {}
    if resolved.budgeted is not None:
        data["allocation"] = asdict(resolved.budgeted.allocation)
    if resolved.cache is not None:
        data["kv"] = {"policy": resolved.cache.policy.to_json(), "bytes": resolved.cache.bytes}
    if resolved.quality is not None:
        data["quality"] = resolved.quality.to_json()
    if resolved.reach is not None:
        data["budget"] = asdict(resolved.reach)
    if resolved.first:
        data["measured_first"] = [asdict(each) for each in resolved.first]
    return data
