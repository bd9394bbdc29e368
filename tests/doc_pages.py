"""README.md and the pages of docs/, cut into code blocks, prose and sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^ *(```+)([\w-]*)[^\n]*\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)
NOT_RUN = "<!-- not run:"


@dataclass(frozen=True)
class Block:
    """A code block; ``note`` is the line before it."""

    language: str
    text: str
    note: str


@dataclass(frozen=True)
class Page:
    """A page; ``name`` is its path from the root of the repository."""

    name: str
    text: str

    @cached_property
    def blocks(self) -> list[Block]:
        found = FENCE.finditer(self.text)
        return [Block(m[2], m[3], self.text[: m.start()].rstrip("\n").rpartition("\n")[2]) for m in found]

    @cached_property
    def prose(self) -> str:
        """The text without front matter, code blocks and comments."""
        text = re.sub(r"\A---\n.*?\n---\n", "", self.text, flags=re.DOTALL)
        return re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)

    @property
    def commands(self) -> list[str]:
        """The lines in code blocks that call qkit; lines of usage in a synopsis are none."""
        texts = [block.text for block in self.blocks if block.language != "python"]
        return [line for text in texts for line in commands(text) if "[OPTIONS]" not in line]

    @property
    def sentences(self) -> list[str]:
        return sentences(self.prose)


def commands(text: str) -> list[str]:
    """The lines that call qkit; a backslash at the end joins the next line."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in re.findall(r"^\s*(?:\$ |- run: )?(qkit [^#\n]*)", joined, re.MULTILINE)]


def sentences(prose: str) -> list[str]:
    """Sentences of paragraphs and list items; tables are left out, inline code and a link count as their words."""
    text = re.sub(r"^ *\|.*$", "", prose, flags=re.MULTILINE)
    text = re.sub(r"^( *(?:[-*]|\d+\.) |#+ )", r"\n\1", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`+[^`]*`+", "`code`", text)
    pieces = [
        piece for part in re.split(r"\n\s*\n", text) for piece in re.split(r"(?<=[.!?])[\"')*]*\s+(?![a-z])", part)
    ]
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def page(name: str) -> Page:
    return Page(name, (ROOT / name).read_text(encoding="utf-8"))


README = page("README.md")
USER_PAGES = [README, *(page(f"docs/{path.name}") for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES = [
    *USER_PAGES,
    *(page(str(p.relative_to(ROOT))) for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent != ROOT / "docs"),
]
