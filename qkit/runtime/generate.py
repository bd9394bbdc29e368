"""Decoding with a static KV cache and, on a GPU, one CUDA graph a token.

A decode step of a quantized model is hundreds of kernels of a few microseconds; launched one by one from Python they
cost more than they compute. ``Decoder`` records a step once and replays it. Its tokens are those of transformers'
``generate`` with a plain cache, except for ties that floating point decides. It ignores a KV cache policy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from qkit.errors import UsageError
from qkit.kvcache.argument import with_cache
from qkit.system.memory import give_back

Draw = Callable[
    [Tensor, torch.Generator], Tensor
]  # (probabilities [batch, vocabulary], generator) -> tokens, int64 [batch]
_GROWTH = 64  # tokens


class Decoder:
    """Generates with a model as ``qkit.load`` returns it (or any causal language model of transformers).

    length: largest number of tokens, prompt included; memory for their keys and values is allocated once.
    A decoder serves one call at a time.
    """

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length = model, length
        self._cache: Any = None
        self._graph: Any = None
        self._batch, self._recordable = 0, False

    @torch.inference_mode()
    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Collection[int] = (),
        draw: Draw | None = None,
    ) -> Tensor:
        """Prompt and continuation: int64 [batch, prompt + at most ``new_tokens``].

        tokens: int64 [batch, prompt], none of them padding; temperature: 0 takes the most likely token, else it is
        sampled, after top_k and top_p as transformers defines them; seed: of the samples; stop: token ids after which
        a sequence is over (it ends when all sequences are, filled up with the first of them); draw: how tokens are
        sampled, with random numbers of the CPU (None: with those that transformers takes, of the model's device). Raises
        UsageError for a prompt that leaves no room.
        """
        batch, prompt = tokens.shape
        if prompt + new_tokens > self.length:
            raise UsageError(
                f"{prompt} tokens of prompt and {new_tokens} new ones: the decoder was made for {self.length} in all"
            )
        self._start(batch)
        pick = _picker(temperature, top_k, top_p, seed, self.model.device, draw)
        pieces = [tokens.to(self.model.device)]
        finished = torch.zeros(batch, dtype=torch.bool, device=self.model.device)
        ends = torch.tensor(sorted(stop), dtype=torch.int64, device=self.model.device)
        logits = self._forward(pieces[0])
        for i in range(new_tokens):
            token = pick(torch.cat(pieces, dim=1), logits)
            if stop:
                token = torch.where(finished, ends[0], token)
                finished |= torch.isin(token, ends)
            pieces.append(token[:, None])
            if (stop and bool(finished.all())) or i == new_tokens - 1:
                break
            logits = self._step(token[:, None])
        return torch.cat(pieces, dim=1)

    def _start(self, batch: int) -> None:
        """Make an empty cache, or reset it. Its shape follows the first prompt: another batch size needs a new one."""
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        self._filled = 0
        if batch == self._batch and self._recordable:
            self._cache.reset()
            return
        self._batch, self._graph, self._room = batch, None, self.length
        self._cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        # Other layers (sliding windows) count their tokens in Python, which a graph does not see.
        plain = all(type(layer) is StaticLayer for layer in self._cache.layers)
        self._recordable = plain and self.model.device.type == "cuda"
        if plain and not self._recordable:
            self._cache, self._room = StaticCache(config=self.model.config, max_cache_len=0), 0

    def _make_room(self, tokens: int) -> None:
        """Enlarge the cache for ``tokens`` tokens. On a CPU all of it is read at every token, so it grows with its content."""
        from transformers import StaticCache

        if tokens <= self._room:
            return
        self._room = min(self.length, -(-tokens // _GROWTH) * _GROWTH)
        old_cache, self._cache = self._cache, StaticCache(config=self.model.config, max_cache_len=self._room)
        for old_layer, layer in zip(old_cache.layers, self._cache.layers, strict=True):
            if old_layer.is_initialized:
                layer.lazy_initialization(old_layer.keys, old_layer.values)
                layer.keys[:, :, : old_layer.max_cache_len] = old_layer.keys
                layer.values[:, :, : old_layer.max_cache_len] = old_layer.values
                layer.cumulative_length.copy_(old_layer.cumulative_length)
                old_layer.keys = old_layer.values = None  # so only one layer is there twice at a time
        give_back()  # a heap does not find room for the larger layers in what the smaller ones left

    def _forward(self, tokens: Tensor) -> Tensor:
        """Logits after the last of the tokens, float32 [batch, vocabulary]; the tokens are added to the cache."""
        self._filled += tokens.shape[1]
        self._make_room(self._filled)
        out = self.model(input_ids=tokens, **with_cache(self.model, self._cache), use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1].to(torch.float32)
        return logits

    def _step(self, token: Tensor) -> Tensor:
        if not self._recordable:
            return self._forward(token)
        if self._graph is None:
            self._record(token)
        self._token.copy_(token)
        self._graph.replay()
        return self._logits

    def _record(self, token: Tensor) -> None:
        """Record a step as a CUDA graph. Trial steps write beyond the length of the cache, and are overwritten."""
        self._token = token.clone()
        filled = [layer.cumulative_length.clone() for layer in self._cache.layers]

        def restore() -> None:
            for layer, n in zip(self._cache.layers, filled, strict=True):
                layer.cumulative_length.copy_(n)

        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            side_stream
        ):  # compiles the kernels and warms the allocator, neither of which a recording may do
            for _ in range(2):
                self._forward(self._token)
                restore()
        torch.cuda.current_stream().wait_stream(side_stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward(self._token)
        restore()


def _multinomial(chances: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


def _picker(
    temperature: float, top_k: int | None, top_p: float | None, seed: int, device: torch.device, draw: Draw | None
) -> Any:
    """A function (tokens so far, logits) that gives the next token of each sequence, int64 [batch]."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if temperature == 0.0:
        return lambda _, logits: logits.argmax(-1)
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warp.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warp.append(TopPLogitsWarper(top_p))
    generator = torch.Generator(device if draw is None else "cpu").manual_seed(seed)

    def sample(tokens: Tensor, logits: Tensor) -> Tensor:
        return (draw or _multinomial)(warp(tokens, logits).softmax(-1), generator)

    return sample
