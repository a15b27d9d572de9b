"""Run a callback when an optional dependency is imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, action: Callable[[ModuleType], None]) -> Callable[[], None]:
    """Call `action` with the module `name`: now if it is already imported, else right after its import.

    Returns:
        A function that cancels the action; it does nothing after the import.
    """
    finder = _ActAfterImport(name, action)
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, finder)
    return lambda: sys.meta_path.remove(finder) if finder in sys.meta_path else None


class _ActAfterImport(importlib.abc.MetaPathFinder):
    """Finder that runs the action after one module is executed. It locates the module as Python would."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # otherwise another thread or a reload was first
                    sys.meta_path.remove(self)
                    self.action(module)

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
