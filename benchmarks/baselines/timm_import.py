"""Import timm without torchvision. timm imports torchvision, but its BEiT does not need it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence


class _Anything:
    """An object that can be called, and whose attributes are such classes."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __call__(self, *args: object, **kwargs: object) -> _Anything:
        return self


class _MetaAnything(type):
    """Metaclass of classes that have every attribute."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _MetaAnything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0.0"  # type: ignore[attr-defined]


def import_timm() -> types.ModuleType:
    """Import timm and its BEiT, and remove the stub of torchvision afterwards."""
    if importlib.util.find_spec("torchvision") is not None:
        return _imported()
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        return _imported()
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def _imported() -> types.ModuleType:
    import timm
    import timm.layers
    import timm.models.beit

    return timm
