"""All families that are declared."""

from __future__ import annotations

from qkit.families import dit, encoder, llm, vlm

DECLARED = (*llm.FAMILIES, *vlm.FAMILIES, *dit.FAMILIES, *encoder.FAMILIES)
