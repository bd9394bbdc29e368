"""The layers that an engine makes of the linears of a file: several as one, and one rank's part of each.

vLLM joins linears by their names, and splits them by their names, too: some by their rows, those that end a branch by their
columns. What does not divide is refused there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from qkit.verification.fused_layers import expert_groups, fused_groups
from qkit.verification.vllm_table import COLUMN, EXPERTS

# The last parts of names of linears that vLLM splits by columns, and of those that every rank has whole.
ENDS_BRANCH = {"o_proj", "out_proj", "down_proj", "w2", "wo", "fc2", "c_proj", "dense", "dense_4h_to_h", "fc_out"}
_WHOLE = {"gate", "router", "q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj"}
_INTO_EXPERT = ("gate_proj", "w1", "up_proj", "w3", "fc1")


class Numbers(Protocol):
    """What a split of a weight looks at."""

    @property
    def group(self) -> int | None: ...
    @property
    def block(self) -> tuple[int, int] | None: ...


class Stored(Protocol):
    """A linear [out, in] of a file."""

    @property
    def weights(self) -> Any: ...
    @property
    def shape(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class LoadedLayer:
    """One layer of an engine, as one rank has it. kind: COLUMN or EXPERTS; rows, columns: of experts those of one projection
    into them; problem: why it cannot be split like that"""

    names: tuple[str, ...]
    kind: str
    rows: int
    columns: int
    problem: str = ""


@dataclass(frozen=True)
class Split:
    """How many tensor-parallel ranks share a model, and what of it they have to divide: heads of queries and of keys and
    values, where config.json tells."""

    ranks: int = 1
    heads: int | None = None
    kv_heads: int | None = None

    @staticmethod
    def of(config: Mapping[str, Any], ranks: int) -> Split:
        """The split of a model with this config.json."""
        inner = config.get("text_config")
        text = inner if isinstance(inner, Mapping) else config
        heads, kv_heads = (text.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
        whole = heads if isinstance(heads, int) else None
        return Split(ranks, whole, kv_heads if isinstance(kv_heads, int) else whole)

    @property
    def problem(self) -> str:
        """Why the ranks cannot share the heads."""
        if self.ranks == 1 or self.heads is None or not self.heads % self.ranks:
            return ""
        return f"its {self.heads} attention heads cannot be shared out to {self.ranks} ranks"

    @property
    def kv_ranks(self) -> int:
        """Among how many ranks keys and values are shared out; the others have copies."""
        return min(self.ranks, self.kv_heads or self.ranks)


def loaded_layers(parts: Mapping[str, Stored], split: Split) -> list[LoadedLayer]:
    """The layers of linears of one combination of formats."""
    layers = list(_experts(parts, split))
    left = {name for name in parts if not any(name in layer.names for layer in layers)}
    for group in fused_groups(left):
        layers.append(_joined(tuple(group), parts, split))
        left.difference_update(group)
    return [*layers, *(_joined((name,), parts, split) for name in parts if name in left)]


def _experts(parts: Mapping[str, Stored], split: Split) -> Iterator[LoadedLayer]:
    for layer, names in expert_groups(parts).items():
        into = next((n for n in names if n.rpartition(".")[2] in _INTO_EXPERT), None)
        if into is None:
            continue
        (rows, columns), numbers = parts[into].shape, parts[into].weights
        problem = _uneven(f"the experts of {layer}", rows, split.ranks, numbers, "intermediate columns")
        yield LoadedLayer(tuple(names), EXPERTS, rows // split.ranks, columns, problem)


def _joined(names: tuple[str, ...], parts: Mapping[str, Stored], split: Split) -> LoadedLayer:
    rows, columns, problem = 0, parts[names[0]].shape[1], ""
    leaf = names[0].rpartition(".")[2]
    if leaf in ENDS_BRANCH and split.ranks > 1:
        problem = _uneven(names[0], columns, split.ranks, parts[names[0]].weights, "input columns")
        return LoadedLayer(names, COLUMN, parts[names[0]].shape[0], columns // split.ranks, problem)
    for name in names:
        own = name.rpartition(".")[2]
        ranks = 1 if own in _WHOLE else split.kv_ranks if own in ("k_proj", "v_proj") else split.ranks
        height, block = parts[name].shape[0], parts[name].weights.block
        rows += height // ranks
        if height % ranks:
            problem = problem or f"the {height} output rows of {name} cannot be shared out to {ranks} ranks"
        elif split.ranks > 1 and block is not None and height // ranks % block[0]:
            problem = problem or (
                f"the {height} output rows of {name} are {height // ranks} on each of {ranks} ranks, and no whole blocks of "
                f"{block[0]}"
            )
    return LoadedLayer(names, COLUMN, rows, columns, problem)


def _uneven(name: str, size: int, ranks: int, numbers: Numbers, what: str) -> str:
    """Why columns cannot be split; '' where they can."""
    if ranks == 1:
        return ""
    if size % ranks:
        return f"the {size} {what} of {name} cannot be shared out to {ranks} ranks"
    unit = numbers.block[1] if numbers.block else numbers.group
    if unit is None or not size // ranks % unit:
        return ""
    kind = "blocks" if numbers.block else "groups"
    return f"the {size} {what} of {name} are {size // ranks} on each of {ranks} ranks, and no whole {kind} of {unit}"
