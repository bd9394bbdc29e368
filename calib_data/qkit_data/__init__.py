"""Texts, tasks and reference models that travel with qkit, so that it works with no network.

The two task files in `task_dir()` are plain YAML for lm-eval, with no Python tags. Their `dataset_kwargs.data_files` is
a file name relative to this package (`evaluation.jsonl`, `cloze.jsonl`), because lm-eval wants an absolute path that is
not known before installation. The loader in `qkit/evaluation` reads a file with `yaml.safe_load`, puts
`str(data_path(name))` in that place, and hands the dict to `lm_eval.simple_evaluate(tasks=[task], ...)`.
SOURCES.md says where each file came from.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent
_TEXTS = ("calibration", "evaluation")

__all__ = ["chats_path", "data_path", "model_path", "models", "prompts_path", "task_dir", "text_path"]


def text_path(name: str) -> Path:
    """UTF-8 text: documents separated by one blank line. Raises ValueError for a name that is not in the package."""
    if name not in _TEXTS:
        raise ValueError(f'qkit_data has no text "{name}", expected one of: {", ".join(_TEXTS)}')
    return _ROOT / "text" / f"{name}.txt"


def chats_path() -> Path:
    """Chats for calibration: JSON lines, each with ``messages``, to be written by a model's own chat template."""
    return _ROOT / "text" / "chats.jsonl"


def prompts_path() -> Path:
    """Prompts for an evaluation: JSON lines, each with ``kind`` and ``prompt``; the model that is evaluated answers them."""
    return _ROOT / "text" / "prompts.jsonl"


def models() -> list[str]:
    """Names of the reference models, sorted."""
    found = [file for name in ("config.json", "model_index.json") for file in (_ROOT / "models").glob(f"*/{name}")]
    return sorted(file.parent.name for file in found)


def model_path(name: str) -> Path | None:
    """Folder of a reference model, as transformers or diffusers lay it out, or None if there is no model of that name."""
    return _ROOT / "models" / name if name in models() else None


def task_dir() -> Path:
    """Folder of the lm-eval task files (*.yaml)."""
    return _ROOT / "tasks"


def data_path(name: str) -> Path:
    """Data file of a task, by the name its YAML gives. Raises ValueError for a name that is not in the package."""
    known = {path.name: path for path in _ROOT.glob("*.jsonl")}
    if name not in known:
        raise ValueError(f'qkit_data has no data file "{name}", expected one of: {", ".join(sorted(known))}')
    return known[name]
