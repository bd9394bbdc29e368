"""The tokens per second of whole models: greedy decoding of one sequence by ``qkit.runtime.generate``, models in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.benchmark.host import Host
from qkit.benchmark.products import Timing
from qkit.errors import UsageError
from qkit.nn.layers import QuantExperts, QuantLinear
from qkit.runtime.generate import Decoder


@dataclass(frozen=True, kw_only=True)
class DecodeTiming:
    """The times of greedy decoding of one model.

    prompt: seconds of the prompt and its first token, of the best round; token: seconds of every further token, mean of a
    round; size: bytes of the weights of all linears, as they are held; floor: seconds that reading them takes, None where a
    token does not visit all of them.
    """

    name: str
    prompt: float
    token: Timing
    size: int
    floor: float | None
    refused: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-able dictionary, with tokens a second."""
        return {**asdict(self), "tokens_per_second": None if self.refused else 1 / self.token.p50}


@dataclass(frozen=True)
class Round:
    """One sequence: seconds of the prompt, of a further token, and the tokens."""

    prompt: float
    token: float
    tokens: list[int]


def decode(
    models: Sequence[tuple[str, Any]], prompt: int, new: int, rounds: int, host: Host, step: Callable[[], None]
) -> list[DecodeTiming]:
    """The times of each model, ``rounds`` times in turn, on the same random prompt, after a round that does not count.

    new: tokens after the first one. Raises UsageError where the positions of a model do not suffice. A model whose tokens
    differ between rounds is refused.
    """
    for name, model in models:
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and prompt + new + 1 > positions:
            raise UsageError(
                f"{name}: {positions} positions for {prompt} + {new + 1} tokens: lower --prompt-tokens or --new-tokens"
            )
    vocabulary = min(model.config.vocab_size for _, model in models)
    ids = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    decoders = [Decoder(model, prompt + new + 1) for _, model in models]
    for decoder in decoders:
        decoder.generate(ids, 2)
    rounds_of_model: list[list[Round]] = [[] for _ in models]
    for _ in range(rounds):
        for decoder, model_rounds in zip(decoders, rounds_of_model, strict=True):
            model_rounds.append(_round(decoder, ids, new))
            step()
    return [
        _timing(name, model, model_rounds, host)
        for (name, model), model_rounds in zip(models, rounds_of_model, strict=True)
    ]


def _timing(name: str, model: nn.Module, rounds: Sequence[Round], host: Host) -> DecodeTiming:
    size, reads_all = linear_bytes(model)
    token = Timing.of([r.token for r in rounds])
    if any(r.tokens != rounds[0].tokens for r in rounds):
        refused: str | None = "the same prompt gave different tokens"
    else:
        bytes_read = size if reads_all and size > host.cache else 0
        refused = host.refusal(token.p50, bytes_read, 0) and host.remeasure().refusal(token.p50, bytes_read, 0)
    return DecodeTiming(
        name=name,
        prompt=min(r.prompt for r in rounds),
        token=token,
        size=size,
        floor=host.floor(size) if reads_all else None,
        refused=refused,
    )


def _round(decoder: Decoder, ids: Tensor, new: int) -> Round:
    start = time.perf_counter()
    decoder.generate(ids, 1).tolist()  # waits for it
    middle = time.perf_counter()
    tokens: list[int] = decoder.generate(ids, 1 + new)[0].tolist()
    prompt = middle - start
    return Round(prompt, (time.perf_counter() - middle - prompt) / new, tokens)


def linear_bytes(model: nn.Module) -> tuple[int, bool]:
    """The bytes of the weights of all linears as they are held, and whether a token reads all of them."""
    size, reads_all = 0, True
    for module in model.modules():
        if isinstance(module, QuantLinear):
            size += module.nbytes
        elif isinstance(module, nn.Linear):
            size += module.weight.nbytes
        elif isinstance(module, QuantExperts) or isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            reads_all = False  # fused experts, of which a token visits some
    return size, reads_all
