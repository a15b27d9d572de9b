"""The console script `beit-fast`.

It is outside the package, whose import needs torch. Help, the version and wrong arguments are then answered at once,
and Ctrl-C during the imports of a command ends it like Ctrl-C later.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "beit_fast"


def main() -> int:
    """Run the command of `sys.argv` and return its exit code."""
    try:
        return _main()
    except KeyboardInterrupt:  # before `run` of the package handles it
        print("beit-fast: interrupted", file=sys.stderr)
        return 130


def _main() -> int:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.loader is None or _PACKAGE in sys.modules:
        from beit_fast.cli.main import main as run_command

        return run_command()
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package  # its modules can be imported; `__init__` runs before the command
    from beit_fast.cli.main import main as run_command

    return run_command(prepare=lambda: _execute(spec, package))


def _execute(spec: ModuleSpec, package: ModuleType) -> None:
    assert spec.loader is not None
    spec.loader.exec_module(package)
