"""Peak resident memory of one call on Linux, from the system's own counters: a leaf, standard library only.

glibc keeps freed blocks of up to 32 MiB in its heap, where a later call reuses them or has to go around
them: what ran earlier would change the answer by half. So while a call is measured, every block of a MiB or
more comes from the system and goes back to it: free pages are returned, holes in the heap are occupied, and
the size from which glibc maps a block is lowered.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

_PEAK_SLACK = 32 << 20  # bytes by which a peak just reset may exceed the resident size
_MAPPED_FROM = 1 << 20  # bytes from which blocks are mapped while a call is measured
_LARGEST_THRESHOLD = 32 << 20  # bytes at which glibc stops raising that threshold by itself
_TRIM_THRESHOLD_OPTION, _MAP_THRESHOLD_OPTION = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>


def peak_resident(function: Callable[[], Any]) -> int:
    """Bytes by which the process grows at its peak during one call of `function`.

    Call `why_unmeasurable` first. Afterwards glibc's thresholds stand where a long run brings them.
    """
    gc.collect()
    with _large_blocks_from_system():
        _reset_peak()
        before = _status_bytes("VmRSS")
        function()
        return max(0, _status_bytes("VmHWM") - before)


def idle_resident() -> int:
    """Bytes of the resident set once glibc, where there is one, has returned its free pages."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    return _status_bytes("VmRSS")


def why_unmeasurable() -> str | None:
    """The reason why this system cannot reset and read a peak, or None where it can."""
    if not sys.platform.startswith("linux"):
        return f"peak resident memory can be reset on Linux only, this is {sys.platform}"
    try:
        _reset_peak()
        peak, resident = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    except (OSError, LookupError) as error:
        return f"the system does not let a process reset and read its peak resident memory: {error}"
    if peak > resident + _PEAK_SLACK:
        return f"the system ignores the reset of peak memory ({peak} bytes at {resident} resident)"
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
    """Map every block of a MiB or more while inside; does nothing without a recent glibc."""
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
    """Addresses of blocks that fill the heap's holes of a MiB or more; untouched, they cost no pages."""
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
