"""A packed model held against its budget: what ``qkit check`` and ``qkit.check`` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkit.errors import IOFailure, UsageError, VerifyFailure
from qkit.evaluation.budget import Check, QualityBudget, check_budget
from qkit.evaluation.request import EvalRequest, jsonable
from qkit.evaluation.sources import text_name
from qkit.files.embedded import embedded_text
from qkit.files.folder import RECORD
from qkit.files.locate import find_model, recorded_source
from qkit.files.rejected import NAME, clear_mark, write_mark
from qkit.system.progress import NamedAdvance
from qkit.system.version import __version__


@dataclass(frozen=True)
class CheckReport:
    """checks: the lines of a budget against what was measured; measured: as ``evaluation.measure`` gives it."""

    checks: list[Check]
    measured: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every limit is kept."""
        return all(check.ok for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """The limits that are not kept, by name."""
        return [check.name for check in self.checks if not check.ok]


def require_sound(folder: Path) -> None:
    """Verify a folder that qkit wrote, before anything is measured of it. Raises VerifyFailure."""
    if (folder / RECORD).is_file():
        from qkit.verification.verify import summary, verify

        report = verify(folder)
        if not report.ok:
            raise VerifyFailure(f"{summary(report)}; nothing was measured")


def check_request(
    budget: QualityBudget,
    budget_file: Path,
    texts: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "cpu",
    task_dir: Path | None = None,
    allow_task_code: bool = False,
) -> EvalRequest:
    """What a budget wants measured. Raises UsageError for a text that is nowhere to be found."""
    return EvalRequest(
        texts=choose_texts(budget, texts, budget_file),
        window=budget.window,
        windows=budget.windows,
        tasks=budget.tasks,
        limit=budget.limit,
        task_dir=task_dir,
        allow_task_code=allow_task_code,
        dtype=dtype,
        device=device,
        image_text=budget.pairs if budget.measures_answers else None,
        questions=budget.questions,
        videos=budget.videos if budget.measures_samples else 0,
    )


def baseline_of(folder: Path, baseline: str | None, budget: QualityBudget, budget_file: Path) -> Path | None:
    """The original model: the one that is named, or the one that the folder was made from. Raises UsageError where the budget
    needs one and there is none."""
    original = recorded_source(folder) if baseline is None else find_model(baseline)
    if original is None and budget.needs_baseline:
        raise UsageError(
            f"budget {budget_file}: {', '.join(budget.needs_baseline)} need the original model: add --baseline PATH"
        )
    return original


def check_model(
    folder: Path,
    original: Path | None,
    budget: QualityBudget,
    request: EvalRequest,
    progress: NamedAdvance | None = None,
) -> CheckReport:
    """Measure the model in ``folder`` and hold it against the budget. ``mark`` leaves the verdict in the folder."""
    from qkit.evaluation.measure import measure

    measured = measure(folder, original, request, progress)
    return CheckReport(check_budget(budget, measured), measured)


def mark(
    folder: Path, budget_file: Path, measured: Mapping[str, Any], checks: Sequence[Check], say: Callable[[str], object]
) -> None:
    """Leave the mark of a rejected result in a folder that qkit wrote, or remove it. say: gets a sentence where that changes
    something, or fails: the verdict counts, and is given all the same."""
    failed = [asdict(check) for check in checks if not check.ok]
    try:
        if not failed:
            clear_mark(folder)
        elif write_mark(folder, __version__, budget_file.name, measured["baseline"], jsonable(failed)):
            say(f"{folder / NAME}: marks the result as rejected")
    except (IOFailure, OSError) as e:
        say(f"qkit: the mark {folder / NAME} could not be changed: {e}")


def choose_texts(budget: QualityBudget, named: Sequence[str], budget_file: Path) -> list[str]:
    """What to measure: the texts given and those of the budget; the embedded one if there are none or a line names it.

    Nothing when no line is about text. Raises UsageError for a line about a text that is nowhere to be found.
    """
    if not budget.measures_text:
        return []
    texts, names = list(named), [text_name(spec) for spec in named]
    for name, path in budget.texts.items():
        if name not in names:
            texts.append(f"{name}={path}")
            names.append(name)
    if "evaluation" not in names and (not texts or "evaluation" in budget.named_texts):
        texts.append(str(embedded_text("evaluation")))
        names.append("evaluation")
    for name in budget.named_texts:
        if name not in names:
            raise UsageError(
                f"budget {budget_file}: no text is called '{name}'; add it under texts:, or --text {name}=FILE"
            )
    return texts
