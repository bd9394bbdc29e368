"""The names of measures and of a profile's file. This file imports no torch, so that a command is checked before torch is
loaded."""

from __future__ import annotations

from qkit.errors import UsageError

PROFILE = "profile.json"  # in the folder of a profile
MEASURED = "measured.jsonl"  # there, and its first file
MEASURES = ("weight", "output", "output_norm", "first", "first_x", "fisher", "pqi", "loss", "kl")
KL, FISHER = "kl", "fisher"
BLOCKWISE = ("weight", "output", "first", FISHER)  # of a text these need one block of the model in memory at a time
PREFERRED = (
    KL,
    "pqi",
    FISHER,
    "loss",
    "output",
    "weight",
)  # best first, as plans by them were measured (reports/allocation)


def check_measures(names: tuple[str, ...], option: str = "--measures") -> None:
    """Raises UsageError for measures that there are not, or none at all. option: that names them"""
    if not names:
        raise UsageError(f"{option}: none is given: expected some of {', '.join(MEASURES)}")
    unknown = next((m for m in names if m not in MEASURES), None)
    if unknown is not None:
        raise UsageError(f"{option} {unknown}: there is no such measure: expected some of {', '.join(MEASURES)}")


def best_measure(measures: tuple[str, ...]) -> str:
    """The measure that a budget or a curve uses when nobody says: of these, what is nearest to a whole plan's KL divergence."""
    measure = next((m for m in (*PREFERRED, *measures) if m in measures), None)
    if measure is None:
        raise UsageError("the profile has no measure: add one to --measures")
    return measure
