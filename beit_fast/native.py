"""The libraries compiled from csrc/: where they lie, whether they are loaded, and why one is not. Needs no torch.

`_C` is loaded when `beit_fast` is imported and `_C_cuda` at the first call on CUDA. Each only adds kernels to operators
that `beit_fast.ops` has defined, so the package works without them. `BEIT_FAST_NATIVE=0` leaves both alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from pathlib import Path
from typing import Any

LIBRARIES = {"_C": "operators on the CPU", "_C_cuda": "patch embedding on CUDA"}
"""The libraries, and what each serves."""

INTERFACE = 1
"""Part of a library's file name, counted up when a schema changes or the meaning of an argument: what was built for
another interface is never loaded."""

BUILD_NOTES = "native_build.json"
"""Where the installation left what it built each library for, or why it built none."""

FOLDER = Path(__file__).parent

_loaded: dict[str, ctypes.CDLL] = {}
_failures: dict[str, str] = {}
_DISABLED = os.environ.get("BEIT_FAST_NATIVE") == "0"
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def file_name(library: str) -> str:
    """The name of the file that holds `library`; one library serves every Python, so it names none."""
    return f"{library}.{INTERFACE}.so"


def load(library: str) -> bool:
    """Whether `library` is loaded, after trying to; torch has to be imported before. Warns where one is unusable."""
    if library not in _loaded and refusal(library) is None:
        try:
            _loaded[library] = ctypes.CDLL(str(FOLDER / file_name(library)))
        except OSError as error:
            _failures[library] = f"{file_name(library)} does not load: {error}"
            warnings.warn(f"beit_fast: {_failures[library]}", RuntimeWarning, stacklevel=2)
    return library in _loaded


def is_loaded(library: str) -> bool:
    """Whether `library` serves its operators now."""
    return library in _loaded


def refusal(library: str) -> str | None:
    """Why `library` cannot be used, as far as that is known without loading it; None where nothing is known."""
    if library in _loaded:
        return None
    if _DISABLED:
        return "BEIT_FAST_NATIVE=0 was set when beit_fast was imported"
    if _INTERPRETED and library == "_C":
        return "TRITON_INTERPRET=1 was set when beit_fast was imported"
    if library in _failures:
        return _failures[library]
    if not (FOLDER / file_name(library)).exists():
        return f"{file_name(library)} was not built{_why_not_built(library)}"
    return None


def _why_not_built(library: str) -> str:
    others = sorted(file.name for file in FOLDER.glob(f"{library}.*.so"))
    if others:
        return f", and {', '.join(others)} has another interface"
    note = _build_note(library, built=False)
    return "" if note is None else f": {note}"


def _build_note(library: str, built: bool) -> str | None:
    """What the installation noted of `library` where it was `built`, or was not; None where it noted nothing of it."""
    try:
        notes = json.loads((FOLDER / BUILD_NOTES).read_text())
    except (OSError, ValueError):
        return None
    entry = notes.get(library)
    return entry["note"] if entry is not None and entry["built"] is built else None


def describe(library: str) -> dict[str, Any]:
    """What `beit-fast info` says of `library`, for JSON."""
    file = FOLDER / file_name(library)
    return {
        "serves": LIBRARIES[library],
        "interface": INTERFACE,
        "file": file.name if file.exists() else None,
        "built_for": _build_note(library, built=True) if file.exists() else None,
        "loaded": is_loaded(library),
        "reason": refusal(library),
    }


def instruction_sets() -> tuple[str | None, tuple[str, ...]]:
    """The instruction set whose kernels `_C` runs, and all of its sets that run here; (None, ()) without `_C`."""
    if "_C" not in _loaded:
        return None, ()
    used, usable = ask("beit_fast_cpu_isa"), ask("beit_fast_cpu_isas")
    return used, tuple((usable or "").split(","))


def ask(function: str) -> str | None:
    """The text that a `function` of `_C` gives; None where it has no such function, being older, or is not loaded."""
    call = getattr(_loaded.get("_C"), function, None)
    if call is None:
        return None
    call.restype = ctypes.c_char_p
    return call().decode()
