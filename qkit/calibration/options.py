"""Values of options about calibration and evaluation data: imports no torch, so that a command can be checked before that is
loaded."""

from __future__ import annotations

DRAWN = "drawn"  # in the place of a file of pairs: the project's scenes
QUESTIONS = 500  # held-out pairs, unless more or fewer are asked for
