"""Chats as token ids, by the model's own chat template, with a mark on the tokens of the answers.

The template writes the text of a whole chat, many chats at a time, in a confined process (``chat_templates``). It is tokenised
without special tokens, since the template writes them; where the tokenizer begins every text with one (BOS) and the template
did not write it, it is put there, and one that stands twice at the beginning is taken away: it is there once.

Which tokens are an answer is found by writing the chat a second time with markers in place of what was said: the texts between
the markers are the template's own, and what stands between them in the first text are the turns. An answer goes with the
special token behind it, which the model has to write too. A model without a chat template gets the turns as plain text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qkit.calibration.chat_templates import fixed_date, rendered_all
from qkit.calibration.dataset import token_ids
from qkit.calibration.records import Record
from qkit.errors import BadCalibration
from qkit.files.foreign import foreign_errors
from qkit.files.safefile import shown

ANSWERS = ("assistant",)
_TOKENIZER = "the tokenizer of the model cannot read the text"
_AGAIN = "use the tokenizer's files of the original model"

Span = tuple[int, int]  # [start, stop) of characters


@dataclass(frozen=True)
class Tokens:
    """The tokens of a chat or a text. answers: whether each is part of an answer; None where that was not asked for"""

    ids: list[int]
    answers: list[bool] | None = None


class Chats:
    """Writes chats for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bos = _first_token(tokenizer)
        self._ends = [str(t) for t in getattr(tokenizer, "all_special_tokens", ())]
        self._ends += [t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values()]

    @cached_property
    def template(self) -> str | None:
        """The chat template that transformers would use for a chat; None where the model has none."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return None
        with foreign_errors("the chat template of the model cannot be used", "copy the original model's files"):
            return str(self.tokenizer.get_chat_template())

    @property
    def digest(self) -> str:
        """sha256 of the chat template, '' where there is none."""
        return "" if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()

    def tokens(self, records: Sequence[Record], answers: bool) -> list[Tokens]:
        """The tokens of chats and texts. answers: mark those of answers; a text has none.

        Raises BadCalibration, naming the record, for a chat that the template refuses or whose answers cannot be told apart.
        """
        chats = [r for r in records if r.is_chat]
        written = iter(self._written(chats, answers))
        return [self._chat(r, *next(written), answers) if r.is_chat else self._text(r, answers) for r in records]

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """The tokens of what a user says, up to where the model's answer begins; the text itself without a chat template.

        Raises BadCalibration for a question that the template refuses.
        """
        if self.template is None:
            return [self._with_bos(token_ids(self.tokenizer, question))[0] for question in questions]
        chats = [[{"role": "user", "content": question}] for question in questions]
        texts = rendered_all(self.tokenizer, fixed_date(self.template), chats, [[] for _ in chats], prompt=True)
        for question, text in zip(questions, texts, strict=True):
            if text.failure is not None:
                raise BadCalibration(
                    f"the chat template of the model refuses the prompt {shown(question, 60)}: {text.failure}"
                )
        return [self._with_bos(token_ids(self.tokenizer, text.text))[0] for text in texts]

    def _text(self, record: Record, answers: bool) -> Tokens:
        if answers:
            raise BadCalibration(f"{record.where}: a text has no answers: leave --answers-only out, or use chats")
        ids = token_ids(self.tokenizer, record.text)
        return Tokens(ids if not ids or self._bos is None or ids[0] == self._bos else [self._bos, *ids])

    def _written(self, chats: Sequence[Record], answers: bool) -> list[tuple[str, list[Span]]]:
        """The text of every chat, and the characters of its answers."""
        if self.template is None:
            return [_plain(chat) for chat in chats]
        said = [list(chat.messages) for chat in chats]
        tools = [list(chat.tools) for chat in chats]
        texts = rendered_all(self.tokenizer, fixed_date(self.template), said, tools)
        for chat, text in zip(chats, texts, strict=True):
            if text.failure is not None:
                raise BadCalibration(f"{chat.where}: the chat template of the model refuses this chat: {text.failure}")
            if not _is_whole(chat, text.text):
                raise BadCalibration(f"{chat.where}: the chat template of the model leaves a turn out: use other data")
        if not answers:
            return [(text.text, []) for text in texts]
        marked = [_marked(chat, text.text) for chat, text in zip(chats, texts, strict=True)]
        frames = rendered_all(self.tokenizer, fixed_date(self.template), [m for m, _ in marked], tools)
        return [
            (text.text, self._spans(chat, text.text, frame.text, markers))
            for chat, text, frame, (_, markers) in zip(chats, texts, frames, marked, strict=True)
        ]

    def _spans(self, chat: Record, text: str, frame: str, markers: list[str]) -> list[Span]:
        """The characters of the answers. frame: the text with a marker in place of every turn."""
        glue, rest = list[str](), frame
        for marker in markers:
            before, found, rest = rest.partition(marker)
            glue += [before] if found else []
        glue.append(rest)
        contents = [m["content"] for m in chat.messages]
        turns = None
        if len(glue) == len(contents) + 1:
            turns = _joined(glue, contents, text) or _joined(glue, [c.strip() for c in contents], text)
            turns = turns or _between(glue, text)
        if turns is None:
            raise BadCalibration(
                f"{chat.where}: the answers of this chat cannot be told apart in what the chat template of the model writes: "
                "leave --answers-only out, or use other data"
            )
        spans = []
        for message, (start, stop), behind in zip(chat.messages, turns, glue[1:], strict=True):
            if message["role"] in ANSWERS:
                spans.append((start, stop + max((len(e) for e in self._ends if e and behind.startswith(e)), default=0)))
        return spans

    def _chat(self, record: Record, text: str, spans: list[Span], answers: bool) -> Tokens:
        if not answers:
            return Tokens(self._with_bos(token_ids(self.tokenizer, text))[0])
        ids, offsets = _with_offsets(self.tokenizer, text, record.where)
        marks = [any(a < stop and b > start for start, stop in spans) for a, b in offsets]
        ids, added = self._with_bos(ids)
        marks = [False, *marks] if added > 0 else marks[-added:] if added < 0 else marks
        return Tokens(ids, marks)

    def _with_bos(self, ids: list[int]) -> tuple[list[int], int]:
        """The ids with BOS once, and how many ids came (1) or went (-1) at the beginning."""
        known = self._bos if self._bos is not None else getattr(self.tokenizer, "bos_token_id", None)
        if known is not None and ids[:2] == [known, known]:
            return ids[1:], -1
        if self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids], 1
        return ids, 0


def _first_token(tokenizer: Any) -> int | None:
    """BOS, where the tokenizer begins every text with it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    with foreign_errors(_TOKENIZER, _AGAIN):
        ids = list(tokenizer("a", verbose=False)["input_ids"])
    return bos if bos is not None and ids[:1] == [bos] else None


