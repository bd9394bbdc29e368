"""lm-eval's requests, answered by an engine: all of one kind in one run.

Texts become tokens here, as in lm-eval's own model for transformers. So an engine needs no tokenizer, its figures and those of
qkit are of the same tokens, and tasks need nothing of an engine that a proof does not need: log-probabilities of tokens of a
prompt, and greedy tokens after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

from qkit.engines.process import EngineAnswer

NEW = 256  # tokens that a task may want without saying so, as in lm-eval's own models


class Ask(Protocol):
    """Runs prompts in an engine; arguments as in ``EngineJob``."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        scored: Sequence[int],
        new_tokens: Sequence[int],
        stops: Sequence[Sequence[int]] = (),
    ) -> EngineAnswer: ...


def engine_lm(ask: Ask, tokenizer: Any, positions: int, ends: Collection[int] = ()) -> Any:
    """A model for lm-eval whose figures are an engine's; arguments as for ``EngineRequests``."""
    from lm_eval.api.model import TemplateLM

    class Model(EngineRequests, TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            TemplateLM.__init__(self)
            EngineRequests.__init__(self, ask, tokenizer, positions, ends)

    return Model()


class EngineRequests:
    """What lm-eval asks of a model, asked of an engine. The rest of such a model is lm-eval's own.

    positions: tokens that the model can see at once; ends: tokens that end a text, beside that of the tokenizer
    """

    def __init__(self, ask: Ask, tokenizer: Any, positions: int, ends: Collection[int] = ()) -> None:
        self.ask, self.tokenizer, self.positions = ask, tokenizer, positions
        self.ends = {*ends} | ({tokenizer.eos_token_id} - {None})
        self._pieces: list[str] = []

    @property
    def eot_token_id(self) -> Any:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        """What stands before a text that nothing comes before. Raises ValueError for a tokenizer that has no such token."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        first = next((token for token in ids if token is not None), None)
        if first is None:
            raise ValueError("the tokenizer has no token that begins or ends a text")
        return first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, begun as the tokenizer begins one unless the text says so itself."""
        from lm_eval.models.utils import has_bos_prefix

        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(self, requests: Iterable[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of the continuations, and whether all their tokens are the most likely ones. Raises ValueError for one that is longer
        than the model can see."""
        prompts, scored = [], []
        for _texts, context, continuation in requests:
            if len(continuation) >= self.positions:
                raise ValueError(f"an answer has {len(continuation)} tokens, and the model can see {self.positions}")
            prompts.append([*context, *continuation][-self.positions :])
            scored.append(len(continuation))
        answer = self.ask(prompts, scored=scored, new_tokens=[0] * len(prompts))
        return [(sum(row), all(best)) for row, best in zip(answer.logprobs, answer.best, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole documents, in windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.positions - 1, 1)
            found = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += found
            owners += [i] * len(found)
        sums = [0.0] * len(requests)
        for i, (value, _best) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += value
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The most likely text after each prompt, up to what ends it. Raises ValueError for a task that wants drawn text, or
        more than the model can see."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        prompts, counts, untils = [], [], []
        for request in requests:
            text, wanted = request.args
            settings: Any = normalize_gen_kwargs(wanted, NEW)
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise ValueError(
                    "the task draws its answers (do_sample), and engines are asked for the most likely text"
                )
            count = settings["max_gen_toks"]
            if count >= self.positions:
                raise ValueError(f"the task wants {count} tokens, and the model can see {self.positions}")
            end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
            prompts.append(self.tok_encode(text)[count - self.positions :])
            counts.append(count)
            untils.append(handle_stop_sequences(settings["until"], eos=end))
        stops = {tuple(until): self.stop_tokens(until) for until in untils}
        answer = self.ask(
            prompts, scored=[0] * len(prompts), new_tokens=counts, stops=[stops[tuple(until)] for until in untils]
        )
        return [self._text(made, until) for made, until in zip(answer.tokens, untils, strict=True)]

    def stop_tokens(self, until: Sequence[str]) -> list[int]:
        """The tokens that end a text: those with one of these strings in them, and the model's own. Where a string is made by
        several tokens the engine goes on, and what is behind it is cut off here: that takes longer and changes nothing."""
        self._pieces = self._pieces or [self.tokenizer.decode([i]) for i in range(len(self.tokenizer))]
        found = {i for i, piece in enumerate(self._pieces) if any(end and end in piece for end in until)}
        return sorted(found | self.ends)

    def _text(self, tokens: Sequence[int], until: list[str]) -> str:
        from lm_eval.models.utils import postprocess_generated_text

        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return str(postprocess_generated_text(text, until, None))
