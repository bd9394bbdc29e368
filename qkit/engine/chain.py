"""The language model as a chain: rows that enter it, its blocks, and the head behind a norm.

Passes over the whole model, also those with gradients, need one block in memory: blocks are read from the disk one after
another, and what enters each of them is kept in a file until the way back, where the block runs once more. All pieces of a
batch go through a block before the next is read.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, NotOneAfterAnother
from qkit.calibration.statistics import Rows
from qkit.engine.entry import embed
from qkit.engine.job import Job
from qkit.families.blocks import BlockSequence, BlockStructure
from qkit.families.ends import final_norm
from qkit.families.materialize import load_block, release
from qkit.families.structure import ModelStructure
from qkit.files.offload import OffloadedTensors
from qkit.files.owned import temp_path
from qkit.nn.attention import PlainAttention
from qkit.planning.plan import Plan, sequences
from qkit.rounding.block import PIECE_TOKENS, cloned
from qkit.system.memory import give_back, ran_out
from qkit.system.parallel import Workers
from qkit.transforms.rotate import rotate_outer

# Free pieces that the heaps keep beside what is alive in such passes, which make many tensors of a few MB: half of it, and no
# more than so much. Measured with loss weights of SmolLM2, 30 blocks of 14 MB in float32.
_FRAGMENT_SHARE, _FRAGMENTS = 2, 256 << 20

Read = Callable[[str], Tensor]  # a tensor by its name in the checkpoint
Loading = Callable[[BlockStructure], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class BlockGradients:
    """A block on the way back, while its module is loaded.

    number:     of the block in the chain
    at_outputs: by piece, gradients at what left it
    parameters: by piece, gradients of its parameters by name; pieces run while this is read
    at_inputs:  by piece, gradients at what entered it, as far as ``parameters`` was read
    """

    number: int
    at_outputs: list[Tensor]
    parameters: Iterator[dict[str, Tensor]]
    at_inputs: list[Tensor]


@dataclass(frozen=True)
class Chain:
    """The original model, cut into what runs one after another.

    rows:   those that enter the first block
    blocks: with their calls, in running order
    behind: the model that reads what leaves the last block as its embeddings: the final norm and what is behind it
    """

    structure: ModelStructure
    rows: Rows
    blocks: tuple[tuple[BlockStructure, Call], ...]
    behind: Any
    pool: Workers

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.rows.path.unlink(missing_ok=True)

    @property
    def vocabulary(self) -> int:
        """Number of logits of a token."""
        return int(self.structure.text_config.vocab_size)

    def head(self, hidden: Tensor, behind: Any = None) -> Tensor:
        """Logits [n, vocabulary] of what leaves the last block, [n, hidden]. behind: with another head than the model's"""
        logits: Tensor = (self.behind if behind is None else behind)(
            inputs_embeds=hidden[None], use_cache=False
        ).logits[0]
        return logits

    def entering(self, rows: Sequence[int]) -> Tensor:
        """What enters the first block for these rows, [rows, length, hidden]."""
        with torch.inference_mode(False):
            return torch.cat([self.rows.read(i, i + 1) for i in rows])

    def offloaded(self) -> OffloadedTensors:
        """An empty list of tensors, in a file beside the rows."""
        return OffloadedTensors(self.rows.path.parent, self.rows.device)

    @contextmanager
    def loaded(self, block: BlockStructure, read: Read) -> Iterator[nn.Module]:
        """The module of a block with its weights."""
        with torch.inference_mode(False):
            module = load_block(self.structure, block, self.rows.dtype, read, self.rows.device)
        try:
            yield module
        finally:
            release(module)

    def forward(
        self, pieces: Sequence[Tensor], load: Loading, kept: OffloadedTensors | None = None,
        step: Callable[[], object] = lambda: None,
    ) -> list[Tensor]:  # fmt: skip
        """What leaves the last block. kept: gets what enters each block, block after block."""
        for block, call in self.blocks:
            if kept is not None:
                for x in pieces:
                    kept.append(x)
            with load(block) as module:

                def one(x: Tensor, call: Call = call, module: nn.Module = module) -> Tensor:
                    with torch.inference_mode(False), torch.no_grad(), PlainAttention():
                        return call(module, x)

                pieces = self.pool.map(one, pieces)
            step()
        return list(pieces)

    def leaving(self, load: Loading, rows: Sequence[int] | None = None) -> OffloadedTensors:
        """What leaves the last block, a tensor [length, hidden] for each of the rows; None: of all."""
        chosen = range(self.rows.count) if rows is None else rows
        before: OffloadedTensors | None = None
        for block, call in self.blocks:
            after = self.offloaded()
            with load(block) as module:

                def one(span: tuple[int, int], before: OffloadedTensors | None = before, call: Call = call,
                        module: nn.Module = module) -> Tensor:  # fmt: skip
                    with PlainAttention():
                        if before is None:
                            return call(module, self.entering(chosen[slice(*span)]))
                        return call(module, torch.stack([before[i] for i in range(*span)]))

                for piece in self.pool.stream(one, spans(len(chosen), self.rows.tokens)):
                    for row in piece:
                        after.append(row)
            before = after
        assert before is not None
        return before

    def backward(
        self, kept: OffloadedTensors, gradients: list[Tensor], load: Loading, step: Callable[[], object] = lambda: None
    ) -> Iterator[BlockGradients]:
        """The gradients of every block, from the last block to the first.

        kept, gradients: what ``forward`` kept, and the gradient at what it gave; parameters that ``load`` leaves with
        ``requires_grad`` get gradients
        """
        for number, (block, call) in reversed(list(enumerate(self.blocks))):
            with load(block) as module:
                leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
                at_inputs: list[Tensor] = []

                def one(
                    piece: int, call: Call = call, module: nn.Module = module, first: int = number * len(gradients),
                    leaves: dict[str, nn.Parameter] = leaves, at_outputs: list[Tensor] = gradients,
                ) -> tuple[Tensor, ...]:  # fmt: skip
                    with torch.inference_mode(False), torch.enable_grad(), PlainAttention():
                        x = kept[first + piece].requires_grad_()
                        return torch.autograd.grad(
                            call(module, x), [*leaves.values(), x], at_outputs[piece],
                            allow_unused=True, materialize_grads=True,
                        )  # fmt: skip

                by_piece = self._by_piece(one, len(gradients), list(leaves), at_inputs)
                yield BlockGradients(number, gradients, by_piece, at_inputs)
                if number:
                    deque(by_piece, maxlen=0)  # what was not read
            gradients = at_inputs
            step()

    def _by_piece(
        self, run: Callable[[int], tuple[Tensor, ...]], pieces: int, names: list[str], at_inputs: list[Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        for gradients in self.pool.stream(run, range(pieces)):
            at_inputs.append(gradients[-1])
            yield dict(zip(names, gradients, strict=False))


def spans(rows: int, tokens: int) -> list[tuple[int, int]]:
    """Rows as one worker runs them through the model at a time."""
    step = max(1, PIECE_TOKENS // tokens)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def with_fragments(alive: int) -> int:
    """Resident bytes of passes block after block. alive: bytes in use at the worst moment"""
    return alive + min(alive // _FRAGMENT_SHARE, _FRAGMENTS)


def is_chain(plan: Plan, structure: ModelStructure) -> bool:
    """Whether the model is taken to be a chain, as far as its structure tells."""
    calibration, last = plan.calibration, sequences(plan, structure)[-1]
    return calibration is not None and calibration.inputs is None and may_chain(structure, last)


def may_chain(structure: ModelStructure, language: BlockSequence) -> bool:
    """Whether a language model that continues a text is taken to be a chain. language: its blocks"""
    return not structure.towers and not structure.is_recorded(language) and final_norm(structure) is not None


def chain_of(
    plan: Plan, structure: ModelStructure, job: Job, pool: Workers, outer: torch.dtype | None = None
) -> Chain | None:
    """The original model of a plan as a chain, with its calibration rows; None for a model that is none. outer: as ``embed``
    has it

    That nothing but the norm is between blocks and head is proved on the first row, with stand-ins for the blocks.
    """
    if not is_chain(plan, structure):
        return None
    path = temp_path(job.rows_path(0).parent, "chain")
    chain = _proved_chain(plan, structure, job, pool, outer, path)
    if chain is None:
        path.unlink(missing_ok=True)
    return chain


def _proved_chain(
    plan: Plan, structure: ModelStructure, job: Job, pool: Workers, outer: torch.dtype | None, path: Path
) -> Chain | None:
    """path: of the rows"""
    base: Any = structure.model.base_model
    given: list[Any] = []
    handle = base.register_forward_hook(lambda _, args, out: given.__setitem__(slice(None), [out[0]]))
    sequence = sequences(plan, structure)[-1]
    try:
        rows, calls = embed(plan, structure, job, sequence, path, lambda: None, outer=outer)
    except NotOneAfterAnother:
        return None
    finally:
        handle.remove()
    blocks = tuple((b, cloned(calls[b.index])) for b in sequence.blocks if b.index in calls)
    model = _behind_blocks(plan, structure, rows.dtype)
    if model is None or any(not isinstance(call, Call) for _, call in blocks):
        return None
    give_back()

    chain = Chain(structure, rows, blocks, model, pool)  # type: ignore[arg-type]
    return chain if _is_proved(chain, given) else None


class _Norm(nn.Module):
    """Stand-in for a model without its head, which gets what leaves the last block as its embeddings."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast  # has all fields that a head's model reads

        return MoeModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))


def _behind_blocks(plan: Plan, structure: ModelStructure, dtype: torch.dtype) -> Any:
    """The model with its final norm alone in the place of all that is before the head; None where more is beside it."""
    whole: Any = structure.model
    norm, base = final_norm(structure), whole.base_model_prefix
    beside = [(n, m) for n, m in whole.named_children() if n != base]
    nothing_else = (
        not whole._parameters and not whole._buffers and not any(True for _, m in beside for _ in m.buffers())
    )
    if norm is None or not norm.startswith(f"{base}.") or not nothing_else:
        return None
    rewritten = rotate_outer(structure, plan.seed) if "rotate" in plan.transforms else {}

    def with_weights(path: str) -> nn.Module:
        copied = nn.Module.to(copy.deepcopy(whole.get_submodule(path)), dtype)
        module: nn.Module = copied.to_empty(device=plan.torch_device)
        for leaf, p in module.named_parameters():
            stored = structure.stored_name(f"{path}.{leaf}")
            value = rewritten.get(stored)
            value = structure.checkpoint.read(structure.tied.get(stored, stored)) if value is None else value
            p.data.copy_(value)
        return module.requires_grad_(False)

    with torch.inference_mode(False):
        model = _with_parts(whole, {n: with_weights(n) for n, _ in beside})
        return in_place(model, norm.rpartition(".")[0].split("."), _Norm(with_weights(norm)))


def _with_parts(module: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    """A copy of a module with other children, which shares all else."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **parts}
    return copied


def in_place(module: nn.Module, path: Sequence[str], part: nn.Module) -> nn.Module:
    """A copy of a module that has ``part`` at the path, and shares all else."""
    name, *rest = path
    return _with_parts(module, {name: in_place(module.get_submodule(name), rest, part) if rest else part})


def _is_proved(chain: Chain, given: list[Any]) -> bool:
    """given: what the model without its head returned for the first row, its blocks handing hidden states on unchanged"""
    entered = chain.rows.read(0, 1)
    if not given or not isinstance(given[0], Tensor) or given[0].shape != entered.shape:
        return False
    try:
        with torch.inference_mode():
            ours = chain.behind.base_model(inputs_embeds=entered).last_hidden_state.float().cpu()
            fits = chain.head(entered[0, :1]).shape == (1, chain.vocabulary)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:
        if ran_out(e):
            raise
        return False
    true = given[0].float()
    return fits and float((ours - true).norm()) <= 0.02 * float(true.norm())
