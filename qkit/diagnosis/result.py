"""The result of a diagnosis: what a file holds, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qkit.diagnosis.findings import FAULT, NOTE, WARNING, Finding
from qkit.verification.model_engines import EngineLine, EngineRow


@dataclass
class Diagnosis:
    """What was found. formats: {format in words: [layers, bytes]}; plain: [tensors, bytes] of what is not quantized,
    plain_layers: {its matrices: the reason}; drift: each weight against the baseline, worst first
    engines: one row for each combination of formats and engine, answers: of each engine for the whole file, as 'qkit verify'
    has them; unread: {tensor or layer that was not looked at: why}"""

    path: str
    kind: str = "model folder"
    method: str | None = None
    made_by: str | None = None
    formats: dict[str, list[int]] = field(default_factory=dict)
    plain: list[int] = field(default_factory=lambda: [0, 0])
    plain_layers: dict[str, str] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    drift: list[dict[str, Any]] = field(default_factory=list)

    @property
    def faulty(self) -> bool:
        """Whether there is a fault; warnings do not count."""
        return any(f.level == FAULT for f in self.findings)

    @property
    def sound(self) -> bool:
        """Whether all was looked at, and there is no fault."""
        return not self.faulty and not self.unread

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        found = counts(self)
        words = ", ".join(f"{n} {level}{'' if n == 1 else 's'}" for level, n in found.items())
        if self.faulty:
            word = "NOT sound"
        else:
            word = "not known to be sound" if self.unread else "sound"
        left = f"; {len(self.unread)} were not looked at" if self.unread else ""
        return f"{word}: {words}{left}"

    def set_engines(self, rows: Sequence[EngineRow], lines: Sequence[EngineLine]) -> None:
        """Note what engines say. rows: of all engines; lines: of those that are printed"""
        self.engines = [asdict(row) for row in rows]
        self.answers = [_in_words(line) for line in lines]

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "path": self.path,
            "kind": self.kind,
            "sound": self.sound,
            "verdict": self.verdict,
            "counts": counts(self),
            "method": self.method,
            "made_by": self.made_by,
            "formats": {k: {"layers": n, "bytes": size} for k, (n, size) in self.formats.items()},
            "plain": {"tensors": self.plain[0], "bytes": self.plain[1], "layers": self.plain_layers},
            "not_looked_at": self.unread,
            "engines": self.engines,
            "engine_answers": self.answers,
            "findings": [f.to_json() for f in self.findings],
            "drift": self.drift,
        }


def _in_words(line: EngineLine) -> str:
    """The answer of an engine in a line."""
    parts = [line.engine, "loads" if line.loads else "does not load", *(["; ".join(line.notes)] if line.notes else [])]
    return ": ".join(parts) + (f" [{line.known}]" if line.known else "")


def counts(diagnosis: Diagnosis) -> dict[str, int]:
    """{level: findings}"""
    return {level: sum(f.level == level for f in diagnosis.findings) for level in (FAULT, WARNING, NOTE)}
