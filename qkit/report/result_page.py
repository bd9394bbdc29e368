"""The page of finished results: what was measured of them, what they are, and how they were made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qkit.report.figures import heat_map, svg
from qkit.report.page import data_uri, page
from qkit.report.result_figures import Point, layer_map, position_plot, size_plot
from qkit.sensitivity.profile import Profile

Figures = Mapping[str, Any]
_WORD = re.compile(r"\s*\S+")


def result_page(
    facts: Sequence[Figures], measured: Sequence[Figures], tables: Sequence[Figures], notes: Sequence[str] = (),
    profile: Profile | None = None,
) -> str:  # fmt: skip
    """The page.

    facts: what ``result_facts`` gives of each folder; measured: entries of eval.json, of the same folders or none; tables: what
    the terminal shows of them, {"title", "columns", "rows"}; profile: of the original model
    """
    with_suite = [m for m in measured if "suite" in m]
    return page(
        "result",
        models=[f["model"] for f in facts],
        baseline=measured[0]["baseline"] if measured else None,
        tables=list(tables),
        notes=list(notes),
        size_figure=_size_figure(measured),
        position_figure=_position_figure(with_suite),
        examples=examples(with_suite),
        has_template=not with_suite or with_suite[0]["suite"]["chat"]["template"],
        results=[dict(f) | {"maps": _maps(f)} for f in facts],
        profile=None if profile is None else data_uri(svg(heat_map(profile, profile.measures[0]))),
    )


def _maps(facts: Figures) -> dict[str, str]:
    """{title: figure} of the layers of one result."""
    maps = {}
    if len(set(facts["bits"].values())) > 1:
        maps["Bits by layer"] = layer_map(facts["bits"], "bits of a code, scales not counted", False)
    if any(error > 0 for error in facts["errors"].values()):
        maps["Error by layer"] = layer_map(facts["errors"], "relative squared error", True)
    return {title: data_uri(svg(figure)) for title, figure in maps.items()}


def _size_figure(measured: Sequence[Figures]) -> str | None:
    """Perplexity and KL divergence of the first text, and that of chat answers, against the size of the weights."""
    paired = [m for m in measured if any("kl" in entry for entry in m.get("texts", {}).values())]
    if not paired:
        return None
    text = next(iter(paired[0]["texts"]))
    panels: dict[str, list[Point]] = {f"perplexity, {text}": [], f"KL, {text}": []}
    for m in paired:
        entry, x = m["texts"][text], m["size"]["bytes"] / 1e6
        ends = [entry["baseline_perplexity"] * (1 + end / 100) for end in entry["change_ci"] if end is not None]
        panels[f"perplexity, {text}"].append((m["model"], x, entry["perplexity"], _ends(ends)))
        panels[f"KL, {text}"].append((m["model"], x, entry["kl"]["mean"], _ends(entry["kl"]["ci"])))
        if "suite" in m:
            chat = m["suite"]["chat"]["kl"]
            panels.setdefault("KL, chat answers", []).append((m["model"], x, chat["mean"], _ends(chat["ci"])))
    baselines = {f"perplexity, {text}": paired[0]["texts"][text]["baseline_perplexity"]}
    return data_uri(svg(size_plot(panels, baselines, paired[0]["baseline"])))


def _ends(ends: Sequence[float | None]) -> tuple[float, float] | None:
    """The ends of an interval; None where one unit gave no spread, which JSON has as null."""
    found = [end for end in ends if end is not None and end == end]
    return (found[0], found[1]) if len(found) == 2 else None


def _position_figure(measured: Sequence[Figures]) -> str | None:
    lines = {
        m["model"]: [(bucket["to"], bucket["kl"]) for bucket in m["suite"]["long_context"]["buckets"]]
        for m in measured
        if m["suite"]["long_context"] is not None
    }
    return data_uri(svg(position_plot(lines))) if lines else None


def examples(measured: Sequence[Figures]) -> list[dict[str, Any]]:
    """Of each prompt {"prompt", "kind", "baseline", "answers": [{"model", "same": tokens, "before", "first", "after"}]}: the
    answer of each file, cut where it begins to differ; first: the word there, empty where nothing differs."""
    rows: list[dict[str, Any]] = []
    for place, asked in enumerate(measured[0]["suite"]["examples"] if measured else ()):
        answers = []
        for m in measured:
            example = m["suite"]["examples"][place]
            before, rest = example["said"][: example["same_letters"]], example["said"][example["same_letters"] :]
            word = _WORD.match(rest)
            first = word[0] if word else rest
            differs = example["said"] != example["baseline_said"]
            parts = {
                "before": before,
                "first": first or ("(ends here)" if differs else ""),
                "after": rest[len(first) :],
            }
            answers.append({"model": m["model"], "same": example["same"], **parts})
        rows.append(
            {"prompt": asked["prompt"], "kind": asked["kind"], "baseline": asked["baseline_said"], "answers": answers}
        )
    return rows
