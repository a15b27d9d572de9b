"""The folder `benchmarks/` as a package, for tests, whatever else is called so."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PACKAGE = "beit_fast_benchmarks"


@contextlib.contextmanager
def benchmark_house() -> Iterator[ModuleType]:
    """The package with all its modules imported, and forgotten at the end."""
    spec = importlib.util.spec_from_file_location(PACKAGE, BENCHMARKS / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    for name in ("cases", "clocks", "peers", "plot", "rows", "targets"):
        importlib.import_module(f"{PACKAGE}.{name}")
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
