"""Calls a function as soon as a module has been imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(awaited: str, callback: Callable[[], object]) -> None:
    """Call ``callback`` right after module ``awaited`` is imported, or now if it is already. Imports nothing itself."""
    if awaited in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Finder(awaited, callback))


class _Finder(MetaPathFinder):
    """Finds one module, once, through the finders after it, and wraps its loader."""

    def __init__(self, awaited: str, callback: Callable[[], object]) -> None:
        self.awaited, self.callback = awaited, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.callback)
        return spec


class _Loader(Loader):
    """The module's own loader, with a callback after it."""

    def __init__(self, loader: Loader, callback: Callable[[], object]) -> None:
        self.loader, self.callback = loader, callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # from here on nothing is special about the module
        self.loader.exec_module(module)
        self.callback()
