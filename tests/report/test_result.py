"""Figures and examples of the page of results: repeatable, safe with any name, and cut where answers begin to differ."""

import re

import pytest

from qkit.report.figures import svg
from qkit.report.result_figures import layer_map, place, position_plot, size_plot
from qkit.report.result_page import examples

POINTS = [
    ("a <b> $x$", 4.0, 30.0, (29.0, 31.0)),
    ("long-name-of-a-file" * 4, 4.0, 30.0, None),
    ("c", 9.0, 300.0, (290, 310)),
]


def figures():
    yield size_plot(
        {"perplexity": POINTS, "KL": [(n, x, y / 1e4, None) for n, x, y, _ in POINTS]}, {"perplexity": 29.5}, "m $y$"
    )
    yield size_plot({"KL": [("one", 4.0, 0.0, (0.0, 0.0))]}, {}, "m")  # equal to the baseline
    yield position_plot({"a $x$": [(16, 0.1), (32, 0.2)], "b": [(16, 0.0), (32, 0.1)]})
    yield layer_map(
        {"model.layers.0.mlp.up_proj": 0.1, "model.layers.10.mlp.up_proj": 0.0, "lm_head": 0.2}, "error", True
    )
    yield layer_map({"model.layers.0.mlp.up_proj": 4.0}, "bits", False)


def test_figures_are_repeatable_and_narrow():
    first, second = ([svg(figure) for figure in figures()] for _ in range(2))
    assert first == second and len(set(first)) == 5
    for image in first:
        width = re.search(rb'width="([\d.]+)pt"', image)
        assert (
            width is not None and float(width[1]) <= 330
        )  # 440 pixels: a telephone shows letters at almost their size


def test_names_do_not_cover_each_other():
    figure = size_plot({"perplexity": [(f"file-{i}", 4.0, 30.0, None) for i in range(4)]}, {}, "m")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.mlp.up_proj", ("3", "up")),
        ("model.layers.3.mlp.experts.7.w1", ("3", "w1")),
        ("lm_head", ("-", "lm_head")),
    ],
)
def test_places(name, found):
    assert place(name) == found


def test_examples_are_cut_at_the_first_difference():
    def example(said: str, letters: int) -> dict:
        return {
            "prompt": "p",
            "kind": "k",
            "said": said,
            "baseline_said": "one two three",
            "same": 1,
            "same_letters": letters,
        }

    measured = [
        {"model": name, "suite": {"examples": [example(said, letters)]}}
        for name, said, letters in (("a", "one six seven", 3), ("b", "one two three", 13), ("c", "one", 3))
    ]
    (row,) = examples(measured)
    parts = [(a["before"], a["first"], a["after"]) for a in row["answers"]]
    assert parts == [("one", " six", " seven"), ("one two three", "", ""), ("one", "(ends here)", "")]
    assert examples([]) == []
