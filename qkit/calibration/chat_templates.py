"""Runs chat templates of model folders in a process of its own, limited to 5 s and 512 MB.

A chat template is a program. jinja's sandbox keeps it from reaching files, but not from an endless loop or a string that grows.
The text that the process wrote comes back as a constant template, so the processor uses it in place of its own.
"""

from __future__ import annotations

import ast
from typing import Any

from qkit.system.confined import Failed, confined

_BEFORE, _AFTER = "{{ ", " }}"


class TemplateFailure(Exception):
    """A chat template that raises an exception; the message is its own."""


def rendered(processor: Any, messages: list[dict[str, Any]], prompt: bool, template: str | None = None) -> str:
    """A constant template: the text that the processor's chat template (or ``template``) writes for these messages.

    prompt: add the beginning of the answer. Raises Exceeded where the template exceeds the limits, TemplateFailure where it
    raises an exception.
    """
    options = {} if template is None else {"chat_template": template}

    def write() -> str:
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options))

    try:
        return _BEFORE + ascii(confined(write)) + _AFTER
    except Failed as e:
        raise TemplateFailure(str(e) or e.kind) from e


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
