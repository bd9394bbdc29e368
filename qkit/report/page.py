"""The templates of pages: each page is one file that needs nothing beside it and loads nothing."""

from __future__ import annotations

import base64
from importlib.resources import files
from typing import Any

from qkit.system.extras import needs


def page(name: str, **values: Any) -> str:
    """The filled template NAME.html.j2 of this folder. jinja2 escapes every value: they come from anywhere."""
    with needs("a report page", "report"):
        from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(file: str) -> str:
        return files("qkit.report").joinpath(file).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(source)
    )
    return environment.get_template(f"{name}.html.j2").render(**values)


def data_uri(image: bytes) -> str:
    """The data address of a PNG or SVG file."""
    kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
    return f"data:image/{kind};base64," + base64.b64encode(image).decode()
