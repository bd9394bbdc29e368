"""Answers about pictures as one page: accuracy by kind of question, and pictures beside what the two models say."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from qkit.calibration.image_text import held_out_image_text
from qkit.report.figures import accuracy_bars, png
from qkit.report.page import data_uri, page

_WIDEST = 384  # pixels of a picture on the page, either way


def pairs_page(measured: Mapping[str, Any], name: str, spec: str, count: int) -> str:
    """The page of measured["pairs"][name] (of ``qkit.evaluation.measure``), whose questions, at most ``count``, are those of
    ``spec``."""
    figures = measured["pairs"][name]
    model, baseline = measured["model"], measured["baseline"]
    examples = {e["index"]: e for e in figures["examples"]}
    for index, pair in enumerate(held_out_image_text(spec, count)):
        if index in examples:
            pictures = [data_uri(_picture(image)) for image in pair.images]
            examples[index] = {**examples[index], "pictures": pictures}
    return page(
        "pairs",
        model=model,
        baseline=baseline,
        summary=_summary(figures),
        bars=data_uri(png(accuracy_bars(figures, model, baseline))) if figures["kinds"] else None,
        examples=[_row(e, baseline is not None) for e in examples.values()],
    )


def _row(example: Mapping[str, Any], paired: bool) -> dict[str, Any]:
    """said: the right answer, what the original says where there is one, what the model says."""
    said = [example["answer"], *([example["baseline_said"]] if paired else []), example["said"]]
    return {**example, "said": said}


def _picture(image: Any) -> bytes:
    """A PNG file of a picture, no larger than the page needs."""
    small = image.copy()
    small.thumbnail((_WIDEST, _WIDEST))
    buffer = io.BytesIO()
    small.save(buffer, format="png")
    return buffer.getvalue()


def _summary(figures: Mapping[str, Any]) -> dict[str, str]:
    right = figures["accuracy"]
    found = {
        "questions": f"{figures['questions']:,}, answers of {figures['tokens']:,} tokens",
        "exactly right": f"{right['percent']:.1f} % {_between(right['ci'], '.1f')}",
        "perplexity of answers": f"{figures['perplexity']:.4f} {_between(figures['ci'], '.4f')}",
    }
    if "kl" not in figures:
        return found
    change = f"{right['change']:+.1f} points {_between(right['change_ci'], '+.1f')}"
    kl = figures["kl"]
    return found | {
        "exactly right, original": f"{right['baseline_percent']:.1f} %; change {change}",
        "perplexity of answers, original": f"{figures['baseline_perplexity']:.4f}; change "
        f"{figures['change_percent']:+.2f} % {_between(figures['change_ci'], '+.2f')}",
        "KL on answer tokens": f"{kl['mean']:.4g} nats {_between(kl['ci'], '.4g')}, 99th percentile {kl['p99']:.4g}",
        "same first choice": f"{100 * figures['same_top1']:.1f} % of answer tokens",
        **{
            f"error of hidden states, {kind} tokens": f"{e['mean']:.4g} {_between(e['ci'], '.4g')}"
            for kind, e in figures["errors"].items()
        },
    }


def _between(ends: list[float], form: str) -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"