def _plain(chat: Record) -> tuple[str, list[Span]]:
    """The turns as paragraphs, for a model without a chat template; and the characters of the answers."""
    text, spans = "", list[Span]()
    for message in chat.messages:
        text += "\n\n" * bool(text)
        if message["role"] in ANSWERS:
            spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    return text, spans


def _is_whole(chat: Record, text: str) -> bool:
    """Whether everything that users said stands in the text: templates may shorten answers (their reasoning)."""
    said = [m["content"] for m in chat.messages if m["role"] == "user"]
    return all(content.strip() in text for content in said)


def _marked(chat: Record, text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The turns with a marker in place of what was said, and the markers. They do not occur in ``text``."""
    name = "qkitmark"
    while name in text:
        name += "x"
    markers = [f"{name}{number}end" for number in range(len(chat.messages))]
    return [{**m, "content": marker} for m, marker in zip(chat.messages, markers, strict=True)], markers


def _joined(glue: Sequence[str], contents: Sequence[str], text: str) -> list[Span] | None:
    """The characters of the turns, if the text is these contents between the pieces of the template."""
    spans, made = list[Span](), glue[0]
    for content, behind in zip(contents, glue[1:], strict=True):
        spans.append((len(made), len(made) + len(content)))
        made += content + behind
    return spans if made == text else None


def _between(glue: Sequence[str], text: str) -> list[Span] | None:
    """The characters of turns that the template changed (it leaves reasoning out): what stands between its own pieces."""
    if not text.startswith(glue[0]) or not text.endswith(glue[-1]) or not all(glue[1:-1]):
        return None
    spans, at, end = list[Span](), len(glue[0]), len(text) - len(glue[-1])
    for behind in glue[1:-1]:
        found = text.find(behind, at, end)
        if found < 0:
            return None
        spans.append((at, found))
        at = found + len(behind)
    return [*spans, (at, end)]


def _with_offsets(tokenizer: Any, text: str, where: str) -> tuple[list[int], list[Span]]:
    """Token ids, and the characters of each."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadCalibration(
            f"{where}: the tokenizer of this model does not say where its tokens begin: leave --answers-only out"
        )
    with foreign_errors(_TOKENIZER, _AGAIN):
        encoding = backend.encode_batch([text], add_special_tokens=False)[0]
        return list(encoding.ids), list(encoding.offsets)
