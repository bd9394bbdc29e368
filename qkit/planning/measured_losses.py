"""What formats cost SmolLM2-135M-Instruct: the figures by which ``qkit recommend`` compares schemes without a profile.

``reports/comparison/losses.py`` writes the JSON file beside this one from the reports of levels and of KV caches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class MeasuredLosses:
    """Mean KL divergence from the original in nats a token: of packed files by scheme, of KV caches by vLLM's name.

    model: what was measured; quality: the level of the files; text: on which text; cache_context: tokens that the caches were
    measured at
    """

    model: str
    quality: str
    text: str
    schemes: Mapping[str, float]
    caches: Mapping[str, float]
    cache_context: int


@cache
def measured_losses() -> MeasuredLosses:
    """The figures that travel with qkit."""
    return MeasuredLosses(**json.loads(FILE.read_text()))
