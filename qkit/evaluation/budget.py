"""Budgets: what a quantized model may cost, as a small YAML file that belongs into the repository next to the code.

    perplexity.wikitext2: +2%        # change against the baseline; or absolute, 40.5
    kl.mean: 0.02                    # nats per token, every text that is measured; kl.mean.wikitext2 for one
    kl.p99: 0.3
    same_top1: ">=0.95"
    cosine: 0.99                     # of embeddings, mean; also same_nearest, and of classifiers and reward models same_class,
                                     # same_order and rank_correlation (``evaluation.row_scores``)
    task.qkit_cloze.acc: ">=-1%"     # at most 1 % below the baseline's
    size: 0.3x                       # of the baseline's bytes; or 90MB
    accuracy: ">=-1%"                # exactly right answers about images, in %; accuracy.KIND of one kind of question
    answer_perplexity: +2%           # of those answers' tokens; also answer_kl.mean and answer_kl.p99
    psnr: 25                         # of samples of a diffusion pipeline, dB, at least; also ssim, latent_error, flickering,
    recognised: ">=-2%"              # width (bits of inputs) and, of drawn clips, the share that is recognised
    videos: 32                       # samples
    pairs: drawn                     # the images, or a file of JSON lines or a folder, relative to this file
    questions: 500
    texts: {wikitext2: wikitext2-test.txt}   # where a named text lies, relative to this file
    window: 512
    windows: 200
    limit: 100                       # samples per task

A bare number is an upper limit, for ``same_top1`` and accuracies a lower one; tasks always say which (">=" or "<="). What was
not measured, or is not a number, fails: a budget never passes for want of evidence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from qkit.calibration.options import DRAWN, QUESTIONS
from qkit.errors import BadRecipe
from qkit.files.strictyaml import LineDict, load_yaml, unknown_key
from qkit.system.words import exact_megabytes

SIZE = "size"  # of all weight files
# Of rows of a model that does not continue a text, against the baseline: the part of the figure that is compared.
ROWS = {"cosine": "mean", "same_nearest": "share", "same_class": "share", "same_order": "", "rank_correlation": ""}
# Of a text: plain, or followed by the name of one text.
METRICS = ("perplexity", "kl.mean", "kl.p99", "same_top1", *ROWS)
ANSWERS = ("answer_perplexity", "answer_kl.mean", "answer_kl.p99")  # of questions about images, and 'accuracy'
SAMPLES = ("psnr", "ssim", "latent_error", "flickering", "recognised", "width")  # of a diffusion pipeline
# Figures that may be limited against the baseline.
RELATIVE = ("perplexity", "task", "size", "accuracy", "answer_perplexity", "flickering", "recognised")
# Figures of which a bare number is the least allowed, with the largest possible value.
LOWER = {
    **dict.fromkeys(ROWS, 1.0),
    "same_top1": 1.0,
    "accuracy": 100.0,
    "psnr": 100.0,
    "ssim": 1.0,
    "flickering": 1.0,
    "recognised": 100.0,
}
NUMBERS = {"window": 2, "windows": 1, "limit": 1, "questions": 1, "videos": 1}  # settings, with the least value of each
EXAMPLES = {
    **dict.fromkeys(ROWS, "0.99"),
    "perplexity": "+2% or 40.5",
    "kl.mean": "0.02",
    "kl.p99": "0.3",
    "same_top1": '">=0.95"',
    "task": '">=-1%" or ">=0.6"',
    "size": "0.3x or 90MB",
    "accuracy": '">=-1%" or 85',
    "answer_perplexity": "+2% or 1.2",
    "answer_kl.mean": "0.02",
    "answer_kl.p99": "0.3",
    "psnr": "25",
    "ssim": "0.9",
    "latent_error": "0.1",
    "flickering": '">=-1%" or 0.98',
    "recognised": '">=-2%" or 90',
    "width": "6.1",
}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LIMIT = re.compile(r"(<=|>=)?\s*([-+]?)([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(%|[A-Za-z]*)\Z")


@dataclass(frozen=True)
class Limit:
    """One limit of a budget. ``unit`` '' compares the value itself; '%' the relative change, in percent, against the baseline;
    'x' the ratio to the baseline."""

    upper: bool
    value: float
    unit: str = ""

    def bound(self, baseline: float | None) -> float:
        """The bound as an absolute value; NaN when it needs a baseline that was not measured."""
        if self.unit == "":
            return self.value
        if baseline is None:
            return math.nan
        return baseline * (self.value if self.unit == "x" else 1.0 + self.value / 100.0)

    def __str__(self) -> str:
        sign = "+" if self.unit == "%" else ""
        return f"{'<=' if self.upper else '>='} {self.value:{sign}g}{self.unit}"


@dataclass(frozen=True)
class Line:
    """A line of a budget. ``metric``: one of METRICS or ANSWERS, 'accuracy', 'task' or 'size'. ``of``: the text, the task or
    the kind of question, or None for all. ``part``: of a task, its metric."""

    name: str
    metric: str
    of: str | None
    part: str
    limit: Limit


@dataclass(frozen=True, kw_only=True)
class QualityBudget:
    """A parsed budget; ``texts`` are absolute paths by name, ``pairs`` is DRAWN or one."""

    lines: tuple[Line, ...]
    texts: Mapping[str, Path]
    window: int = 512
    windows: int = 200
    limit: int | None = None
    pairs: str = DRAWN
    questions: int = QUESTIONS
    videos: int = 32

    @property
    def needs_baseline(self) -> list[str]:
        """Names of the lines that cannot be judged without the original model."""
        divergence = (*METRICS[1:], "answer_kl.mean", "answer_kl.p99", *SAMPLES[:3])
        return [line.name for line in self.lines if line.limit.unit or line.metric in divergence]

    @property
    def tasks(self) -> list[str]:
        """Tasks to run, each once, in the order of the file."""
        return list(dict.fromkeys(line.of for line in self.lines if line.metric == "task" and line.of))

    @property
    def named_texts(self) -> list[str]:
        """Texts that a line asks for by name."""
        return list(dict.fromkeys(line.of for line in self.lines if line.metric in METRICS and line.of))

    @property
    def measures_text(self) -> bool:
        """Whether a line limits a figure of texts."""
        return any(line.metric in METRICS for line in self.lines)

    @property
    def measures_answers(self) -> bool:
        """Whether a line limits answers to questions about images."""
        return any(line.metric in (*ANSWERS, "accuracy") for line in self.lines)

    @property
    def measures_samples(self) -> bool:
        """Whether a line limits samples of a diffusion pipeline."""
        return any(line.metric in SAMPLES for line in self.lines)


@dataclass(frozen=True)
class Check:
    """A line of a budget against what was measured. ``measured`` is None when nothing was."""

    name: str
    limit: str
    measured: float | None
    ok: bool

    @property
    def shown(self) -> str:
        """The measured value as a person reads it."""
        if self.measured is None:
            return "not measured"
        if not math.isfinite(self.measured):
            return "not a finite number"
        return exact_megabytes(self.measured) if self.name == SIZE else f"{self.measured:.6g}"


def load_budget(path: Path) -> QualityBudget:
    """The budget in a file. Raises BadRecipe with file and line for anything that is not as this page describes."""
    content = load_yaml(path, "budget")
    where = f"budget {path}"
    if not isinstance(content, LineDict):
        raise BadRecipe(f"{where} must be a mapping of names to limits, such as 'kl.mean: 0.02'")
    settings: dict[str, Any] = {"texts": {}}
    lines = []
    for key, value in content.items():
        at = f"{where}, line {content.lines[key]}"
        if key == "texts":
            settings[key] = _texts(value, path.parent, at)
        elif key == "pairs":
            if not isinstance(value, str):
                raise BadRecipe(f"{at}: 'pairs' must be '{DRAWN}', a file or a folder; found {value!r}")
            settings[key] = value if value == DRAWN else str(path.parent.absolute() / value)
        elif key in NUMBERS:
            if not isinstance(value, int) or isinstance(value, bool) or value < NUMBERS[key]:
                raise BadRecipe(f"{at}: '{key}' must be a whole number from {NUMBERS[key]} on; found {value!r}")
            settings[key] = value
        else:
            lines.append(_line(key, value, at))
    if not lines:
        raise BadRecipe(f"{where} sets no limit; add a line such as 'kl.mean: 0.02'")
    return QualityBudget(lines=tuple(lines), **settings)


def _texts(value: Any, folder: Path, at: str) -> dict[str, Path]:
    if not isinstance(value, LineDict) or not all(isinstance(file, str) for file in value.values()):
        raise BadRecipe(f"{at}: 'texts' must be a mapping of names to files; found {value!r}")
    for name in value:
        if "=" in name:
            raise BadRecipe(f"{at}: a text cannot be called {name!r}; leave out the '='")
    return {name: folder.absolute() / file for name, file in value.items()}


def _line(name: str, value: Any, at: str) -> Line:
    for metric in METRICS:
        if name == metric:
            return Line(name, metric, None, "", _limit(value, metric, at))
        if name.startswith(metric + "."):
            return Line(name, metric, name[len(metric) + 1 :], "", _limit(value, metric, at))
    if name in (*ANSWERS, "accuracy", "size", *SAMPLES):
        return Line(name, name, None, "", _limit(value, name, at))
    if name.startswith("accuracy."):
        return Line(name, "accuracy", name.removeprefix("accuracy."), "", _limit(value, "accuracy", at))
    if name.startswith("task."):
        task, _, part = name.removeprefix("task.").partition(".")
        if not task or not part:
            raise BadRecipe(f"{at}: {name!r} must name a task and a metric of it, such as 'task.qkit_cloze.acc'")
        return Line(name, "task", task, part, _limit(value, "task", at))
    raise unknown_key(name, (*METRICS, "accuracy", *ANSWERS, *SAMPLES, "task", "size", "texts", "pairs", *NUMBERS), at)


def _limit(value: Any, metric: str, at: str) -> Limit:
    text = repr(value) if isinstance(value, float) else str(value)
    match = _LIMIT.match(text.strip()) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    if match is None:
        raise BadRecipe(f"{at}: {value!r} is not a limit; write {EXAMPLES[metric]}")
    operator, sign, digits, unit = match.groups()
    number = float(sign + digits)
    if unit.upper() in BYTES and metric == "size":
        number, unit = number * BYTES[unit.upper()], ""
    relative = unit in ("%", "x")
    if unit and not (relative and metric in RELATIVE):
        raise BadRecipe(f"{at}: unit {unit!r} of {value!r} does not fit '{metric}'; write {EXAMPLES[metric]}")
    if bool(sign) != (unit == "%"):
        raise BadRecipe(f"{at}: {value!r}: a change needs a sign and %, a plain number has neither; write +2% or 2.5")
    if not math.isfinite(number) or (not unit and number > LOWER.get(metric, math.inf)):
        raise BadRecipe(f"{at}: {value!r} is out of range; write {EXAMPLES[metric]}")
    if metric == "task" and operator is None:
        raise BadRecipe(
            f"{at}: {value!r} does not say on which side of the limit a task must be; write {EXAMPLES['task']}"
        )
    upper = operator == "<=" if operator else metric not in LOWER
    return Limit(upper, number, unit)


def check_budget(budget: QualityBudget, measured: Mapping[str, Any]) -> list[Check]:
    """The result of each line against a measurement (the dict of ``qkit.evaluation.measure``), in the order of the file.

    A line without the name of a text gives one check per text. A value or a baseline that is missing or not finite
    fails the check.
    """
    texts = {**(measured.get("texts") or {}), **(measured.get("rows") or {})}
    checks = []
    for line in budget.lines:
        if line.metric == SIZE:
            size = measured.get("size") or {}
            checks.append(_check(line.name, line.limit, size.get("bytes"), size.get("baseline_bytes"), exact_megabytes))
        elif line.metric == "task":
            value, baseline = (_task(measured.get(where), line) for where in ("tasks", "baseline_tasks"))
            checks.append(_check(line.name, line.limit, value, baseline))
        elif line.metric in (*ANSWERS, "accuracy"):
            value, baseline = _answers(measured.get("pairs"), line)
            checks.append(_check(line.name, line.limit, value, baseline))
        elif line.metric in SAMPLES:
            value, baseline = _samples(measured.get("videos"), line.metric)
            checks.append(_check(line.name, line.limit, value, baseline))
        else:
            for name in [line.of] if line.of else list(texts) or [None]:
                entry = texts.get(name) or {}
                value = _of_text(entry, line.metric)
                title = f"{line.metric}.{name}" if name else line.metric
                checks.append(_check(title, line.limit, value, entry.get("baseline_perplexity")))
    return checks


def _of_text(entry: Mapping[str, Any], metric: str) -> float | None:
    """One of METRICS of a text or of rows; None where the model has no such figure."""
    value: Any = entry.get(metric)
    if metric.startswith("kl."):
        value = (entry.get("kl") or {}).get(metric.removeprefix("kl."))
    elif isinstance(value, Mapping):
        value = value.get(ROWS[metric])
    return None if value is None else float(value)


def advice(checks: Sequence[Check], measured: Mapping[str, Any]) -> str:
    """What to do where limits are not met, in words: what was not measured asks for another line, and not for more bits.

    Of a model that does not continue a text, it says which figures there are.
    """
    missing = [c.name for c in checks if not c.ok and c.measured is None]
    too_bad = any(not c.ok and c.measured is not None for c in checks)
    rows = measured.get("rows") or {}
    parts = ["quantize with more bits or another method, or change the budget"] if too_bad or not missing else []
    known = [m for m in METRICS if any(_of_text(entry, m) is not None for entry in rows.values())]
    if missing and rows:
        kind = next(iter(rows.values())).get("kind")
        listed = ", ".join([*known, SIZE])
        example = next(iter(known), SIZE)
        names = f"{', '.join(missing)} {'is no figure' if len(missing) == 1 else 'are no figures'}"
        parts.append(
            f"{names} of this model, of which {kind} are measured "
            f"({listed}): write a line such as '{example}: {EXAMPLES[example].partition(' or ')[0]}' instead"
        )
    elif missing:
        parts.append(f"{', '.join(missing)}: nothing of it was measured: take the line out, or measure it")
    return "; ".join(parts)


def _task(results: Mapping[str, Any] | None, line: Line) -> float | None:
    metrics = ((results or {}).get(line.of or "") or {}).get("metrics") or {}
    number: float | None = (metrics.get(line.part) or {}).get("value")
    return number


def _answers(results: Mapping[str, Any] | None, line: Line) -> tuple[float | None, float | None]:
    """Of the model and of the baseline; what is measured has one entry."""
    entry: Mapping[str, Any] = next(iter((results or {}).values()), {})
    if line.metric == "accuracy":
        entries = entry if line.of is None else (entry.get("kinds") or {}).get(line.of) or {}
        accuracy = entries.get("accuracy") or {}
        return accuracy.get("percent"), accuracy.get("baseline_percent")
    metric, _, part = line.metric.removeprefix("answer_").partition(".")
    return (entry.get(metric) or {}).get(part) if part else entry.get(metric), entry.get(f"baseline_{metric}")


def _samples(figures: Mapping[str, Any] | None, metric: str) -> tuple[float | None, float | None]:
    """Of the model and of the baseline, where the figure is one of either alone."""
    means = {k: v[0] for k, v in (figures or {}).items() if isinstance(v, list) and v and isinstance(v[0], float)}
    value, change = means.get(metric), means.get(f"{metric}_change")
    return value, None if value is None or change is None else value - change


def _number(value: float) -> str:
    return f"{value:.6g}"


def _check(
    name: str,
    limit: Limit,
    value: float | None,
    baseline: float | None,
    format_value: Callable[[float], str] = _number,
) -> Check:
    bound = limit.bound(baseline)
    text = str(limit) if limit.unit else f"{'<=' if limit.upper else '>='} {format_value(limit.value)}"
    if limit.unit:
        reference = (
            " of a baseline that was not measured"
            if baseline is None
            else f" of {format_value(baseline)} ({format_value(bound)})"
        )
        text += reference
    finite = value is not None and math.isfinite(value) and math.isfinite(bound)
    ok = finite and value is not None and (value <= bound if limit.upper else value >= bound)
    return Check(name, text, value, ok)


def junit_xml(checks: Sequence[Check], suite: str) -> str:
    """The checks as a JUnit report: one test case per check, a ``failure`` in those that do not pass."""
    failures = sum(not check.ok for check in checks)
    counts = {"tests": str(len(checks)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", counts)
    group = ElementTree.SubElement(root, "testsuite", {"name": _xml(suite), **counts})
    for check in checks:
        case = ElementTree.SubElement(group, "testcase", {"classname": "qkit.budget", "name": _xml(check.name)})
        if not check.ok:
            message = _xml(f"{check.name}: {check.shown}, budget {check.limit}")
            ElementTree.SubElement(case, "failure", {"type": "BudgetNotMet", "message": message}).text = message
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """XML 1.0 has no way to write control characters, escaped or not."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
