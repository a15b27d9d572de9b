"""Peak memory of a call: torch's allocator on CUDA, the resident set of the process on Linux.

glibc keeps freed blocks of up to 32 MiB in its heap, and a later call may reuse them. Its peak would then depend on
what ran before. While a call is measured, glibc maps every block of a MiB or more from the system. Free pages are
returned, holes in the heap are filled, and the threshold for mapping is lowered.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from beit_fast import testing

_PEAK_SLACK = 32 << 20  # bytes by which a peak just reset may exceed the resident size
_MAPPED_FROM = 1 << 20  # bytes from which blocks are mapped while a call is measured
_LARGEST_THRESHOLD = 32 << 20  # bytes at which glibc stops raising that threshold by itself
_TRIM_THRESHOLD_OPTION, _MAP_THRESHOLD_OPTION = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """Peak memory of one call of `function`, in bytes.

    Call `function` once before, so that libraries, compiled code and caches are not counted. On CUDA this is
    `beit_fast.testing.peak_memory`. On Linux it is the growth of the resident set. That counts every page that any
    thread touches during the call, to within one huge page (2 MiB).

    Args:
        function: The call to measure.
        device: The device that `function` runs on.

    Returns:
        Bytes above the level before the call, or None if `memory_unsupported_reason` returns a reason.
    """
    device = torch.device(device)
    if memory_unsupported_reason(device) is not None:
        return None
    return testing.peak_memory(function, device) if device.type == "cuda" else _peak_resident(function)


def loaded_memory(device: torch.device | str = "cpu") -> int | None:
    """Memory that this process holds between calls, in bytes, libraries included.

    On CUDA this is the memory that torch's allocator has reserved, CUDA graphs included, after it has released its
    free blocks. On Linux it is the resident set after glibc has returned its free pages.

    Returns:
        Bytes, or None if `memory_unsupported_reason` returns a reason.
    """
    device = torch.device(device)
    if memory_unsupported_reason(device) is not None:
        return None
    gc.collect()
    if device.type == "cpu":
        return _idle_resident()
    testing.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def memory_unsupported_reason(device: torch.device | str = "cpu") -> str | None:
    """Return the reason why `peak_memory` cannot measure on `device`, or None."""
    device = torch.device(device)
    if device.type == "cuda":
        return None
    if device.type == "cpu":
        return _resident_unsupported_reason()
    return f"peak memory is not supported on device type {device.type!r} (expected cuda, or cpu on Linux)"


def _peak_resident(function: Callable[[], Any]) -> int:
    """Return the peak growth of the resident set in bytes.

    It is measured during one call of `function`. Requires that `_resident_unsupported_reason` returns None. It leaves
    glibc's thresholds at their maximum, as a long run does.
    """
    gc.collect()
    with _large_blocks_from_system():
        _reset_peak()
        before = _status_bytes("VmRSS")
        function()
        return max(0, _status_bytes("VmHWM") - before)


def _idle_resident() -> int:
    """Return the resident set in bytes, without glibc's free pages.

    If the C library is glibc, it returns these pages first.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    return _status_bytes("VmRSS")


def _resident_unsupported_reason() -> str | None:
    """Return the reason why a peak cannot be reset and read.

    The result is None if this system can do both.
    """
    if not sys.platform.startswith("linux"):
        return f"peak resident memory can be reset on Linux only, this is {sys.platform}"
    try:
        _reset_peak()
        peak, resident = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    except (OSError, LookupError) as error:
        return f"this system does not allow a process to reset and read its peak resident memory: {error}"
    if peak > resident + _PEAK_SLACK:
        return f"this system ignores the reset of peak memory ({peak} bytes at {resident} resident)"
    return None


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


_HEAP_COUNTERS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _HeapState(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer; `hblks` counts mapped blocks, `fordblks` free bytes."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _HEAP_COUNTERS)


@contextlib.contextmanager
def _large_blocks_from_system() -> Iterator[None]:
    """Map every block of a MiB or more inside the context; a no-op without a recent glibc."""
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallinfo2", "mallopt", "malloc_trim")):
        yield
        return
    library.mallinfo2.restype = _HeapState
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.mallopt(_MAP_THRESHOLD_OPTION, _MAPPED_FROM)
    library.malloc_trim(0)
    occupied = _occupy_holes(library)
    try:
        yield
    finally:
        for block in occupied:
            library.free(block)
        library.mallopt(_MAP_THRESHOLD_OPTION, _LARGEST_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD_OPTION, 2 * _LARGEST_THRESHOLD)


def _occupy_holes(library: ctypes.CDLL) -> list[int]:
    """Allocate blocks that fill the heap's holes and return their addresses.

    The holes have a size of a MiB or more. The blocks are not touched, so they use no pages.
    """
    occupied = []
    for size in (_LARGEST_THRESHOLD >> step for step in range(6)):  # 32 MiB down to 1 MiB
        for _ in range(library.mallinfo2().fordblks // size + 1):
            mapped = library.mallinfo2().hblks
            block = library.malloc(size)
            if library.mallinfo2().hblks != mapped:  # no hole of this size is left
                library.free(block)
                break
            occupied.append(block)
    return occupied
