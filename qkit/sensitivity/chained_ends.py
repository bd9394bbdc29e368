"""The embeddings and the head of a model that runs block after block: their gradients, and what replacing them changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from qkit.calibration.batches import Batch
from qkit.engine.chain import Chain, in_place
from qkit.families.ends import End, factor_of, find_ends, is_lookup
from qkit.rounding.sliced import at_logits, slices

_ROWS = 4096  # of the gradient of a matrix that are made at a time
_SAME = 2.0**-6  # of the largest hidden state: scaled embeddings of 16 bits lose half of that at the most


@dataclass(frozen=True)
class ChainedEnds:
    """embeddings, head: as far as they are units"""

    chain: Chain
    pieces: tuple[Batch, ...]
    embeddings: End | None
    head: End | None

    @staticmethod
    def of(chain: Chain, pieces: tuple[Batch, ...], wanted: Sequence[str]) -> ChainedEnds | None:
        """The ends among these units; None where what enters the first block is more than rows of the embeddings, each
        multiplied by one constant, and something that depends on the position alone."""
        embeddings, head = (e if e and _stored(chain, e) in wanted else None for e in find_ends(chain.structure))
        ends = ChainedEnds(chain, pieces, embeddings, head)
        return ends if embeddings is None or (not embeddings.also and ends._only_looks_up()) else None

    def _only_looks_up(self) -> bool:
        assert self.embeddings is not None
        if not is_lookup(self.chain.structure.model.get_submodule(self.embeddings.path)):
            return False
        table = self.table(self.embeddings)
        first: Tensor | None = None
        for row in range(len(self.pieces)):
            entered = self.chain.entering([row])[0].float()
            left = (entered - self.factor * table[self.pieces[row].ids[0]])[self._counted(row)]
            first = left if first is None else first
            length = min(len(left), len(first))
            if float((left[:length] - first[:length]).abs().max()) > _SAME * float(entered.abs().max()):
                return False
        return True

    def _counted(self, row: int) -> slice:
        """The tokens of a row before its padding."""
        mask = self.pieces[row].mask
        return slice(None) if mask is None else slice(int(mask.nonzero()[-1, -1]) + 1)

    @cached_property
    def factor(self) -> float:
        """What rows of the embeddings are multiplied by."""
        assert self.embeddings is not None
        scaled = factor_of(self.chain.structure.model.get_submodule(self.embeddings.path))
        return 1.0 if scaled is None else scaled[0]

    def table(self, end: End) -> Tensor:
        """The matrix, float32 [vocabulary, width]."""
        return self.chain.structure.checkpoint.read_finite(f"{_stored(self.chain, end)}.weight").float()

    # ---- gradients -------------------------------------------------------------------------------------------

    def gradients(
        self, leaving: Sequence[Tensor], at_inputs: Sequence[Tensor], weights: Sequence[float], squares: bool
    ) -> Iterator[dict[str, Tensor]]:
        """{matrix: the sum over rows of its gradients, or of their squares, times ``weights``}; a tied matrix has the gradient
        of both of its uses.

        leaving, at_inputs: by row, what leaves the last block and the gradient at what enters the first, [1, length, hidden]
        """
        by_name: dict[str, list[End]] = {}
        for end in (self.embeddings, self.head):
            if end is not None:
                by_name.setdefault(_stored(self.chain, end), []).append(end)
        for name, ends in by_name.items():
            total = torch.zeros(ends[0].shape)
            starts = range(0, len(total), _ROWS)
            multiplied = self.head in ends

            def terms(row: int, multiplied: bool = multiplied) -> tuple[Tensor, Tensor] | None:
                return self._at_head(row, leaving[row]) if multiplied else None

            for row, at_head in enumerate(self.chain.pool.stream(terms, range(len(self.pieces)))):
                ids = self.pieces[row].ids[0]
                looked_up = at_inputs[row][0] * self.factor if self.embeddings in ends else None

                def add(
                    start: int, total: Tensor = total, at_head: tuple[Tensor, Tensor] | None = at_head,
                    ids: Tensor = ids, looked_up: Tensor | None = looked_up, weight: float = weights[row],
                ) -> None:  # fmt: skip
                    part = total[start : start + _ROWS]
                    term = torch.zeros_like(part)
                    if at_head is not None:
                        torch.mm(at_head[0][:, start : start + _ROWS].T, at_head[1], out=term)
                    if looked_up is not None:
                        inside = (ids >= start) & (ids < start + len(part))
                        term.index_add_(0, ids[inside] - start, looked_up[inside])
                    part.add_(term.square_() if squares else term, alpha=weight)

                self.chain.pool.map(add, starts)
            yield {name: total}

    def _at_head(self, row: int, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a row's mean loss at the outputs of the head, [n, vocabulary], and its inputs, [n, hidden], of the n
        scored tokens."""
        assert self.head is not None
        batch = self.pieces[row].cloned()
        hidden, targets = batch.scored(leaving).flatten(0, -2), batch.targets.flatten()
        noting = _Noting(self.chain.behind.get_submodule(self.head.path))
        behind = in_place(self.chain.behind, self.head.path.split("."), noting)
        slopes, inputs = [], []
        with torch.inference_mode(False), torch.enable_grad():
            for part in slices(len(hidden), self.chain.vocabulary):
                logits = self.chain.head(hidden[part].clone(), behind)
                at = at_logits(logits.detach(), targets[part, None]) / len(targets)
                slopes.append(torch.autograd.grad(logits, noting.outputs, at)[0].flatten(0, -2))
                inputs.append(noting.inputs.flatten(0, -2))
        return torch.cat(slopes), torch.cat(inputs)

    # ---- replaced --------------------------------------------------------------------------------------------

    def entering(self, row: int, moved: Tensor | None) -> Tensor:
        """What enters the first block, [1, length, hidden]. moved: what is added to the matrix of the embeddings"""
        entered = self.chain.entering([row])
        return entered if moved is None else entered + self.factor * moved[self.pieces[row].ids]

    def moved(self, replaced: Mapping[str, Tensor]) -> Tensor | None:
        """By how much the embeddings change. replaced: matrices by name"""
        end = self.embeddings
        table = None if end is None else replaced.get(_stored(self.chain, end))
        return None if end is None or table is None else table - self.table(end)

    def behind(self, replaced: Mapping[str, Tensor]) -> nn.Module:
        """What is behind the blocks, with another head where it is replaced."""
        behind: nn.Module = self.chain.behind
        weight = None if self.head is None else replaced.get(_stored(self.chain, self.head))
        if self.head is None or weight is None:
            return behind
        original = behind.get_submodule(self.head.path)
        assert isinstance(original, nn.Linear)
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=original.bias is not None, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        if original.bias is not None:
            head.bias = original.bias
        return in_place(behind, self.head.path.split("."), head)


class _Noting(nn.Module):
    """A head that keeps what it reads, and what it gives as the beginning of a graph."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        self.inputs = inputs.detach()
        outputs: Tensor = self.head(inputs)
        self.outputs = outputs.detach().requires_grad_()
        return self.outputs


def _stored(chain: Chain, end: End) -> str:
    """The name of the matrix in the checkpoint: of a tied head that of the embeddings."""
    tied = chain.structure.tied.get(f"{end.name}.weight")
    return end.name if tied is None else tied.removesuffix(".weight")
