"""Which matrices of a block read the same tensor, as a run of the model without memory shows.

The skeleton lies on the meta device: a run computes shapes alone, in a second and without weights. Two matrices read the same
tensor where their inputs are one object. A norm feeds them where that object is its output, and nothing else reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkit.families.blocks import Group
from qkit.families.matrices import fused_experts, matrix_of
from qkit.families.norms import is_norm
from qkit.families.operators import tensors_in
from qkit.families.stream import Stream
from qkit.families.stream_trace import StreamTrace
from qkit.families.text_arguments import text_arguments

# Siblings that by these names read one input.
_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
_TOKENS = 8  # length of the row; what a run does with it does not depend on values
_LOOKS = (
    "__get__",
    "size",
    "dim",
    "numel",
    "is_floating_point",
)  # at the shape or dtype of a tensor, not at its values
# What a run without values stops at: operators that need values, and inputs that a text does not have.
_STOPS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


@dataclass
class Reads:
    """What a run showed. Tensors are on the meta device: only which object they are counts.

    inputs:  {module: its inputs, call after call}, of blocks and matrices; feeds: {module: what it returns}, of norms
    calls:   how often each block, matrix and norm ran, in the order of their first calls
    whole:   the run came to its end
    readers: for each tensor, by its id, how many operators read it
    stream:  how values pass through
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    feeds: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    readers: Counter[int] = field(default_factory=Counter)
    whole: bool = False
    stream: Stream = field(default_factory=Stream)

    def groups(self, path: str, names: Sequence[str]) -> list[Group]:
        """Matrices of a block by the tensor that they read, in the order of ``names``.

        path: of the block; names: of its matrices. Those that did not run are grouped by their names.
        """
        once: dict[tuple[int, ...], list[str]] = {}
        repeated: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            if f"{path}.{name}" in self.inputs:
                members = repeated if self._repeats(path, name) else once
                members.setdefault(self._key(path, name), []).append(name)
        for key, own in list(once.items()):  # queries of tokens whose keys and values are made of more (T5Gemma 2)
            more = next((k for k in repeated if set(key) < set(k) and _siblings([*repeated[k], *own])), None)
            if more is not None:
                repeated[more] += once.pop(key)
        found = [Group(tuple(g), source=self._source(path, key[0], len(g))) for key, g in once.items()]
        found += [Group(tuple(g)) for g in repeated.values()]
        return [*found, *guessed_groups([n for n in names if f"{path}.{n}" not in self.inputs])]

    def _key(self, path: str, name: str) -> tuple[int, ...]:
        """Which tensors a matrix reads: its first one; all of them where it runs more than once in a pass of its block."""
        found = self.inputs[f"{path}.{name}"]
        return tuple(map(id, found if self._repeats(path, name) else found[:1]))

    def _repeats(self, path: str, name: str) -> bool:
        """Whether a module runs more than once in a pass of its block: it has several inputs."""
        return self.calls[f"{path}.{name}"] > self.calls[path]

    def unread(self, path: str, names: Sequence[str]) -> list[str]:
        """Of the matrices of a block that ran, those that did not: the block looks at their weight, or they were not needed."""
        return [n for n in names if self.calls[path] and f"{path}.{n}" not in self.inputs]

    def _source(self, path: str, key: int, count: int) -> str | None:
        """The norm of the block that feeds these matrices and nothing else; None where the run does not show all readers."""
        norm = next((n for n, out in self.feeds.items() if id(out) == key and n.startswith(f"{path}.")), None)
        name = None if norm is None else norm.removeprefix(f"{path}.")
        if name is None or self._repeats(path, name) or not self.whole or self.readers[key] != count:
            return None
        return name


class _Readers(TorchFunctionMode):
    """Counts the operators that read each tensor."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _LOOKS:
            self.reads.readers.update(id(x) for x in tensors_in((args, kwargs)))
        return func(*args, **(kwargs or {}))


def guessed_groups(names: Sequence[str]) -> list[Group]:
    """Matrices of a block by what their names say of their inputs, where no run shows it."""
    groups: list[Group] = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        shared = next((s for s in _SHARED if leaf in s), (leaf,))
        members = tuple(f"{parent}.{s}" if parent else s for s in shared)
        members = members if all(m in names for m in members) else (name,)
        if all(name not in g.linears for g in groups):
            groups.append(Group(members))
    return groups


def _siblings(names: Sequence[str]) -> bool:
    """Whether matrices are those that engines load as one, by their names."""
    return any(set(names) <= set(g.linears) for g in guessed_groups(names))


class _Experts(nn.Module):
    """Stand-in for routed experts, whose run depends on values: hands on a tensor of the right shape."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty_like(hidden)


def run_without_values(model: nn.Module, blocks: Sequence[str], embeddings: str = "") -> Reads:
    """Run a model on the meta device on a short text. blocks: paths of the blocks; embeddings: of the table of tokens"""
    reads, replaced = Reads(), {}
    base: Any = getattr(model, "base_model", model)
    trace = StreamTrace(model, embeddings)

    def look(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reads.calls[name] += 1
            x = next(tensors_in((args, kwargs)), None)
            if x is not None:
                reads.inputs.setdefault(name, []).append(x)

        return hook

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            reads.calls[name] += 1
            if isinstance(out, Tensor) and name not in reads.feeds:
                reads.feeds[name] = out
                reads.readers[id(out)] = 0  # what the norm itself did

        return hook

    def ended(*_: Any) -> None:
        reads.whole = True

    handles = [base.register_forward_hook(ended), *trace.watch(model)]
    for path in blocks:
        block = model.get_submodule(path)
        handles += trace.watch_block(path, block)
        handles.append(block.register_forward_pre_hook(look(path), with_kwargs=True))
        for name, module in block.named_modules(prefix=path):
            if matrix_of(module):
                handles.append(module.register_forward_pre_hook(look(name), with_kwargs=True))
            elif is_norm(module):
                handles.append(module.register_forward_hook(keep(name)))
        for experts in fused_experts(block):
            name = f"{path}.{experts.module}"
            replaced[name] = model.get_submodule(name)
            stand_in = _Experts()
            model.set_submodule(name, stand_in)
            bias = hasattr(replaced[name], f"{experts.down}_bias")
            handles += trace.watch_experts(name, stand_in, experts.first, experts.down, bias)
    try:
        for part in (model, base):  # the class may ask for more than its base does
            with torch.inference_mode(), suppress(*_STOPS), _Readers(reads), trace.dispatch_watch, trace:
                tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
                part(**text_arguments(part, {"input_ids": tokens}))
                reads.whole = True  # some classes do not call their base as a whole
            if reads.calls or reads.whole:
                break
        reads.stream = trace.finish(tuple(blocks), reads.whole)
    finally:
        for handle in handles:
            handle.remove()
        for name, module in replaced.items():
            model.set_submodule(name, module)
    return reads
