"""Launch a kernel with its arguments in NamedTuples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Arguments(Protocol):
    """A NamedTuple of kernel parameters, or of such NamedTuples."""

    def _asdict(self) -> dict[str, Any]: ...


_observed: list[list[Any]] = []


@contextmanager
def observe_launches() -> Iterator[list[Any]]:
    """Collect the compiled kernels that are launched inside the context; None for each interpreted launch."""
    launched: list[Any] = []
    _observed.append(launched)
    try:
        yield launched
    finally:
        _observed.remove(launched)


def by_name(arguments: Arguments) -> dict[str, Any]:
    """Map the name of each kernel parameter to its value. Nested NamedTuples are included."""
    named: dict[str, Any] = {}
    for name, value in arguments._asdict().items():
        if hasattr(value, "_asdict"):
            named |= by_name(value)
        else:
            named[name] = value
    return named


def launch_kernel(kernel: Any, programs: int, arguments: Arguments, **options: int) -> None:
    """Launch `kernel` on a one-dimensional grid.

    Args:
        kernel: A function decorated with `triton.jit`.
        programs: Size of the grid.
        arguments: Every parameter of the kernel, compile-time constants included.
        options: `num_warps` and `num_stages`; Triton has defaults.
    """
    # One dimension, because CUDA limits the other two to 65535 programs.
    compiled = kernel[(programs,)](**by_name(arguments), **options)
    for launched in _observed:
        launched.append(compiled)
