"""Names of a package that are imported at their first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def import_at_first_use(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Return a name of a package for its `__getattr__`.

    Args:
        package: The package, its `__name__`.
        modules: The module of each name, relative to the package.
        name: The name.

    Raises:
        AttributeError: If the package does not have the name.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name], package), name)
