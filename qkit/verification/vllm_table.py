"""What vLLM 0.32 selects for a layer, from a table that its own code was asked for (``tools/vllm_table.py``).

The table has one row for each combination of formats and each kind of GPU: a list of rules on the powers of two that divide
the rows and columns of a layer. The first rule that holds gives scheme and kernel, or the words of a refusal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

TABLE = Path(__file__).with_name("vllm_table.json")
GPUS = ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120")
CPU = "cpu"
GROUPS = (16, 32, 64, 128, 256)  # groups of integers that have rows of their own
OTHER, WHOLE = "other", "whole"  # all other groups: those that divide a row, and those that are one
SMALL = 128  # layers with fewer rows or columns may have rows of their own
COLUMN, EXPERTS = "column", "experts"


class NumberFormat(Protocol):
    """The fields of a number format that decide which kernel can read it."""

    @property
    def kind(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def strategy(self) -> str: ...
    @property
    def group(self) -> int | None: ...
    @property
    def block(self) -> tuple[int, int] | None: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def scale(self) -> str: ...
    @property
    def dynamic(self) -> bool: ...


@dataclass(frozen=True)
class Choice:
    """What vLLM chose for a layer: the class of its scheme, that of its kernel or the name of its backend; or why it refuses
    it."""

    scheme: str = ""
    kernel: str = ""
    refused: str = ""


def format_key(
    weights: NumberFormat, activations: NumberFormat | None, packing: str, columns: int | None = None
) -> str:
    """The name of a combination of formats in the table. columns: of the weight, where it is known"""
    return f"{packing} {_key(weights, columns)}" + ("" if activations is None else f" x {_key(activations)}")


def _key(numbers: NumberFormat, columns: int | None = None) -> str:
    group: object = numbers.group
    if group is not None and numbers.kind == "int" and group not in GROUPS:
        group = WHOLE if group == columns else OTHER
    words = [
        numbers.kind if numbers.kind[-1].isdigit() else f"{numbers.kind}{numbers.bits}",
        *(() if numbers.symmetric else ("asym",)),
        numbers.strategy,
    ]
    words += [str(group)] if group is not None else []
    words += [*([numbers.scale] if numbers.scale != "model" else []), *(["dynamic"] if numbers.dynamic else [])]
    return " ".join(words)


@cache
def _table() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(TABLE.read_text())
    return data


def version() -> str:
    """The engine and the version whose code was asked: 'vLLM 0.32'."""
    data = _table()
    return f"{data['engine']} {data['version'].rpartition('.')[0]}"


def has_class(name: str) -> bool:
    """Whether the engine has a class of its own for a model."""
    return name in _table()["architectures"]


def known(key: str) -> bool:
    """Whether the table has a combination of formats."""
    return key in _table()["rows"][f"{COLUMN}/bfloat16"]


def choice(kind: str, key: str, gpu: str, rows: int, columns: int, dtype: str = "bfloat16") -> Choice | None:
    """What vLLM chose for a layer [rows, columns] of a kind of GPU (or CPU); for experts: rows are those of one projection
    into them, and columns those of their input. None: the table has no such combination."""
    data = _table()["rows"]
    half = f"{kind}/float16"
    part = half if dtype == "float16" and gpu in data.get(half, {}).get(key, {}) else f"{kind}/bfloat16"
    small = data.get(f"{part}/small", {}).get(key, {}) if min(rows, columns) < SMALL else {}
    found: Mapping[str, int] = small if gpu in small else data.get(part, {}).get(key, {})
    if gpu not in found:
        return None
    for n, k, answer in _table()["rules"][found[gpu]]:
        if rows % n == 0 and columns % k == 0:
            return _parsed(answer)
    return None


def _parsed(answer: str) -> Choice:
    if answer.startswith("!"):
        return Choice(refused=answer[1:])
    scheme, _, kernel = answer.partition(": ")
    return Choice(scheme, kernel)
