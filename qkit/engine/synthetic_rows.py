"""Calibration rows that the model writes itself, beside those of a text.

Learned rounding has a parameter for every weight and soon fits what is peculiar to a short text; what a model writes is close
to what it was trained on, and costs nobody a text (Williams et al., arXiv 2410.17170). Ours: rows begin behind the model's
first token, or, where it has none, behind first tokens of the text's rows, and are drawn at temperature 1 from all tokens.
They are written when a run begins, into its job, whose identity knows their number and the seed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.dataset import Calibration, digest_of
from qkit.engine.job import Job
from qkit.families.structure import ModelStructure
from qkit.files.safefile import read_header, read_tensor, save_tensors
from qkit.nn.attention import ByProducts
from qkit.planning.plan import Plan
from qkit.runtime import loading
from qkit.runtime.generate import Decoder, by_sums
from qkit.system.parallel import Workers
from qkit.system.progress import Progress

BATCH = 96  # rows that one worker writes side by side


def with_written(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> Plan:
    """The plan with the rows that it asks for behind those of the text: from the job, or written now."""
    asked = plan.calibration
    if asked is None or not asked.written:
        return plan
    file = job.path / "parts" / "written.safetensors"
    if not file.exists():
        progress.start("rows that the model writes", -(-asked.written // BATCH))
        model = loading.load(structure.checkpoint.path, dtype=getattr(torch, plan.run_dtype))
        begin = _begin(structure, asked)
        save_tensors(file, {"tokens": write(model, begin, asked.seqlen, plan.seed, pool, progress.step)})
    tokens = torch.cat((asked.tokens, read_tensor(read_header(file)["tokens"])))
    return replace(plan, calibration=replace(
        asked, samples=len(tokens), digest=digest_of(tokens), tokens=tokens, written=0
    ))  # fmt: skip


def write(model: Any, begin: Tensor, length: int, seed: int, pool: Workers, step: Any) -> Tensor:
    """int64 [rows, length] of a causal language model, behind the tokens ``begin``, int64 [rows], which are no part of them."""

    def one(numbered: tuple[int, Tensor]) -> Tensor:
        number, first = numbered
        decoder = Decoder(model, length + 1)
        with ByProducts():
            drawn = decoder.generate(
                first[:, None], length, temperature=1.0, seed=seed * len(begin) + number, draw=by_sums
            )
        return drawn[:, 1:]

    found = []
    for rows in pool.stream(one, enumerate(begin.split(BATCH))):
        found.append(rows)
        step()
    return torch.cat(found)


def written_memory(plan: Plan, structure: ModelStructure, workers: int) -> int:
    """Bytes at the worst moment: the model, and per worker keys and values of its rows and what a token is drawn from."""
    config: Any = structure.text_config
    assert plan.calibration is not None
    calibration, item = plan.calibration, getattr(torch, plan.run_dtype).itemsize
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width: int = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    kept: int = 2 * config.num_hidden_layers * width * (calibration.seqlen + 1) * item
    busy = min(workers, -(-calibration.written // BATCH)) * BATCH
    return int(item * structure.parameters + busy * (kept + 4 * 4 * config.vocab_size))


def _begin(structure: ModelStructure, calibration: Calibration) -> Tensor:
    """int64 [rows]: what each row begins behind."""
    first = getattr(structure.text_config, "bos_token_id", None)
    if isinstance(first, int):
        return torch.full((calibration.written,), first, dtype=torch.int64)
    return calibration.tokens[torch.arange(calibration.written) % calibration.samples, 0]
