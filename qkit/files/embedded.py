"""Reference models and texts of the package qkit_data, which is installed by itself (the extra ``data``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from qkit.system.extras import needs


def reference_models() -> dict[str, Path]:
    """Folders of the reference models by name; none without qkit_data."""
    if find_spec("qkit_data") is None:
        return {}
    import qkit_data

    found = {name: qkit_data.model_path(name) for name in qkit_data.models()}
    return {name: path for name, path in found.items() if path is not None}


def embedded_chats() -> Path:
    """The chats for calibration, JSON lines. Raises Unsupported without qkit_data."""
    with needs("the embedded calibration chats", "data"):
        import qkit_data
    return Path(str(qkit_data.chats_path()))


def embedded_prompts() -> Path:
    """The prompts for an evaluation, JSON lines. Raises Unsupported without qkit_data."""
    with needs("the embedded prompts", "data"):
        import qkit_data
    return Path(str(qkit_data.prompts_path()))


def embedded_text(name: str) -> Path:
    """The text of that name. Raises Unsupported without qkit_data."""
    with needs(f"the embedded {name} text", "data"):
        import qkit_data
    return Path(str(qkit_data.text_path(name)))
