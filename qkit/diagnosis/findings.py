"""What a diagnosis finds: one entry for each kind of fault, with the layers that have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FAULT, WARNING, NOTE = "fault", "warning", "note"
_ORDER = {FAULT: 0, WARNING: 1, NOTE: 2}


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    level:  "fault" (the file is wrong), "warning" (it may be, or it will not serve everywhere) or "note"
    kind:   the kind of check, in words; layers: what it is about, by the names of the file
    weight: how bad it is among findings of its level, for the order
    """

    level: str
    kind: str
    layers: tuple[str, ...]
    found: str
    expected: str
    advice: str
    weight: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All that is printed, as a JSON-able dictionary."""
        return {
            "level": self.level,
            "kind": self.kind,
            "layers": list(self.layers),
            "found": self.found,
            "expected": self.expected,
            "advice": self.advice,
        }


@dataclass
class Findings:
    """The findings of a file. Two with the same words are one, about the layers of both."""

    entries: dict[tuple[str, str, str, str, str], tuple[dict[str, None], float]] = field(default_factory=dict)

    def add(
        self,
        level: str,
        kind: str,
        layers: str | Iterable[str],
        found: str,
        expected: str,
        advice: str,
        weight: float = 0.0,
    ) -> None:
        """Note one finding. weight: larger is worse"""
        names = [layers] if isinstance(layers, str) else [*layers]
        known, worst = self.entries.setdefault((level, kind, found, expected, advice), ({}, weight))
        known.update(dict.fromkeys(names))
        self.entries[level, kind, found, expected, advice] = known, max(worst, weight)

    def fault(
        self, kind: str, layers: str | Iterable[str], found: str, expected: str, advice: str, weight: float = 0.0
    ) -> None:
        """Note a fault."""
        self.add(FAULT, kind, layers, found, expected, advice, weight)

    def warn(
        self, kind: str, layers: str | Iterable[str], found: str, expected: str, advice: str, weight: float = 0.0
    ) -> None:
        """Note a warning."""
        self.add(WARNING, kind, layers, found, expected, advice, weight)

    def note(self, kind: str, layers: str | Iterable[str], found: str, expected: str = "", advice: str = "") -> None:
        """Note something to know, which is no fault."""
        self.add(NOTE, kind, layers, found, expected, advice)

    def sorted(self) -> list[Finding]:
        """All of them, worst first."""
        found = [
            Finding(level, kind, tuple(layers), what, expected, advice, weight)
            for (level, kind, what, expected, advice), (layers, weight) in self.entries.items()
        ]
        return sorted(found, key=lambda f: (_ORDER[f.level], -f.weight, -len(f.layers), f.kind))


def report_unread(unread: Mapping[str, str], layers: int, findings: Findings) -> None:
    """Warn of what was not looked at. unread: {layer or tensor: why}; layers: how many quantized layers there are"""
    for why in dict.fromkeys(unread.values()):
        names = [name for name, reason in unread.items() if reason == why]
        findings.warn(
            "not looked at", names, f"{len(names)} of {layers} quantized layers were not looked at: {why}",
            "layers that qkit decodes", "load the file in the tool that wrote it, and see whether its answers are right", 5,
        )  # fmt: skip
