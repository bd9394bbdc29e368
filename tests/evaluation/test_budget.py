"""Budgets: every form of a limit, what passes, what must not, and the JUnit report."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from qkit.errors import BadRecipe
from qkit.evaluation.budget import Check, Limit, Line, QualityBudget, advice, check_budget, junit_xml, load_budget

TEXT = {
    "perplexity": 39.0,
    "baseline_perplexity": 38.26,
    "kl": {"mean": 0.015, "p99": 0.25},
    "same_top1": 0.955,
}
PAIRS = {
    "accuracy": {"percent": 88.0, "baseline_percent": 90.0},
    "kinds": {"count": {"accuracy": {"percent": 70.0, "baseline_percent": 80.0}}},
    "perplexity": 1.3,
    "baseline_perplexity": 1.25,
    "kl": {"mean": 0.015, "p99": 0.25},
}
MEASURED = {
    "pairs": {"drawn": PAIRS},
    "texts": {"wikitext2": TEXT},
    "tasks": {"qkit_cloze": {"samples": 100, "metrics": {"acc": {"value": 0.695}}}},
    "baseline_tasks": {"qkit_cloze": {"samples": 100, "metrics": {"acc": {"value": 0.70}}}},
    "size": {"bytes": 29_000_000, "baseline_bytes": 100_000_000},
}


@pytest.fixture
def budget(tmp_path):
    def load(text: str):
        path = tmp_path / "budget.yaml"
        path.write_text(text)
        return load_budget(path)

    return load


@pytest.mark.parametrize(
    ("line", "limit", "ok"),
    [
        ("perplexity.wikitext2: +2%", "<= +2% of 38.26 (39.0252)", True),
        ("perplexity.wikitext2: +1%", "<= +1% of 38.26 (38.6426)", False),
        ("perplexity: +2%", "<= +2% of 38.26 (39.0252)", True),
        ('perplexity: "<= +2%"', "<= +2% of 38.26 (39.0252)", True),
        ('perplexity: "40.5"', "<= 40.5", True),
        ("perplexity: 39", "<= 39", True),
        ("perplexity: 38.99", "<= 38.99", False),
        ("perplexity: -1%", "<= -1% of 38.26 (37.8774)", False),
        ("kl.mean: 0.02", "<= 0.02", True),
        ("kl.mean: 1e-2", "<= 0.01", False),
        ("kl.mean.wikitext2: 0.015", "<= 0.015", True),
        ("kl.p99: 0.3", "<= 0.3", True),
        ("kl.p99: 0.2", "<= 0.2", False),
        ("kl.p99: 0", "<= 0", False),
        ('same_top1: ">=0.95"', ">= 0.95", True),
        ("same_top1: 0.95", ">= 0.95", True),
        ("same_top1: 0.96", ">= 0.96", False),
        ("same_top1.wikitext2: 1", ">= 1", False),
        ('task.qkit_cloze.acc: ">=-1%"', ">= -1% of 0.7 (0.693)", True),
        ('task.qkit_cloze.acc: ">=-0.5%"', ">= -0.5% of 0.7 (0.6965)", False),
        ('task.qkit_cloze.acc: ">= 0.69"', ">= 0.69", True),
        ('task.qkit_cloze.acc: "<=0.69"', "<= 0.69", False),
        ("size: 0.3x", "<= 0.3x of 100 MB (30 MB)", True),
        ("size: 0.25x", "<= 0.25x of 100 MB (25 MB)", False),
        ("size: -70%", "<= -70% of 100 MB (30 MB)", True),
        ("size: 29MB", "<= 29 MB", True),
        ("size: 28.9 MB", "<= 28.9 MB", False),
        ("size: 28MiB", "<= 29.360128 MB", True),
        ("size: 29000000", "<= 29 MB", True),
        ("size: 28999999", "<= 28.999999 MB", False),
        ('accuracy: ">=85"', ">= 85", True),
        ("accuracy: 88", ">= 88", True),
        ("accuracy: 88.5", ">= 88.5", False),
        ('accuracy: ">=-3%"', ">= -3% of 90 (87.3)", True),
        ('accuracy: ">=-2%"', ">= -2% of 90 (88.2)", False),
        ("accuracy.count: 70", ">= 70", True),
        ('accuracy.count: ">=-10%"', ">= -10% of 80 (72)", False),
        ("accuracy.smell: 0", ">= 0", False),
        ("answer_perplexity: +4%", "<= +4% of 1.25 (1.3)", True),
        ("answer_perplexity: +3%", "<= +3% of 1.25 (1.2875)", False),
        ("answer_perplexity: 1.3", "<= 1.3", True),
        ("answer_kl.mean: 0.02", "<= 0.02", True),
        ("answer_kl.mean: 0.01", "<= 0.01", False),
        ("answer_kl.p99: 0.2", "<= 0.2", False),
    ],
)
def test_each_form(budget, line, limit, ok):
    (check,) = check_budget(budget(line + "\n"), MEASURED)
    assert (check.limit, check.ok) == (limit, ok)


def test_a_line_without_a_name_holds_for_every_text(budget):
    measured = {"texts": {"a": TEXT, "b": {**TEXT, "perplexity": 50.0}}}
    checks = check_budget(budget("perplexity: +2%\nkl.mean.a: 0.02\n"), measured)
    assert [(check.name, check.ok) for check in checks] == [
        ("perplexity.a", True),
        ("perplexity.b", False),
        ("kl.mean.a", True),
    ]


ALL_LINES = """\
perplexity.wikitext2: +2%
kl.mean: 0.02
kl.p99: 0.3
same_top1: ">=0.95"
task.qkit_cloze.acc: ">=-1%"
size: 0.3x
"""


def test_all_lines_together(budget):
    checks = check_budget(budget(ALL_LINES), MEASURED)
    assert [check.ok for check in checks] == [True] * 6
    assert [check.measured for check in checks] == [39.0, 0.015, 0.25, 0.955, 0.695, 29_000_000]


@pytest.mark.parametrize(
    "measured", [{}, {"texts": {}, "tasks": None, "pairs": None}, {"texts": {"other": TEXT}, "pairs": {"drawn": {}}}]
)
def test_what_was_not_measured_fails(budget, measured):
    named = ALL_LINES.replace("kl.mean:", "kl.mean.wikitext2:").replace("kl.p99:", "kl.p99.wikitext2:")
    named += "accuracy: 0\naccuracy.count: 0\nanswer_perplexity: 9\nanswer_kl.mean: 9\n"
    checks = check_budget(budget(named.replace("same_top1:", "same_top1.wikitext2:")), measured)
    assert len(checks) == 10
    assert all(check.measured is None and not check.ok for check in checks)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("where", ["value", "baseline"])
def test_what_is_not_a_number_fails(budget, bad, where):
    figures = {"value": bad} if where == "value" else {"value": 0.7}
    before = {"value": bad} if where == "baseline" else {"value": 0.7}
    measured = {
        "tasks": {"t": {"metrics": {"m": figures}}},
        "baseline_tasks": {"t": {"metrics": {"m": before}}},
        "texts": {"w": {"perplexity": figures["value"], "baseline_perplexity": before["value"]}},
        "size": {"bytes": figures["value"], "baseline_bytes": before["value"]},
    }
    lines = 'task.t.m: ">=-1%"\nperplexity: +2%\nsize: 2x\n'
    assert [check.ok for check in check_budget(budget(lines), measured)] == [False] * 3
    assert not any(check.ok for check in check_budget(budget('task.t.m: "<=+1%"\nperplexity: ">=-2%"\n'), measured))


def test_settings(budget, tmp_path):
    content = budget("kl.mean: 1\ntexts: {wiki: sub/wiki.txt}\nwindow: 256\nwindows: 3\nlimit: 7\nquestions: 9\n")
    assert (content.pairs, content.questions, content.measures_answers) == ("drawn", 9, False)
    mine = budget("accuracy.count: 50\npairs: sub/mine.jsonl\n")
    assert (mine.pairs, mine.questions) == (str(tmp_path / "sub" / "mine.jsonl"), 500)
    assert mine.measures_answers and not mine.measures_text and mine.needs_baseline == []
    assert budget("answer_kl.mean: 1\naccuracy: '>=-1%'\n").needs_baseline == ["answer_kl.mean", "accuracy"]
    assert (content.window, content.windows, content.limit) == (256, 3, 7)
    assert content.texts == {"wiki": tmp_path / "sub" / "wiki.txt"}
    defaults = budget("perplexity: 40\n")
    assert (defaults.window, defaults.windows, defaults.limit, dict(defaults.texts)) == (512, 200, None, {})


def test_what_a_budget_needs(budget):
    content = budget(ALL_LINES + 'task.other.acc: ">=0.5"\ntask.qkit_cloze.acc_norm: ">=0.5"\n')
    assert content.tasks == ["qkit_cloze", "other"]
    assert content.named_texts == ["wikitext2"]
    assert content.measures_text
    assert content.needs_baseline == [
        "perplexity.wikitext2",
        "kl.mean",
        "kl.p99",
        "same_top1",
        "task.qkit_cloze.acc",
        "size",
    ]
    absolute = budget("perplexity: 40\nsize: 90MB\n")
    assert absolute.needs_baseline == [] and absolute.measures_text
    assert not budget("size: 90MB\n").measures_text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("perplexty.wikitext2: +2%\n", "line 1: unknown key 'perplexty.wikitext2'; did you mean 'perplexity'?"),
        ("kl.mean: 1\nkl.maen: 1\n", "line 2: unknown key 'kl.maen'; did you mean 'kl.mean'?"),
        ("kl.mean: 1\nwindos: 1\n", "did you mean 'windows'?"),
        ("kl.mean: 1\nkl.mean: 2\n", "line 2: key 'kl.mean' is given twice"),
        ("kl.mean: .nan\n", "line 1: .nan"),
        ("kl.mean: nan\n", "'nan' is not a limit"),
        ("kl.mean: true\n", "True is not a limit"),
        ("kl.mean:\n", "None is not a limit"),
        ("kl.mean: [1]\n", "[1] is not a limit"),
        ("kl: {mean: 1}\n", "unknown key 'kl'"),
        ("kl.mean: +2%\n", "unit '%'"),
        ("kl.mean: 1x\n", "unit 'x'"),
        ("kl.mean: 1MB\n", "unit 'MB'"),
        ("kl.mean: -0.1\n", "needs a sign and %"),
        ("kl.mean: '==1'\n", "not a limit"),
        ("kl.mean: '" + "9" * 400 + "'\n", "out of range"),
        ("perplexity: 2%\n", "needs a sign and %"),
        ("perplexity: '+2'\n", "needs a sign and %"),
        ("perplexity: lots\n", "not a limit"),
        ("same_top1: 95\n", "out of range"),
        ("accuracy: 101\n", "out of range"),
        ("accuracy: 0.9x MB\n", "not a limit"),
        ("answer_kl.mean: +2%\n", "unit '%'"),
        ("answer_kl.maen: 1\n", "did you mean 'answer_kl.mean'?"),
        ("accuracy: 1\npairs: [a]\n", "'pairs' must be 'drawn', a file or a folder; found ['a']"),
        ("accuracy: 1\nquestions: 0\n", "from 1 on; found 0"),
        ("same_top1: '>=95%'\n", "unit '%'"),
        ("size: 3 apples\n", "unit 'apples'"),
        ("task.arc.acc: 0.5\n", "does not say on which side"),
        ("task.arc: '>=0.5'\n", "must name a task and a metric"),
        ("task: '>=0.5'\n", "unknown key 'task'"),
        ("window: 512\n", "sets no limit"),
        ("kl.mean: 1\nwindow: 1\n", "line 2: 'window' must be a whole number from 2 on; found 1"),
        ("kl.mean: 1\nwindow: 5.5\n", "found 5.5"),
        ("kl.mean: 1\nwindows: true\n", "found True"),
        ("kl.mean: 1\ntexts: a.txt\n", "'texts' must be a mapping"),
        ("kl.mean: 1\ntexts: {a: 1}\n", "'texts' must be a mapping"),
        ("kl.mean: 1\ntexts: {a=b: c}\n", "leave out the '='"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("kl.mean: >=1\n", "needs quotes"),
    ],
)
def test_refused(budget, tmp_path, text, problem):
    with pytest.raises(BadRecipe, match=re.escape(problem)) as error:
        budget(text)
    assert str(error.value).startswith(f"budget {tmp_path / 'budget.yaml'}")


def test_junit_is_xml_and_counts():
    checks = [
        Check("kl.mean.a", "<= 0.02", 0.01, True),
        Check('<&"\x1b[31m', ">= 0.95", 0.5, False),
        Check("size", "<= 0.3x", None, False),
    ]
    root = ElementTree.fromstring(junit_xml(checks, "qkit check <out>\x00"))
    (suite,) = root
    cases = list(suite)
    assert (root.tag, suite.tag, [case.tag for case in cases]) == ("testsuites", "testsuite", ["testcase"] * 3)
    assert suite.get("name") == "qkit check <out>?"
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures"), element.get("errors")) == ("3", "2", "0")
    assert [case.get("name") for case in cases] == ["kl.mean.a", '<&"?[31m', "size"]
    failures = [case.find("failure") for case in cases]
    assert [failure is not None for failure in failures] == [False, True, True]
    assert failures[1].get("message") == '<&"?[31m: 0.5, budget >= 0.95'
    assert failures[2].text == "size: not measured, budget <= 0.3x"


def test_the_advice_says_which_figures_a_model_has_where_a_line_is_about_another():
    rows = {"kind": "classes", "rows": 8, "same_class": {"share": 0.9}, "kl": {"mean": 0.01, "p99": 0.1}}
    measured = {"rows": {"evaluation": rows}}
    lines = [Line(m, m, None, "", Limit(u, 0.99)) for m, u in (("perplexity", True), ("same_class", False))]
    checks = check_budget(QualityBudget(lines=tuple(lines), texts={}), measured)
    assert [c.measured for c in checks] == [None, 0.9]
    said = advice(checks, measured)
    assert said == (
        "quantize with more bits or another method, or change the budget; perplexity.evaluation is no figure of this model, of "
        "which classes are measured (kl.mean, kl.p99, same_class, size): write a line such as 'kl.mean: 0.02' instead"
    )
    assert "more bits" not in advice(checks[:1], measured)
