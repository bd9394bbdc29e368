"""How the blocks of a discovered model are called: seen in a run of one sample, and proved before rows are run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, NotOneAfterAnother, Passing, enter_one
from qkit.calibration.block_trial import ADVICE, Trial, prove, run_trial
from qkit.calibration.call_values import for_any_batch
from qkit.calibration.dataset import Calibration
from qkit.errors import Unsupported
from qkit.families.blocks import BlockSequence
from qkit.families.materialize import load_block, release
from qkit.families.structure import ModelStructure
from qkit.families.text_arguments import beyond_text
from qkit.files.foreign import reason
from qkit.kvcache.argument import with_cache
from qkit.system.memory import ran_out


class DoesNotRun(Unsupported):
    """Code of the model raises an error where it is run on rows of a text."""


@dataclass(frozen=True)
class Learned:
    """How the blocks pass hidden states on, by index, and their calls for any number of rows (None: each row needs its own).

    widened: the modules outside the blocks were converted to float32, since the model does not run in the checkpoint's dtype
    """

    passing: dict[int, Passing]
    calls: dict[int, Call] | None
    widened: bool = False


def call_options_of(structure: ModelStructure, cache: Any) -> dict[str, Any]:
    """Arguments of the model beside the sample, of those that it has. cache: its KV cache, None: none"""
    options = {**with_cache(structure.model, cache), "use_cache": cache is not None}
    if not structure.is_discovered:
        return options
    base: Any = getattr(structure.model, "base_model", structure.model)
    known = inspect.signature(base.forward).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return {k: v for k, v in options.items() if k in known or (any_name and v is not None)}


def learn_calls(
    structure: ModelStructure, sequence: BlockSequence, calibration: Calibration, call_options: dict[str, Any]
) -> Learned:
    """How the blocks are called, proved on rows.

    The modules outside the blocks hold their weights. Raises NotOneAfterAnother where blocks cannot be run one after another.
    """
    try:
        return Learned(*_learned(structure, sequence, calibration, call_options, structure.dtype))
    except DoesNotRun:
        if structure.dtype == torch.float32:
            raise
        widen(structure.model)  # some models mix float32 with what they are in
        return Learned(*_learned(structure, sequence, calibration, call_options, torch.float32), widened=True)


def widen(model: nn.Module) -> None:
    """Convert what of a model has memory to float32."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.is_floating_point() and not p.is_meta:
                p.data = p.data.float()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and not buffer.is_meta:
                module._buffers[name] = buffer.float()


def _learned(
    structure: ModelStructure,
    sequence: BlockSequence,
    calibration: Calibration,
    call_options: dict[str, Any],
    dtype: torch.dtype,
) -> tuple[dict[int, Passing], dict[int, Call] | None]:
    """The first two fields of ``Learned``, with blocks in ``dtype``."""
    tokens = calibration.tokens
    trial, hidden, calls = _proved(structure, sequence, {"input_ids": tokens[:1], **call_options}, None, dtype)
    if trial.returns_more and len(tokens) > 1:  # what is beside the hidden states has to be the same for another row
        _proved(structure, sequence, {"input_ids": tokens[1:2], **call_options}, trial, dtype)
    if calibration.inputs is not None or tuple(hidden.shape[:-1]) != tokens[:1].shape:
        return trial.passing, None
    if len(tokens) == 1:
        return trial.passing, calls
    with runs_on_text(structure):
        two = {"input_ids": tokens[:2], **call_options}
        _, batch = enter_one(structure.model, sequence.paths, two, trial.passing)
    return trial.passing, for_any_batch(calls, batch)


def _proved(
    structure: ModelStructure, sequence: BlockSequence, sample: dict[str, Any], shown: Trial | None, dtype: torch.dtype
) -> tuple[Trial, Tensor, dict[int, Call]]:
    """A run of the sample, the hidden states that enter the first block, and the calls of the blocks, which are recorded as
    ``shown`` (None: the run itself) says that they pass hidden states on. Raises Unsupported where run and record differ."""

    @contextmanager
    def loaded(index: int) -> Iterator[None]:
        module = load_block(structure, sequence.blocks[index], dtype)
        try:
            yield
        finally:
            release(module)

    with runs_on_text(structure):
        trial = run_trial(structure.model, sequence.paths, sample, loaded)
    try:
        with runs_on_text(structure):
            hidden, calls = enter_one(structure.model, sequence.paths, sample, (shown or trial).passing)
    except DoesNotRun as e:
        raise NotOneAfterAnother(
            f"{structure.checkpoint.path}: the model does not run without its blocks: {ADVICE}"
        ) from e
    prove(trial, calls, sequence.paths)
    return trial, hidden, calls


@contextmanager
def runs_on_text(structure: ModelStructure) -> Iterator[None]:
    """Raises DoesNotRun where code of a model cannot be run on rows of a text; a full memory stays what it is."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as e:
        if ran_out(e):
            raise
        beyond = ", ".join(beyond_text(structure.model))
        beyond = (
            f"beside tokens it takes {beyond}, which rows of a text do not have; it stopped with " if beyond else ""
        )
        raise DoesNotRun(
            f"{structure.checkpoint.path}: transformers cannot run this model on a text alone ({beyond}{reason(e)}): {ADVICE}"
        ) from e


def unlike_tokens(structure: ModelStructure) -> Unsupported:
    """The error where only some tokens count, and hidden states do not have one entry for each token."""
    return Unsupported(
        f"{structure.checkpoint.path}: --padded and --answers-only need hidden states with one entry for each token, and "
        "the blocks of this model have others: leave them out"
    )
