"""``--quality``: the method of a request that names none, chosen by its schemes, its model and this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qkit.calibration.dataset import Calibration
from qkit.errors import QkitError, Unsupported, UsageError
from qkit.files.folder import is_pipeline
from qkit.files.locate import find_model
from qkit.planning.quality import kind_of_request, with_setting
from qkit.planning.quality_levels import LEVELS, ROUNDING, Setting, settings_of
from qkit.planning.request import Request
from qkit.system.machine import machine_memory
from qkit.system.words import megabytes, times
from qkit.workflows.quantize import PreparedRequest, prepare


@dataclass(frozen=True)
class Attempt:
    """A setting that the model can have. left_out: why settings before it cannot be had, a sentence each"""

    setting: Setting
    request: Request
    prepared: PreparedRequest
    left_out: tuple[str, ...] = ()

    @property
    def operations(self) -> float:
        """Operations of the whole run."""
        return sum(self.prepared.forecast.operations.values())

    @property
    def memory(self) -> int:
        """Peak bytes of memory."""
        return self.prepared.forecast.peak_memory

    @property
    def rows(self) -> Calibration | None:
        """The calibration rows, which need not be made again."""
        return self.prepared.plan.calibration


@dataclass(frozen=True)
class QualityChoice:
    """What a level chose. next_level, above: the next level that asks for more, and what it would choose; None: none does.
    same: higher levels that choose the same"""

    level: str
    chosen: Attempt
    next_level: str | None = None
    above: Attempt | None = None
    same: tuple[str, ...] = ()

    def sentences(self) -> Iterator[str]:
        """What was chosen and why, what could not be had, and what the next level costs."""
        setting = self.chosen.setting
        yield f"quality {self.level}: method {setting} ({setting.why}); --method chooses another"
        for sentence in self.chosen.left_out:
            yield f"not used: {sentence}"
        for level in self.same:
            yield f"--quality {level}: the same method, for this scheme and model"
        if self.above is not None:
            yield (
                f"--quality {self.next_level}: method {self.above.setting} ({self.above.setting.why}), "
                f"{self._cost(self.above)}"
            )

    def _cost(self, above: Attempt) -> str:
        """The cost of the next level beside that of this one."""
        memory = f"{megabytes(above.memory)} of memory (here {megabytes(self.chosen.memory)})"
        if self.chosen.rows is None and above.rows is not None:
            return f"which runs the model on calibration samples, {memory}"
        if not self.chosen.operations or not above.operations:
            return memory
        return f"about {times(above.operations / self.chosen.operations)} the operations, {memory}"

    def to_json(self) -> dict[str, Any]:
        """The machine's copy of ``sentences``."""
        above = self.above
        return {
            "level": self.level,
            "chosen": self.chosen.setting.method,
            "options": dict(self.chosen.setting.options),
            "synthetic_samples": self.chosen.setting.synthetic,
            "why": self.chosen.setting.why,
            "left_out": list(self.chosen.left_out),
            "next": None if above is None else self.next_level,
            "ratio": above.operations / self.chosen.operations if above and self.chosen.operations else None,
        }


def choose(request: Request, level: str) -> tuple[Request, QualityChoice]:
    """The request with the method of a level, and what was chosen. The request must not name a method.

    Raises what ``prepare`` raises for a request that no method can serve.
    """
    kind = "diffusion" if is_pipeline(find_model(request.model)) else kind_of_request(request)
    chosen, same = _first(request, settings_of(kind, level)), list[str]()
    for higher in LEVELS[LEVELS.index(level) + 1 :]:
        try:
            above = _first(request, settings_of(kind, higher), chosen.rows, fall_back=False)
        except QkitError:  # what this model cannot have is no advice
            continue
        if above.setting != chosen.setting:
            return chosen.request, QualityChoice(level, chosen, higher, above, tuple(same))
        same.append(higher)
    return chosen.request, QualityChoice(level, chosen, same=tuple(same))


def _first(
    request: Request, settings: tuple[Setting, ...], rows: Calibration | None = None, fall_back: bool = True
) -> Attempt:
    """The first setting that the model can have and the machine has memory for; rounding, where it has none of them.

    rows: of the request, where they were made before; fall_back: whether rounding is tried at last; what it raises is what is
    wrong with the request.
    """
    left_out = list[str]()
    for listed in settings:
        asked = with_setting(request, listed)
        setting = replace(listed, synthetic=asked.written)
        try:
            prepared = prepare(asked, None if rows is None else replace(rows, written=asked.written))
        except (Unsupported, UsageError) as e:
            left_out.append(f"{setting}: {e}")
            continue
        # Not by what is free now: a command that is run again to go on has to choose the same.
        memory, needed = machine_memory(), prepared.forecast.peak_memory
        if memory is not None and needed > memory:
            left_out.append(
                f"{setting}: it needs about {megabytes(needed)} of memory, and this machine has {megabytes(memory)}"
            )
            continue
        return Attempt(setting, asked, prepared, tuple(left_out))
    if not fall_back:
        raise Unsupported("; ".join(left_out))
    asked = with_setting(request, ROUNDING)
    return Attempt(ROUNDING, asked, prepare(asked, rows), tuple(left_out))
