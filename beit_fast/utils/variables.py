"""Environment variables of this package, read once, when it is imported.

`BEIT_FAST_CPU_ISA` and `BEIT_FAST_TUNED` are here for messages only: the native library and the launchers of the Triton
kernels read them. Importing the package never raises for a variable; `choice` raises at the first use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from .messages import join_choices

NATIVE, CPU_ISA, CPU_LINEAR = "BEIT_FAST_NATIVE", "BEIT_FAST_CPU_ISA", "BEIT_FAST_CPU_LINEAR"
TUNED = "BEIT_FAST_TUNED"

_VALUES = {name: os.environ.get(name) or None for name in (NATIVE, CPU_ISA, CPU_LINEAR, TUNED)}


def values() -> dict[str, str]:
    """Return the variables that are set and not empty."""
    return {name: value for name, value in _VALUES.items() if value is not None}


def choice(name: str, accepted: Sequence[str]) -> str | None:
    """Return the value of a variable, or None if it is unset.

    Raises:
        ValueError: If the value is not accepted.
    """
    value = _VALUES[name]
    if value is not None and value not in accepted:
        raise ValueError(f"{name}={value!r} is not supported (expected {join_choices(accepted)}, or unset)")
    return value


def cannot_serve(name: str, reason: str) -> ValueError:
    """Return the error for an accepted value that this machine cannot serve."""
    return ValueError(f"{name}={_VALUES[name]!r} cannot be used here: {reason}")
