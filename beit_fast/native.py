"""Load the native libraries compiled from csrc/.

`unsupported_reason` returns the reason if one cannot be loaded. `_C` is loaded when `beit_fast` is imported and
`_C_cuda` at the first call on CUDA. They only add kernels to operators that `beit_fast.ops` has defined, so the package
works without them. `BEIT_FAST_NATIVE=0` loads neither. This module does not import torch, and setup.py runs it alone.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

LIBRARIES = {"_C": "operators on the CPU", "_C_cuda": "patch embedding on CUDA"}
"""The libraries, and what each contains."""

INTERFACE = 2
"""Version in a library's file name; increment it when a schema or the meaning of an argument changes. A library with
another version is never loaded."""

BUILD_NOTES = "native_build.json"
"""File in which the installation records what each library was built for, or why it was not built."""

FOLDER = Path(__file__).parent

_loaded: dict[str, ctypes.CDLL] = {}
_failures: dict[str, str] = {}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def file_name(library: str) -> str:
    """File name of `library`, without a Python version: one file serves every Python."""
    return f"{library}.{INTERFACE}.so"


def load(library: str) -> bool:
    """Load `library` if possible and return whether it is loaded; torch must be imported before.

    Warns once if the library exists but does not load.
    """
    if library not in _loaded and unsupported_reason(library) is None:
        try:
            _loaded[library] = ctypes.CDLL(str(FOLDER / file_name(library)))
        except OSError as error:
            _failures[library] = f"{file_name(library)} does not load: {error}"
            warnings.warn(f"beit_fast: {_failures[library]}", RuntimeWarning, stacklevel=2)
    return library in _loaded


def is_loaded(library: str) -> bool:
    """Whether `library` is loaded."""
    return library in _loaded


def unsupported_reason(library: str) -> str | None:
    """Return the reason why `library` cannot be used; None if none is known. The library is not loaded for this."""
    if library in _loaded:
        return None
    error = variable_error()
    if error is not None:
        return error
    if _is_disabled():
        return "BEIT_FAST_NATIVE=0 was set when beit_fast was imported"
    if _INTERPRETED and library == "_C":
        return "TRITON_INTERPRET=1 was set when beit_fast was imported"
    if library in _failures:
        return _failures[library]
    if not (FOLDER / file_name(library)).exists():
        return f"{file_name(library)} was not built{_build_failure(library)}"
    return None


def missing_kernels() -> str | None:
    """Return why attention on the CPU runs as PyTorch operations.

    The result is None if faster kernels run it, or if `check_variables` raises.
    """
    if variable_error() is not None:
        return None
    reason = None if _INTERPRETED else unsupported_reason("_C")
    return None if reason is None else f"attention on this CPU runs as PyTorch operations, which is slow: {reason}"


@functools.cache
def warn_of_missing_kernels() -> None:
    """Warn once per process if `missing_kernels()` returns a reason.

    There is no warning if `BEIT_FAST_NATIVE=0` is set or `load` has warned.

    Raises:
        ValueError: If `BEIT_FAST_NATIVE` is set to an unknown value.
    """
    check_variables("cpu")
    message = missing_kernels()
    if message is not None and not _is_disabled() and "_C" not in _failures:
        remedy = "install with a C++ compiler and --no-build-isolation, or set BEIT_FAST_NATIVE=0 to accept this"
        warnings.warn(f"beit_fast: {message}; {remedy}", RuntimeWarning, stacklevel=2)


def check_variables(device_type: str) -> None:
    """Check the environment variables that choose native kernels.

    Raises:
        ValueError: If `BEIT_FAST_NATIVE`, or for the CPU `BEIT_FAST_CPU_ISA`, cannot be honored.
    """
    _is_disabled()
    if device_type == "cpu":
        check_instruction_set()


def variable_error() -> str | None:
    """Return the error of `BEIT_FAST_NATIVE`; None if its value is accepted."""
    try:
        _is_disabled()
    except ValueError as error:
        return str(error)
    return None


def check_instruction_set() -> None:
    """Check `BEIT_FAST_CPU_ISA` alone. Without `_C` it is not read.

    Raises:
        ValueError: If `_C` cannot run that instruction set here.
    """
    error = instruction_set_error()
    if error is not None:
        raise ValueError(error)


def instruction_set_error() -> str | None:
    """Return the error of `BEIT_FAST_CPU_ISA`; None if `_C` runs that instruction set or is not loaded."""
    return ask("beit_fast_cpu_isa_error") or None


def _is_disabled() -> bool:
    from .utils import variables  # not at the top: setup.py runs this file without the package

    return variables.choice(variables.NATIVE, ("0", "1")) == "0"


def _build_failure(library: str) -> str:
    others = sorted(file.name for file in FOLDER.glob(f"{library}.*.so"))
    if others:
        return f", and {', '.join(others)} has another interface"
    note = _build_note(library, built=False)
    return "" if note is None else f": {note}"


def _build_note(library: str, built: bool) -> str | None:
    """Return the installation's note on `library`.

    The result is None if there is no note, or if the note is not for this `built`.
    """
    try:
        notes = json.loads((FOLDER / BUILD_NOTES).read_text())
    except (OSError, ValueError):
        return None
    entry = notes.get(library)
    return entry["note"] if entry is not None and entry["built"] is built else None


def describe(library: str) -> dict[str, Any]:
    """Facts about `library` for `beit-fast info`, as JSON values."""
    file = FOLDER / file_name(library)
    return {
        "serves": LIBRARIES[library],
        "interface": INTERFACE,
        "file": file.name if file.exists() else None,
        "built_for": _build_note(library, built=True) if file.exists() else None,
        "loaded": is_loaded(library),
        "reason": unsupported_reason(library),
    }


def instruction_sets() -> tuple[str | None, tuple[str, ...]]:
    """Return the instruction set that `_C` uses, and all usable sets.

    A usable set is one of `_C` that this CPU can run. Without `_C` the result is (None, ()). The first is also None if
    `instruction_set_error` returns an error.
    """
    if "_C" not in _loaded:
        return None, ()
    used, usable = ask("beit_fast_cpu_isa"), ask("beit_fast_cpu_isas")
    return used or None, tuple((usable or "").split(","))


def ask(function: str) -> str | None:
    """Call a `function` of `_C` that returns a string; None if `_C` lacks it or is not loaded."""
    call = getattr(_loaded.get("_C"), function, None)
    if call is None:
        return None
    call.restype = ctypes.c_char_p
    return call().decode()
