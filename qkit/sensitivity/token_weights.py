"""The weights of calibration tokens: how much the loss depends on what a layer gives at each of them.

GuidedQuant (arXiv 2505.07004, section 3) weighs the squared error of an output by the squared gradient of the loss there. Its
Hessian of a group of output channels is the sum over tokens of x x^T times the mean of these squares.

Our choices: all layers that read the same inputs are one group, so that a Hessian is as dear as without weights; labels are
drawn from the model, as in ``hidden``; each layer's weights have a mean of one before layers are put together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.batches import batches
from qkit.engine.chain import Chain, chain_of
from qkit.engine.job import Job
from qkit.errors import QkitError, Unsupported
from qkit.families.blocks import BlockStructure, Linear
from qkit.families.structure import ModelStructure
from qkit.files.foreign import reason
from qkit.planning.plan import Plan
from qkit.rounding.block import PIECE_TOKENS
from qkit.runtime.loading import load_checkpoint
from qkit.sensitivity.hidden import Piece, gradients_at_end, numbered
from qkit.sensitivity.reference_model import ReferenceModel
from qkit.system.memory import give_back, ran_out
from qkit.system.parallel import Workers
from qkit.system.progress import Progress

HELD = 256 << 20  # bytes of hidden states that go through the model at a time, at the most
PHASE = "tokens weighted by the loss"
_TAP = "tap"  # parameter of a layer that its outputs are added to


def token_weights(
    plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress
) -> list[dict[str, Tensor]]:
    """For each block of the language model {linear: float32 [rows, length], the weight of each token, mean 1}.

    One block is in memory; a model whose blocks cannot be run one after another is loaded whole. Experts that are parts of a
    fused matrix have no weights. Raises Unsupported for a model that does not run with gradients.
    """
    assert plan.calibration is not None
    linears = [[x for x in b.linears if x.name in plan.linears and x.expert is None] for b in structure.blocks]
    progress.start(PHASE, 1)
    with torch.inference_mode(False):
        chain = chain_of(replace(plan, transforms=()), structure, job, pool)  # squares are the same after a rotation
    try:
        if chain is None:
            squares = _of_whole_model(plan, structure, linears, pool, progress)
        else:
            with chain, torch.inference_mode(False):
                squares = _of_chain(chain, plan, linears, progress)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:  # code of a model
        if ran_out(e) or isinstance(e, QkitError):
            raise
        raise Unsupported(
            f"{structure.checkpoint.path}: option 'guided' needs gradients, and this model does not run with them "
            f"({reason(e)}): use --option guided=false"
        ) from e
    give_back()
    return [{x.name: _mean_one(squares[x.name]) for x in of_block if x.name in squares} for of_block in linears]


def _of_chain(chain: Chain, plan: Plan, linears: list[list[Linear]], progress: Progress) -> dict[str, Tensor]:
    """{linear: float32 [rows, length], mean squares of gradients over its outputs}."""
    assert plan.calibration is not None
    # Made at once: many small tensors between large ones that come and go would tear the heap apart.
    squares = {x.name: torch.zeros(chain.rows.count, chain.rows.tokens) for of_block in linears for x in of_block}
    parts = list(_parts(numbered(batches(plan.calibration, PIECE_TOKENS)), rows_at_a_time(plan, chain.structure)))
    progress.start(PHASE, 2 * len(chain.blocks) * len(parts))
    for pieces in parts:
        kept = chain.offloaded()
        gradients = gradients_at_end(chain, pieces, plan.seed, kept, progress.step)
        tokens = [g.shape[:-1].numel() for g in gradients]
        tapped = partial(_tapped, chain, linears, max(tokens))
        for block in chain.backward(kept, gradients, tapped, progress.step):
            of_block = linears[chain.blocks[block.number][0].index]
            for piece, count, by_parameter in zip(pieces, tokens, block.parameters, strict=True):
                for x in of_block:
                    gradient = by_parameter[f"{_module_path(x)}.{_TAP}"][:count].float()
                    rows = squares[x.name][piece.first : piece.first + piece.rows]
                    rows.copy_(gradient.square_().mean(-1).view_as(rows))
    return squares


@contextmanager
def _tapped(chain: Chain, linears: list[list[Linear]], tokens: int, block: BlockStructure) -> Iterator[nn.Module]:
    """The original block, whose layers add a parameter of zeros to their outputs: its gradient is that of the outputs.

    tokens: of the longest piece
    """
    with chain.loaded(block, chain.structure.checkpoint.read) as module:
        layers = [(module.get_submodule(_module_path(x)), x.shape[0]) for x in linears[block.index]]
        hooks = [layer.register_forward_hook(_add_tap) for layer, _ in layers]
        for layer, width in layers:
            zeros = torch.zeros(tokens, width, dtype=chain.rows.dtype, device=chain.rows.device)
            layer.register_parameter(_TAP, nn.Parameter(zeros))
        try:
            yield module
        finally:  # the next run of the block has the same modules
            for (layer, _), hook in zip(layers, hooks, strict=True):
                hook.remove()
                del layer._parameters[_TAP]


def _add_tap(layer: Any, _: Any, output: Tensor) -> Tensor:
    tap: Tensor = layer.tap
    return output + tap[: output.numel() // output.shape[-1]].view_as(output)


def _of_whole_model(
    plan: Plan, structure: ModelStructure, linears: list[list[Linear]], pool: Workers, progress: Progress
) -> dict[str, Tensor]:
    """``_of_chain`` with the whole model in memory, in float32."""
    assert plan.calibration is not None
    progress.start(PHASE, len(batches(plan.calibration)))
    model = ReferenceModel(load_checkpoint(structure.checkpoint, torch.float32), structure, pool)
    name_of = {
        f"{b.path}.{_module_path(x)}": x.name for b, of in zip(structure.blocks, linears, strict=True) for x in of
    }
    squares: dict[str, list[Tensor]] = {}
    for gradients in model.output_gradients(plan.calibration, list(name_of), plan.seed):
        for path, g in gradients.items():
            squares.setdefault(name_of[path], []).append(g.square().mean(-1))
        progress.step()
    return {name: torch.cat(parts).view(plan.calibration.count, -1) for name, parts in squares.items()}


def rows_at_a_time(plan: Plan, structure: ModelStructure) -> int:
    """How many rows go through a chain at a time."""
    assert plan.calibration is not None
    item: int = getattr(torch, plan.run_dtype).itemsize
    row_bytes = plan.calibration.seqlen * stream_width(structure) * item
    return min(plan.calibration.count, max(1, HELD // row_bytes))


def stream_width(structure: ModelStructure) -> int:
    """Channels of the hidden states that pass from block to block; those of the first layer, where the config has none."""
    width: int = structure.blocks[0].linears[0].shape[1]
    return int(getattr(structure.text_config, "hidden_size", None) or width)


def _parts(pieces: list[Piece], rows: int) -> Iterator[list[Piece]]:
    """Consecutive pieces, of ``rows`` rows together at the most, but for one that has more by itself."""
    part: list[Piece] = []
    for piece in pieces:
        if part and piece.first + piece.rows - part[0].first > rows:
            yield part
            part = []
        part.append(piece)
    yield part


def _mean_one(squares: Tensor) -> Tensor:
    exact = squares.double()
    mean = float(exact.mean())
    return (exact / mean).float() if mean > 0 else torch.ones_like(squares)


def _module_path(linear: Linear) -> str:
    return linear.param.removesuffix(".weight")
