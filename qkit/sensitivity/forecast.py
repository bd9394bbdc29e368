"""The forecast of a profile, from shapes alone: solver runs, passes through the model, and peak memory.

Counts are of a profile that starts from nothing; results of an earlier run are not subtracted. Seconds depend on the
machine and are not given; a pass with gradients takes about three times the operations of one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qkit.calibration.batches import Extent, extent_first
from qkit.engine.block_step import LOSS_GRADIENTS
from qkit.engine.chain import is_chain, may_chain, with_fragments
from qkit.engine.forecast import ALLOCATOR, LATER
from qkit.engine.learning import LOSS_WEIGHTS
from qkit.errors import Unsupported
from qkit.families.blocks import LANGUAGE
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan
from qkit.rounding.block import PIECE_TOKENS
from qkit.rounding.sliced import slice_bytes
from qkit.sensitivity import hidden
from qkit.sensitivity.candidates import Candidate, are_gguf
from qkit.sensitivity.names import BLOCKWISE, FISHER
from qkit.sensitivity.outputs import SAMPLE_TOKENS
from qkit.sensitivity.reference_model import SPILL_BYTES, log_prob_bytes
from qkit.sensitivity.repair import ROWS
from qkit.sensitivity.token_weights import PHASE, rows_at_a_time, stream_width
from qkit.sensitivity.units import applies, units_of
from qkit.system.machine import available_memory, process_bytes, resident_bytes
from qkit.system.words import megabytes

# Tensors of the size of a chunk's logits that one worker holds at the worst moment.
_FORWARD_LOGITS = 5  # of a comparison: log probabilities of both models, and what KL is computed from
_BACKWARD_LOGITS = 4  # logits, log probabilities and their gradients
# Copies of all linears in float32, on top of those of the model and of gradients on their way from the workers.
_COPIES = {"first": 1, "fisher": 2, "pqi": 4}  # pqi: the original weights, the quantized ones, two sums of gradients


GRADIENTS = 3  # operations of a pass with gradients, in passes without


def pass_operations(structure: ModelStructure, tokens: int) -> float:
    """The operations of a pass of ``tokens`` tokens through the linears and the head; multiply-adds count twice."""
    linears = sum(x.shape[0] * x.shape[1] for b in structure.every_block for x in b.linears)
    return 2.0 * tokens * (linears + _vocabulary(structure) * int(getattr(structure.text_config, "hidden_size", 0)))


@dataclass(frozen=True, kw_only=True)
class ProfileForecast:
    """The work and the memory that a profile takes.

    solver_runs: probes of the whole model; passes: through the whole model, over all rows [rows, length] each.

    forward, backward: passes without and with gradients
    memory: bytes by what holds them, at the worst moment; peak_memory: of the process
    spilled: bytes, by what they are, that go to files in the profile's folder while it is made
    """

    solver_runs: int
    forward: int
    backward: int
    rows: int
    length: int
    memory: dict[str, int]
    peak_memory: int
    spilled: dict[str, int]

    def operations(self, structure: ModelStructure) -> float:
        """The operations of all passes; multiply-adds count twice."""
        return (self.forward + GRADIENTS * self.backward) * pass_operations(structure, self.rows * self.length)

    def line(self) -> str:
        """The forecast in one line for a person."""
        parts = ", ".join(f"{k} {megabytes(v)}" for k, v in self.memory.items() if v)
        disk = "".join(f"; {megabytes(v)} of disk for {k}" for k, v in self.spilled.items() if v)
        return f"forecast: {self.work}, about {megabytes(self.peak_memory)} of memory ({parts}){disk}"

    @property
    def work(self) -> str:
        """The solver runs and passes, in words."""
        return (
            f"{self.solver_runs} solver runs, {self.forward} forward and {self.backward} forward and backward "
            f"passes over {self.rows * self.length} tokens"
        )


def profile_forecast(
    structure: ModelStructure,
    candidates: Sequence[Candidate],
    measures: Sequence[str],
    rows: Extent,
    points: int,
    workers: int,
    parts: Sequence[str] = (LANGUAGE,),
) -> ProfileForecast:
    """The cost of a profile. rows: that losses are measured on; points: of the path integral; parts: of the model.

    Names that are no measures count nothing: they are refused elsewhere.
    """
    quantizing = sum(c.scheme is not None for c in candidates)
    units = units_of(structure, parts, are_gguf(candidates))
    forward = 2 + quantizing  # the reference, its loss, and every candidate everywhere
    if {"loss", "kl"} & set(measures):
        forward += sum(applies(u, c) for u in units for c in candidates if c.scheme is not None)
    forward += "output_norm" in measures
    moves = any(c.scheme is not None and c.scheme.activations is not None for c in candidates)
    backward = sum(m in measures for m in ("first", "fisher")) + ("first_x" in measures and moves)
    backward += points * quantizing * ("pqi" in measures)
    blockwise = set(measures) <= set(BLOCKWISE) and may_chain(structure, structure.sequences[-1])
    memory, spilled = (_blockwise if blockwise else _whole)(structure, measures, rows, workers)
    return ProfileForecast(
        solver_runs=quantizing,
        forward=forward,
        backward=backward,
        rows=rows.rows,
        length=rows.length,
        memory=memory,
        peak_memory=max(process_bytes(), resident_bytes() + LATER + int(ALLOCATOR * sum(memory.values()))),
        spilled=spilled,
    )


def _whole(
    structure: ModelStructure, measures: Sequence[str], rows: Extent, workers: int
) -> tuple[dict[str, int], dict[str, int]]:
    """(memory, disk) of a profile with the whole model in memory."""
    log_probs = log_prob_bytes(rows.scored, _vocabulary(structure))
    in_memory = log_probs <= SPILL_BYTES
    memory = {
        "the model in float32": 4 * structure.parameters,
        "reference probabilities": log_probs if in_memory else 0,
        "measures": _measure_memory(structure, measures, rows, workers),
    }
    return memory, {"reference probabilities": 0 if in_memory else log_probs}


def _blockwise(
    structure: ModelStructure, measures: Sequence[str], rows: Extent, workers: int
) -> tuple[dict[str, int], dict[str, int]]:
    """(memory, disk) of a profile with one block in memory: see ``chained_original.py``."""
    vocabulary, width = _vocabulary(structure), int(structure.text_config.hidden_size)
    block = max(sum(x.shape[0] * x.shape[1] for x in b.linears) for b in structure.blocks)
    widths = max(sum(sum(x.shape) for x in b.linears if x.expert is None) for b in structure.blocks)
    states, busy = 4 * rows.rows * rows.length * width, min(workers, rows.rows)
    # Each worker has the graph of a row and gradients of a block; as many wait to be added, and one sum is of all rows.
    passes_back = 4 * block * (1 + 2 * busy) + 4 * busy * rows.length * (2 * widths + 16 * width)
    # Matrices of the size of the ends: gradients, the original, what a format puts in its place, and what that is made of. And
    # logits of a row.
    ends = 6 * 4 * vocabulary * width + (busy + 1) * 4 * rows.length * vocabulary
    memory = {
        "head": 4 * vocabulary * width,
        "a block": 4 * block,
        "hidden states": 3 * states,
        "measures": max(passes_back if {"first", FISHER} & set(measures) else 4 * block, ends),
    }
    return memory, {"hidden states": states * (1 + len(structure.blocks))}


def repair_memory(plan: Plan, structure: ModelStructure, workers: int) -> int:
    """Bytes at the worst moment of ``repair``: the model, its quantized weights, and the path integral."""
    assert plan.calibration is not None
    return 4 * structure.parameters + _measure_memory(
        structure, ("pqi",), extent_first(plan.calibration, ROWS), workers
    )


@dataclass(frozen=True)
class PassForecast:
    """A pass of the original model with gradients, before any block is solved. memory, disk: bytes at the worst moment"""

    memory: int
    disk: int
    operations: float


def gradient_passes(plan: Plan, structure: ModelStructure, workers: int) -> dict[str, PassForecast]:
    """The passes that a plan needs, by what they are for."""
    passes: dict[str, PassForecast] = {}
    if plan.calibration is None:
        return passes
    if LOSS_WEIGHTS in plan.needs:
        rows = extent_first(plan.calibration, hidden.ROWS)
        held = hidden.held_bytes(structure, stream_width(structure), is_chain(plan, structure))
        passes[hidden.PHASE] = _gradient_pass(plan, structure, rows, rows.rows, 4, held, workers)
    if LOSS_GRADIENTS in plan.needs:
        rows, item = extent_first(plan.calibration, plan.calibration.count), getattr(torch, plan.run_dtype).itemsize
        held = 4 * rows.rows * rows.length * len(plan.linears)
        together = rows_at_a_time(plan, structure)
        passes[PHASE] = _gradient_pass(plan, structure, rows, together, item, held, workers)
    return passes


def _gradient_pass(
    plan: Plan, structure: ModelStructure, rows: Extent, together: int, item: int, held: int, workers: int
) -> PassForecast:
    """Of a chain memory has the head, a block, hidden states of the rows that go through it together, and per worker a batch on
    its way back or a slice of logits; else the model, and per worker a batch on its way back. On the disk are the hidden states
    that enter all blocks, until the way back.

    together: rows; item: bytes of a value; held: bytes of results
    """
    operations = (1 + GRADIENTS) * pass_operations(structure, rows.rows * rows.length)
    if not is_chain(plan, structure):
        return PassForecast(4 * structure.parameters + _backward(structure, rows, workers) + held, 0, operations)
    width = stream_width(structure)
    block = max(sum(x.shape[0] * x.shape[1] for x in b.linears) for b in structure.blocks)
    widths = max(sum(sum(x.shape) for x in b.linears) for b in structure.blocks)
    tokens = max(PIECE_TOKENS, rows.length)
    active = max(slice_bytes(_vocabulary(structure), item), item * tokens * (2 * widths + 16 * width))
    states = item * together * rows.length * width
    head = item * _vocabulary(structure) * width
    busy = min(workers, -(-together * rows.length // tokens))
    memory = with_fragments(head + item * block + 3 * states + busy * active + held)
    return PassForecast(memory, states * len(structure.blocks), operations)


def refuse_what_cannot_fit(forecast: ProfileForecast) -> None:
    """Raises Unsupported where the memory of this machine is too small."""
    _refuse_above(forecast.peak_memory, "the profile")


def refuse_model_that_cannot_fit(structure: ModelStructure) -> None:
    """Raises Unsupported where the whole model in float32 is too large for this machine."""
    _refuse_above(model_memory(structure), "a profile of this model, whose blocks do not run one after another,")


def _refuse_above(needed: int, what: str) -> None:
    available = available_memory()
    if available is not None and needed > available:
        raise Unsupported(
            f"{what} needs about {megabytes(needed)} of memory and {megabytes(available)} are available: "
            f"use fewer --rows or --threads, --measures {FISHER} alone, which for most models of text needs one block in "
            "memory at a time, or a larger machine"
        )


def _measure_memory(structure: ModelStructure, measures: Sequence[str], rows: Extent, workers: int) -> int:
    """Bytes at the worst moment of the measures asked for, on top of the model and the reference."""
    linears = [x for b in structure.blocks for x in b.linears]
    weights = 4 * sum(x.shape[0] * x.shape[1] for x in linears)
    chunk, pieces = rows.chunk, _pieces(rows)
    active_workers = min(workers, pieces)
    logits = 4 * chunk * _vocabulary(structure)
    backward = _backward(structure, rows, workers)
    moments = [2 * weights + active_workers * _FORWARD_LOGITS * logits]  # all linears replaced, the originals kept
    for name, copies in _COPIES.items():
        if name in measures:
            moments.append((copies + min(workers + 2, pieces)) * weights + backward)
    if "first_x" in measures:
        moments.append(backward + active_workers * 4 * chunk * sum(x.shape[1] for x in linears if x.expert is None))
    if "output_norm" in measures:
        moments.append(4 * SAMPLE_TOKENS * sum(x.shape[1] for x in linears) + active_workers * _FORWARD_LOGITS * logits)
    return max(moments)


def _backward(structure: ModelStructure, rows: Extent, workers: int) -> int:
    """Bytes that workers hold of passes with gradients."""
    # A graph keeps about what every linear reads and gives; experts, who see a share of the tokens each, are left out.
    graph = 4 * rows.chunk * sum(sum(x.shape) for b in structure.blocks for x in b.linears if x.expert is None)
    return min(workers, _pieces(rows)) * (_BACKWARD_LOGITS * 4 * rows.chunk * _vocabulary(structure) + graph)


def _pieces(rows: Extent) -> int:
    return -(-rows.rows * rows.length // rows.chunk)


def model_memory(structure: ModelStructure) -> int:
    """Bytes of the whole model in float32, with room to run it."""
    return int(ALLOCATOR * 4 * structure.parameters) + resident_bytes() + LATER


def _vocabulary(structure: ModelStructure) -> int:
    return int(getattr(structure.text_config, "vocab_size", 0))
