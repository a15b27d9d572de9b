"""GPU architecture classes, their limits, and arithmetics. Class and arithmetic decide the tiles. Imports nothing."""

SMALL = "small"
SM80 = "sm80"
SM90 = "sm90"
SM100 = "sm100"

INTERPRETER = "interpreter"
ARCHITECTURES = (SMALL, SM80, SM90, SM100)
ARITHMETICS = ("half", "tf32", "ieee")

SHARED_MEMORY_LIMIT = {SMALL: 99 * 1024, SM80: 163 * 1024, SM90: 227 * 1024, SM100: 227 * 1024}
"""Bytes of shared memory per program, by architecture class."""


def architecture_class(major: int, minor: int) -> str:
    """Return the architecture class of a CUDA compute capability."""
    # An unknown GPU gets the class with the least shared memory, whose tiles fit everywhere.
    if (major, minor) == (8, 0):
        return SM80
    return {9: SM90, 10: SM100}.get(major, SMALL)


def arithmetic(element_size: int, precision: str) -> str:
    """Return the arithmetic, one of ARITHMETICS, of a kernel's matrix products.

    Args:
        element_size: Bytes per input element.
        precision: Precision of fp32 products, "tf32" or "ieee".
    """
    return precision if element_size == 4 else "half"
