"""Chat templates of model folders, which are programs: written in a process of its own, in 5 s and 512 MB.

jinja's sandbox keeps a template from reaching anything, not from a loop without end or a string that doubles. What the process
wrote comes back as a template that is this one text, so that the processor goes on as it would have with its own.
"""

from __future__ import annotations

import ast
from typing import Any

from qkit.system.confined import Failed, confined

_BEFORE, _AFTER = "{{ ", " }}"


class TemplateFailure(Exception):
    """The template refuses what it is given; the message is its own."""


def rendered(processor: Any, messages: list[dict[str, Any]], prompt: bool, template: str | None = None) -> str:
    """A template that writes, whatever it is given, what the processor's own (or ``template``) writes for these messages.

    prompt: with what begins the answer. Raises Exceeded where the template takes too much, TemplateFailure where it refuses.
    """
    given = {} if template is None else {"chat_template": template}

    def write() -> str:
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **given))

    try:
        return _BEFORE + ascii(confined(write)) + _AFTER
    except Failed as e:
        raise TemplateFailure(str(e) or e.kind) from e


def written(constant: str) -> str:
    """The text that ``rendered`` is a template of."""
    return str(ast.literal_eval(constant[len(_BEFORE) : -len(_AFTER)]))


class Confined:
    """A processor, or a tokenizer, whose chat template runs confined; all else is its own."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """The processor's own."""
        return self._processor(*given, **named)

    def apply_chat_template(self, messages: Any, *, tokenize: bool = False, **named: Any) -> Any:
        """The processor's own, its text written by a process with limits. Raises as ``rendered``."""
        template, prompt = named.pop("chat_template", None), bool(named.pop("add_generation_prompt", False))
        if named.pop("continue_final_message", False):
            prompt = False
        constant = rendered(self._processor, messages, prompt, template)
        if not tokenize:
            return written(constant)
        return self._processor.apply_chat_template(messages, chat_template=constant, tokenize=True, **named)
