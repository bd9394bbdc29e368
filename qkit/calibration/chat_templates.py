"""Runs chat templates of model folders in a process of their own, limited to 5 s a text and 512 MB.

A chat template is a program. jinja's sandbox keeps it from reaching files, but not from an endless loop or a string that grows.
The text that the process wrote comes back as a constant template, so the processor uses it in place of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qkit.errors import BadCalibration
from qkit.system.confined import SECONDS, Exceeded, Failed, confined, confined_each

_BEFORE, _AFTER = "{{ ", " }}"
# Templates that write today's date would give other rows tomorrow, and a job that was stopped could not go on.
_DATE = "{%- macro strftime_now(format) -%}{{ '2024-07-26' if '-' in format else '26 Jul 2024' }}{%- endmacro %}"


class TemplateFailure(Exception):
    """A chat template that raises an exception; the message is its own."""


def rendered(processor: Any, messages: list[dict[str, Any]], prompt: bool, template: str | None = None) -> str:
    """A constant template: the text that the processor's chat template (or ``template``) writes for these messages.

    prompt: add the beginning of the answer. Raises Exceeded where the template exceeds the limits, TemplateFailure where it
    raises an exception.
    """
    outcome = rendered_each(processor, [(messages, prompt)], template)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def rendered_each(
    processor: Any, asked: Sequence[tuple[list[dict[str, Any]], bool]], template: str | None = None
) -> list[str | TemplateFailure | Exceeded]:
    """What ``rendered`` returns or raises for each of these messages and prompts, all in one confined process.

    The first that exceeds a limit is the last of the list.
    """
    options = {} if template is None else {"chat_template": template}

    def write(messages: list[dict[str, Any]], prompt: bool) -> str:
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options))

    found: list[str | TemplateFailure | Exceeded] = []
    for outcome in confined_each([partial(write, *one) for one in asked]):
        if isinstance(outcome, Exceeded):
            found.append(outcome)
        elif isinstance(outcome, Failed):
            found.append(TemplateFailure(str(outcome) or outcome.kind))
        else:
            found.append(_BEFORE + ascii(outcome) + _AFTER)
    return found


def written(constant: str) -> str:
    """The text of a constant template made by ``rendered``."""
    return str(ast.literal_eval(constant[len(_BEFORE) : -len(_AFTER)]))


class Confined:
    """A processor or tokenizer whose chat template runs in a confined process; everything else is delegated to it."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the processor itself."""
        return self._processor(*args, **kwargs)

    def apply_chat_template(self, messages: Any, *, tokenize: bool = False, **kwargs: Any) -> Any:
        """Result of the processor's method, with the text written in a confined process. Raises as ``rendered`` does."""
        template, prompt = kwargs.pop("chat_template", None), bool(kwargs.pop("add_generation_prompt", False))
        if kwargs.pop("continue_final_message", False):
            prompt = False
        constant = rendered(self._processor, messages, prompt, template)
        if not tokenize:
            return written(constant)
        return self._processor.apply_chat_template(messages, chat_template=constant, tokenize=True, **kwargs)


# ---- many chats ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a chat template wrote for one chat; failure: the message of the exception that it raised"""

    text: str
    failure: str | None = None


def fixed_date(template: str) -> str:
    """The template with a fixed date in place of today's."""
    return _DATE + template if "strftime_now" in template else template


def rendered_all(
    tokenizer: Any,
    template: str,
    chats: Sequence[list[dict[str, Any]]],
    tools: Sequence[list[Any]],
    prompt: bool = False,
) -> list[Written]:
    """The text of every chat, all in one confined process; prompt: with the beginning of an answer behind it. Raises
    BadCalibration where it exceeds the limits.

    Where a template takes no system turn, what that says goes before the first turn of the user; where it expects content in
    parts, as those of vision-language models do, it gets parts.
    """

    def write() -> list[tuple[str, str | None]]:
        return [_render(tokenizer, template, chat, called, prompt) for chat, called in zip(chats, tools, strict=True)]

    if not chats:
        return []
    try:
        return [Written(text, failure) for text, failure in confined(write, SECONDS + len(chats))]
    except (Exceeded, Failed) as e:
        needs = f"needs {e}" if isinstance(e, Exceeded) else f"fails: {e}"
        raise BadCalibration(
            f"the chat template of the model {needs} for {len(chats)} chats: download the template again, or use text"
        ) from e


def _render(
    tokenizer: Any, template: str, chat: list[dict[str, Any]], tools: list[Any], prompt: bool
) -> tuple[str, str | None]:
    failure, best = "", None
    for turns in (chat, _without_system(chat), _in_parts(chat)):
        if turns is None:
            continue
        try:
            text = str(
                tokenizer.apply_chat_template(
                    turns, tools=tools or None, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as e:  # whatever a template raises is its answer to this chat
            failure = failure or (str(e).strip() or type(e).__name__).partition("\n")[0]
            continue
        if all(str(turn["content"]).strip() in text for turn in chat if turn["role"] == "user"):
            return text, None
        best = text if best is None else best
    return (best, None) if best is not None else ("", failure)


def _without_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    if len(chat) < 2 or chat[0]["role"] != "system" or chat[1]["role"] != "user":
        return None
    return [{**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]


def _in_parts(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
