"""Builds the structure of a block from its modules: its matrices, which of them read one input, and their names in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qkit.errors import BadCheckpoint
from qkit.families.blocks import BlockStructure, FusedExperts, Group, Linear, LinearGroup, Stack, head_width
from qkit.families.matrices import fused_experts, matrix_of, routes, stacks_of
from qkit.families.sharing import Reads
from qkit.families.stored_parameters import StoredParameters


class BlockBuilder:
    """Builds blocks of a model.

    names: of its parameters in the checkpoint; reads: what a run of a discovered model showed; text_config: of the text model
    """

    def __init__(self, model: nn.Module, names: StoredParameters, reads: Reads | None, text_config: Any) -> None:
        self.model, self.names, self.reads, self.text_config = model, names, reads, text_config

    def build(self, index: int, path: str, declared: tuple[Group, ...]) -> BlockStructure:
        """The structure of the block at ``path``. declared: groups of its linears, where the family declares them"""
        module = self.model.get_submodule(path)
        fused = tuple(fused_experts(module))
        stacks = tuple(stacks_of(module))
        apart = {p for x in fused for p in x.params} | {x.param for x in stacks}
        groups = list(self._plain_groups(module, path, declared))
        for experts in fused:
            groups += self._expert_groups(module, path, experts)
        groups += self._stack_groups(module, path, stacks)
        stored = [
            (name, self.names.name_of(f"{path}.{name}"))
            for name, _ in (*module.named_parameters(remove_duplicate=False), *persistent_buffers(module))
            if name not in apart
        ]
        stored += [(x.param, f"{x.name}.weight") for g in groups for x in g.linears if x.expert is not None]
        return BlockStructure(index, path, tuple(groups), tuple(stored), fused, stacks)

    def _plain_groups(self, module: nn.Module, path: str, groups: tuple[Group, ...]) -> Iterator[LinearGroup]:
        all_modules = dict(module.named_modules())
        modules = {
            n: found
            for n, m in all_modules.items()
            if (found := matrix_of(m)) is not None
            and not routes(n, module)
            and not self.names.is_shared(f"{path}.{n}.weight")
        }
        groups = groups if self.reads is None else self._seen_groups(path, list(modules))
        declared: list[Group] = []
        covered: set[str] = set()
        for group in groups:
            is_present = all(n in modules for n in group.linears) and (
                group.source is None or group.source in all_modules
            )
            if is_present and not covered & set(group.linears):
                declared.append(group)
                covered |= set(group.linears)
        # A linear that the declaration does not mention is still quantized, on its own.
        for group in (*declared, *(Group((n,)) for n in modules if n not in covered)):
            linears = tuple(self._plain_linear(module, path, n, *modules[n]) for n in group.linears)
            yield LinearGroup(linears, self._as_configured(group), group.linears[0])

    def _seen_groups(self, path: str, names: list[str]) -> tuple[Group, ...]:
        """Groups that a run of the model showed. A norm or a linear that several blocks share feeds others, too."""
        assert self.reads is not None
        groups = [
            replace(g, source=g.source or self._fed_by(path, g.linears, names)) for g in self.reads.groups(path, names)
        ]
        return tuple(
            replace(g, source=None) if g.source and self.names.is_shared(f"{path}.{g.source}.weight") else g
            for g in groups
        )

    def _fed_by(self, path: str, linears: tuple[str, ...], names: list[str]) -> str | None:
        """The linear of the block whose outputs these linears read, where nothing else does. names: of all its matrices"""
        assert self.reads is not None
        feeds, readers = self.reads.stream.feeds, [f"{path}.{n}.weight" for n in linears]
        found = [feeds[n] for n in readers if n in feeds]
        sources = {feed.source for feed in found}
        name = next(iter(sources), "").removeprefix(f"{path}.").removesuffix(".weight")
        alone = len(sources) == 1 and [n for n, feed in feeds.items() if feed.source in sources] == readers
        if not alone or name not in names or not isinstance(self.model.get_submodule(f"{path}.{name}"), nn.Linear):
            return None
        outputs = int(self.model.get_parameter(f"{path}.{name}.weight").shape[0])
        in_heads = len(found[0].channels) != outputs  # heads of values are repeated
        if in_heads and found[0].head != head_width(self.text_config):
            return None
        return name if all(feed.head_pattern(outputs) for feed in found) else None

    def _plain_linear(
        self, block: nn.Module, path: str, name: str, outputs: int, inputs: int, transposed: bool
    ) -> Linear:
        stored = self.names.name_of(f"{path}.{name}.weight").removesuffix(".weight")
        if transposed:
            matrix = Linear(name=stored, param="", shape=(outputs, inputs), transposed=True)
            self.names.add_slice(matrix, f"{path}.{name}.weight", (inputs, outputs))
        return Linear(
            name=stored,
            param=f"{name}.weight",
            shape=(outputs, inputs),
            bias=getattr(block.get_submodule(name), "bias", None) is not None,
            transposed=transposed,
        )

    def _as_configured(self, group: Group) -> Group:
        """The declared group, without its source where this model's config excludes it."""
        if group.source_if is None:
            return group
        field, value = group.source_if
        return group if getattr(self.text_config, field, None) == value else replace(group, source=None)

    def _expert_groups(self, module: nn.Module, path: str, experts: FusedExperts) -> Iterator[LinearGroup]:
        first, down = (
            self._stacked_linears(
                module, path, p, experts.module, experts.transposed, experts.halves and p == experts.params[0]
            )
            for p in experts.params
        )
        for e in range(experts.count):
            yield LinearGroup(first[e], Group(()), experts.module, e)
            yield LinearGroup(down[e], Group(()), "", e)

    def _stack_groups(self, module: nn.Module, path: str, stacks: tuple[Stack, ...]) -> Iterator[LinearGroup]:
        """One group for each matrix of a stack; a gate and what it gates are in one, also where they are two stacks."""
        members: dict[tuple[str, int], list[Linear]] = {}
        for stack in stacks:
            owner, _, leaf = stack.param.rpartition(".")
            # Halves that are stored one by one stay linears of their own.
            halves = any(p.rows for p in self.names.conversion.pieces.get(f"{path}.{stack.param}", ()))
            key = owner if leaf in ("gate_proj", "up_proj") else stack.param
            for e, linears in enumerate(
                self._stacked_linears(module, path, stack.param, owner, stack.transposed, halves)
            ):
                members.setdefault((key, e), []).extend(linears)
        for (_, e), found in members.items():
            yield LinearGroup(tuple(found), Group(()), "", e, found[0].param)

    def _stacked_linears(
        self, module: nn.Module, path: str, param: str, owner: str, transposed: bool, halves: bool
    ) -> list[tuple[Linear, ...]]:
        """For each matrix of a parameter, its linears: a gate and what it gates where it has ``halves``, else one."""
        shape = module.get_parameter(param).shape
        outputs, inputs = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        if shape[0] > 16 * len(self.names.checkpoint.tensors):  # before there is a name for each
            raise BadCheckpoint(
                f"{self.names.checkpoint.path}: config.json implies {shape[0]} experts a block, and the file has "
                f"{len(self.names.checkpoint.tensors)} tensors in all: get the config of this model"
            )
        leaves = ("gate_proj", "up_proj") if halves else (param.rpartition(".")[2],)
        rows = outputs // len(leaves)
        pieces = {(p.expert, p.rows): p.stored for p in self.names.conversion.pieces.get(f"{path}.{param}", ())}
        prefix = self.names.conversion.stored_name(f"{path}.{owner}")
        result = []
        for e in range(shape[0]):
            linears = []
            for i, leaf in enumerate(leaves):
                span = (i * rows, (i + 1) * rows) if halves else None
                stored = pieces.get((e, span))
                name = (
                    f"{prefix}.{e}.{leaf}".removesuffix(".weight") if stored is None else stored.removesuffix(".weight")
                )
                linear = Linear(
                    name=name, param=param, shape=(rows, inputs), expert=e, rows=span, transposed=transposed
                )
                if stored is None:
                    self.names.add_slice(linear, f"{path}.{param}", tuple(shape))
                linears.append(linear)
            result.append(tuple(linears))
        return result


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, buffer) of the buffers that a checkpoint stores."""
    for prefix, m in module.named_modules():
        for name, buffer in m.named_buffers(recurse=False):
            if name not in m._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
