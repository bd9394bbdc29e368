"""The options of quantize and plan on the command line, and the first line of these commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qkit.commands.common import announce
from qkit.files.locate import find_model

if TYPE_CHECKING:
    from qkit.workflows.options import QuantizeOptions


def options_of(values: dict[str, Any], out: Path, console: Console) -> QuantizeOptions:
    """The request of parsed options; prints the first line of the command once they are sound.

    Raises what ``read_options`` raises, and BadCheckpoint where there is no such model.
    """
    from qkit.workflows.options import read_options  # here: the help does not wait for pydantic

    options = read_options(values, out)
    announce(console, f"reading {options.request.model}")
    find_model(options.request.model)
    return options
