"""Values of options about calibration and evaluation data: imports no torch, so that a command can be checked before that is
loaded."""

from __future__ import annotations

DRAWN = "drawn"  # the project's scenes, in place of a file of image-text data
QUESTIONS = 500  # default number of held-out questions
