"""A full-precision model in memory whose linears can be replaced, for a while, by quantized ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qkit.calibration.batches import Batch, InputRows, batches, sample
from qkit.families.blocks import Linear
from qkit.families.ends import find_ends
from qkit.families.structure import ModelStructure
from qkit.files.offload import Chunks, OffloadedTensors
from qkit.nn.sampling import by_sums
from qkit.system.parallel import Workers
from qkit.tensor.activations import quantize_activations
from qkit.tensor.formats import Format

R = TypeVar("R")
SPILL_BYTES = 1 << 30  # log probabilities that are kept in memory; our choice


@dataclass(frozen=True)
class Replacement:
    """A linear's stand-in. weight: float32 [out, in]; activations: the format of its input and its static scale, or None."""

    weight: Tensor
    activations: Format | None = None
    static: Tensor | None = None


class ReferenceModel:
    """A full-precision model with replaceable linears, found by checkpoint name. model: in float32, eval mode."""

    def __init__(self, model: Any, structure: ModelStructure, pool: Workers) -> None:
        self.model, self.structure, self.pool = model, structure, pool
        self.where = {x.name: (b.path, x) for b in structure.every_block for x in b.linears}
        self.ends = {  # of a tied model the one matrix, by either name
            end.name: ("", Linear(name=end.name, param=f"{end.path}.weight", shape=end.shape))
            for end in find_ends(structure)
            if end is not None
        }

    def weight(self, name: str) -> Tensor:
        """The current weight of a linear, [out, in]; a view."""
        block, linear = self._place(name)
        return linear.view(self.model.get_submodule(block))

    def _place(self, name: str) -> tuple[str, Linear]:
        """(path of the block, the linear) of a linear, or of an end of the model, which is in no block."""
        return self.where[name] if name in self.where else self.ends[name]

    @contextmanager
    def replaced(self, replacements: Mapping[str, Replacement]) -> Iterator[None]:
        """The context in which these linears (by name) are replaced; the originals are put back after it."""
        originals = {name: self.weight(name).clone() for name in replacements}
        handles = []
        try:
            for name, r in replacements.items():
                self.weight(name).copy_(r.weight)
                if r.activations is not None and self._place(name)[1].expert is None:
                    handles.append(self._module(name).register_forward_pre_hook(quantizing(r)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, weight in originals.items():
                self.weight(name).copy_(weight)

    # ---- passes ----------------------------------------------------------------------------------------------

    def log_probs(self, rows: InputRows, spill: Path | None = None) -> Chunks:
        """The log probabilities of every scored token, float32 [rows, scored, vocabulary], batch by batch.

        spill: where more than SPILL_BYTES of them go, into a file that goes with the result; None: they stay in memory.
        """
        pieces = batches(rows)
        vocabulary = self.structure.text_config.vocab_size
        if spill is None or log_prob_bytes(sum(b.targets.numel() for b in pieces), vocabulary) <= SPILL_BYTES:
            return self.pool.map(self._log_probs, pieces)
        spilled = OffloadedTensors(spill)
        for piece in self.pool.stream(self._log_probs, pieces):
            spilled.append(piece)
        return spilled

    def loss(self, rows: InputRows) -> float:
        """Mean negative log likelihood of the scored tokens, in nats."""
        nll = self.pool.map(lambda b: _nll(self._log_probs(b), b).flatten(), batches(rows))
        return float(torch.cat(nll).double().mean())

    def compare(self, rows: InputRows, reference: Chunks) -> tuple[float, float]:
        """The loss and the mean KL divergence from ``reference``, which ``log_probs`` gave; both in nats a scored token."""
        pieces = batches(rows)
        assert len(pieces) == len(reference)

        def score(item: tuple[int, Batch]) -> tuple[Tensor, Tensor]:
            index, batch = item
            q = self._log_probs(batch)
            p = reference[index]  # read here: a map takes all its items at once
            return _nll(q, batch), (p.exp() * (p - q)).sum(-1, dtype=torch.float64)

        scores = self.pool.map(score, enumerate(pieces))
        nll, kl = (torch.cat([t[i].flatten() for t in scores]).double() for i in (0, 1))
        return float(nll.mean()), float(kl.mean())

    def gradients(self, rows: InputRows, names: list[str], squares: bool = False) -> tuple[float, dict[str, Tensor]]:
        """The loss and {linear: gradient of the mean loss [out, in]} over all rows.

        squares: instead of the gradient the mean over rows of the squared gradient of a row's mean loss (the diagonal of
        the empirical Fisher matrix).
        """
        params = {
            n: f"{block}.{linear.param}".removeprefix(".")
            for n, (block, linear) in {**self.ends, **self.where}.items()
            if n in names
        }
        leaves = {path: self.model.get_parameter(path) for path in sorted(set(params.values()))}
        pieces = batches(rows, 1) if squares else batches(rows)
        scored = sum(b.targets.numel() for b in pieces)
        total = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
        losses: list[tuple[float, int]] = []

        def batch_gradients(shared_batch: Batch) -> tuple[float, int, tuple[Tensor, ...]]:
            with torch.inference_mode(False), torch.enable_grad():
                batch = shared_batch.cloned()
                nll = _nll(self._log_probs(batch), batch)
                return float(nll.detach().mean()), nll.numel(), _grad(nll.mean(), list(leaves.values()))

        for leaf in leaves.values():
            leaf.requires_grad_(True)
        try:
            for loss, count, grads in self.pool.stream(batch_gradients, pieces):
                losses.append((loss, count))
                weight = 1 / len(pieces) if squares else count / scored
                for sum_, grad in zip(total.values(), grads, strict=True):
                    sum_.add_(grad.square() if squares else grad, alpha=weight)
        finally:
            for leaf in leaves.values():
                leaf.requires_grad_(False)
        mean = sum(loss * count for loss, count in losses) / scored
        return mean, {n: self._place(n)[1].part(total[params[n]]) for n in names}

    def with_inputs(
        self, rows: InputRows, names: Sequence[str], use: Callable[[dict[str, tuple[Tensor, Tensor]]], R]
    ) -> Iterator[R]:
        """The results of ``use`` on {linear: (x, g)}, batch by batch, in the order of the rows; nothing else of a batch is
        kept.

        names: linears that are modules (not those of fused experts)
        x: float32 [rows, length, in] of the batch, what the linear reads
        g: the same shape, the gradient of the mean loss over all of ``rows`` at x, in nats, as far as x works through this
           linear: W^T of the gradient at its output. Summed over all linears that read x it is what these linears add
           to the gradient at x.
        """
        local = threading.local()  # batches run through the same modules at the same time
        pieces = batches(rows)
        scored = sum(b.targets.numel() for b in pieces)

        def noting(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                x = args[0]
                branch = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(True)
                local.inputs[name] = branch
                return (branch, *args[1:])

            return hook

        def run_batch(shared_batch: Batch) -> R:
            local.inputs = {}
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    batch = shared_batch.cloned()
                    loss = _nll(self._log_probs(batch), batch).sum() / scored
                    gradients = _grad(loss, list(local.inputs.values()))
                return use({n: (x.detach(), g) for (n, x), g in zip(local.inputs.items(), gradients, strict=True)})
            finally:
                local.inputs = {}

        handles = [self._module(n).register_forward_pre_hook(noting(n)) for n in names]
        try:
            yield from self.pool.stream(run_batch, pieces)
        finally:
            for handle in handles:
                handle.remove()

    def output_gradients(self, rows: InputRows, paths: Sequence[str], seed: int) -> Iterator[dict[str, Tensor]]:
        """The gradient of the summed loss of all scored tokens at the outputs of these modules, {path: float32 [tokens,
        width]}, batch by batch; labels are drawn from the model itself.

        seed: of the labels, which do not depend on the number of workers.
        """
        local = threading.local()

        def noting(path: str) -> Any:
            def hook(_: nn.Module, args: Any, output: Any) -> Any:
                first = output[0] if isinstance(output, tuple) else output
                branch = first if first.requires_grad else first.detach().requires_grad_(True)
                local.inputs[path] = branch
                return (branch, *output[1:]) if isinstance(output, tuple) else branch

            return hook

        def batch_gradients(item: tuple[int, Batch]) -> dict[str, Tensor]:
            number, shared_batch = item
            local.inputs = {}
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    log_probs = self._log_probs(shared_batch.cloned()).flatten(0, -2)
                    drawn = torch.Generator().manual_seed(seed + number)
                    labels = by_sums(log_probs.detach().exp(), drawn)[:, None]
                    gradients = _grad(-log_probs.gather(-1, labels).sum(), list(local.inputs.values()))
                return {path: g.flatten(0, -2) for path, g in zip(local.inputs, gradients, strict=True)}
            finally:
                local.inputs = {}

        handles = [self.model.get_submodule(p).register_forward_hook(noting(p)) for p in paths]
        try:
            yield from self.pool.stream(batch_gradients, enumerate(batches(rows)))
        finally:
            for handle in handles:
                handle.remove()

    def sample_inputs(self, rows: InputRows, modules: Sequence[str], count: int) -> dict[str, Tensor]:
        """The inputs of these modules (by their path in the model), {path: float32 [n, width]}.

        Of the n tokens that ``batches.sample`` takes; the same tokens for every module, in the order of the rows.
        """
        places, pieces = sample(rows, count).places, batches(rows)
        starts = [0, *accumulate(b.ids.numel() for b in pieces)]
        local = threading.local()

        def noting(path: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                local.inputs[path] = args[0].flatten(0, -2)[local.places].float()

            return hook

        def sample_batch(item: tuple[Batch, int]) -> dict[str, Tensor]:
            batch, start = item
            inside = (places >= start) & (places < start + batch.ids.numel())
            local.inputs, local.places = {}, places[inside] - start
            self.model.base_model(**batch.inputs, use_cache=False)
            samples: dict[str, Tensor] = local.inputs
            return samples

        handles = [self.model.get_submodule(p).register_forward_pre_hook(noting(p)) for p in modules]
        try:
            samples = self.pool.map(sample_batch, list(zip(pieces, starts, strict=False)))
        finally:
            for handle in handles:
                handle.remove()
        return {path: torch.cat([inputs[path] for inputs in samples]) for path in modules}

    def path(self, name: str) -> str:
        """The path in the model of the module of a linear that is one (not a fused expert's)."""
        block, linear = self._place(name)
        assert linear.expert is None
        return f"{block}.{linear.param.removesuffix('.weight')}".removeprefix(".")

    def _module(self, name: str) -> nn.Module:
        module: nn.Module = self.model.get_submodule(self.path(name))
        return module

    def _log_probs(self, batch: Batch) -> Tensor:
        logits: Tensor = self.model(**batch.inputs, **batch.options, use_cache=False).logits
        return torch.log_softmax(batch.scored(logits).float(), dim=-1)


def log_prob_bytes(scored: int, vocabulary: int) -> int:
    """The bytes of the result of ``log_probs`` for ``scored`` tokens."""
    return scored * vocabulary * 4


def _grad(value: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Zeros for what the value does not depend on: blocks of a tower behind the features that are taken."""
    return torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True)


def _nll(log_probs: Tensor, batch: Batch) -> Tensor:
    return -log_probs.gather(-1, batch.targets[..., None])[..., 0]


def quantizing(r: Replacement) -> Any:
    """A forward pre-hook that quantizes the inputs of a linear."""
    fmt = r.activations
    assert fmt is not None

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_activations(args[0], fmt, r.static), *args[1:])

    return hook
