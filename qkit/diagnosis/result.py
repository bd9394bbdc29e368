"""The result of a diagnosis: what a file holds, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qkit.diagnosis.findings import FAULT, Finding


@dataclass
class Diagnosis:
    """What was found. formats: {format in words: [layers, bytes]}; plain: [tensors, bytes] of what is not quantized,
    plain_layers: {its matrices: the reason}; drift: each weight against the baseline, worst first"""

    path: str
    kind: str = "model folder"
    method: str | None = None
    made_by: str | None = None
    formats: dict[str, list[int]] = field(default_factory=dict)
    plain: list[int] = field(default_factory=lambda: [0, 0])
    plain_layers: dict[str, str] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    drift: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether there is no fault; warnings do not count."""
        return not any(f.level == FAULT for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "path": self.path,
            "kind": self.kind,
            "sound": self.sound,
            "method": self.method,
            "made_by": self.made_by,
            "formats": {k: {"layers": n, "bytes": size} for k, (n, size) in self.formats.items()},
            "plain": {"tensors": self.plain[0], "bytes": self.plain[1], "layers": self.plain_layers},
            "engines": self.engines,
            "findings": [f.to_json() for f in self.findings],
            "drift": self.drift,
        }


def counts(diagnosis: Diagnosis) -> dict[str, int]:
    """{level: findings}"""
    found: dict[str, int] = {}
    for f in diagnosis.findings:
        found[f.level] = found.get(f.level, 0) + 1
    return found
