"""How docstrings of qkit read on a page of the documentation: an extension of Griffe, which mkdocstrings reads them with.

A docstring describes arguments and fields in lines of the form ``name: what it is``, continued in lines that are indented. On
a page they become a list. Names in double backticks become code.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ENTRY = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*):\s+(\S.*)$")
_HEADINGS = ("example", "examples", "raises", "returns", "yields")


def as_markdown(text: str) -> str:
    """The docstring with its lists of arguments as lists of Markdown."""
    lines: list[str] = []
    inside = False  # an entry of a list
    for line in text.replace("``", "`").replace("][", "]\\[").splitlines():  # two brackets would be a link
        entry = _ENTRY.match(line)
        if entry and entry[1] not in _HEADINGS:
            if not inside and lines and lines[-1]:
                lines.append("")  # a list of Markdown needs an empty line before it
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            lines.append(f"- {names}: {entry[2]}")
            inside = True
        elif inside and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        else:
            if inside and line:
                lines.append("")
            lines.append(line)
            inside = False
    return "\n".join(lines)


class Docstrings(Extension):
    """Rewrites every docstring that has none of Google's sections of its own."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by Griffe for every object that it has read."""
        if obj.docstring is not None and not re.search(r"^(Args|Arguments|Parameters):$", obj.docstring.value, re.M):
            obj.docstring.value = as_markdown(obj.docstring.value)
