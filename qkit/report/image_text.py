"""The page of answers about images: accuracy by kind of question, and images beside the answers of the two models."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from qkit.calibration.image_text import held_out_image_text
from qkit.report.figures import accuracy_bars, png
from qkit.report.page import data_uri, page

_WIDEST = 384  # pixels of an image on the page, either way


def image_text_page(measured: Mapping[str, Any], name: str, spec: str, count: int) -> str:
    """The page of measured["pairs"][name] (of ``qkit.evaluation.measure``), whose questions, at most ``count``, are those of
    ``spec``."""
    figures = measured["pairs"][name]
    model, baseline = measured["model"], measured["baseline"]
    examples = {e["index"]: e for e in figures["examples"]}
    for index, pair in enumerate(held_out_image_text(spec, count)):
        if index in examples:
            images = [data_uri(_thumbnail(image)) for image in pair.images]
            examples[index] = {**examples[index], "pictures": images}
    return page(
        "pairs",
        model=model,
        baseline=baseline,
        summary=_summary(figures),
        bars=data_uri(png(accuracy_bars(figures, model, baseline))) if figures["kinds"] else None,
        examples=[_row(e, baseline is not None) for e in examples.values()],
    )


def _row(example: Mapping[str, Any], has_baseline: bool) -> dict[str, Any]:
    """said: the right answer, what the original says where there is one, what the model says."""
    answers = [example["answer"], *([example["baseline_said"]] if has_baseline else []), example["said"]]
    return {**example, "said": answers}


def _thumbnail(image: Any) -> bytes:
    """A PNG file of an image, no larger than the page needs."""
    thumbnail = image.copy()
    thumbnail.thumbnail((_WIDEST, _WIDEST))
    buffer = io.BytesIO()
    thumbnail.save(buffer, format="png")
    return buffer.getvalue()


def _summary(figures: Mapping[str, Any]) -> dict[str, str]:
    accuracy = figures["accuracy"]
    summary = {
        "questions": f"{figures['questions']:,}, answers of {figures['tokens']:,} tokens",
        "exactly right": f"{accuracy['percent']:.1f} % {_between(accuracy['ci'], '.1f')}",
        "perplexity of answers": f"{figures['perplexity']:.4f} {_between(figures['ci'], '.4f')}",
    }
    if "kl" not in figures:
        return summary
    change = f"{accuracy['change']:+.1f} points {_between(accuracy['change_ci'], '+.1f')}"
    kl = figures["kl"]
    return summary | {
        "exactly right, original": f"{accuracy['baseline_percent']:.1f} %; change {change}",
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
