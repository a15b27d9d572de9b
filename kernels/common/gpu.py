"""Classes of GPUs, and the limits and arithmetics that every kernel chooses its tiles by. Imports nothing."""

SMALL = "small"
SM80 = "sm80"
SM90 = "sm90"
SM100 = "sm100"

INTERPRETER = "interpreter"
ARCHITECTURES = (SMALL, SM80, SM90, SM100)
ARITHMETICS = ("half", "tf32", "ieee")

SHARED_MEMORY_LIMIT = {SMALL: 99 * 1024, SM80: 163 * 1024, SM90: 227 * 1024, SM100: 227 * 1024}
"""Bytes of shared memory that one program may use, by architecture class."""


def architecture_class(major: int, minor: int) -> str:
    """Class of a CUDA compute capability; the one with the least shared memory if it is not known."""
    if (major, minor) == (8, 0):
        return SM80
    return {9: SM90, 10: SM100}.get(major, SMALL)


def arithmetic(element_size: int, precision: str) -> str:
    """Which of ARITHMETICS a kernel multiplies in.

    Args:
        element_size: bytes of an element of q, k and v.
        precision: of fp32 products, "tf32" or "ieee".
    """
    return precision if element_size == 4 else "half"
