"""Table of Triton releases that compile these kernels wrongly. Imports nothing.

The code of the releases in `EXECUTED` was executed for compute capabilities 8.0, 9.0, 10.0 and 12.0, instruction
by instruction: see ../README.md. A release between or after these has the faults of the last one before it, and an
older one those of the first. A pre-release counts as earlier than its release. A capability has the faults of its major
number; a major number that was not executed is a fault itself.
"""

import re
from typing import NamedTuple

EXECUTED = ("3.6.0", "3.7.0", "3.7.1", "3.8.0", "3.9.0")
EXECUTED_MAJORS = (8, 9, 10, 12)

TORCH_WITH = {"3.7.1": "2.12.1", "3.8.0": "2.14", "3.9.0": "2.15"}
"""First release of torch whose CUDA builds bring a release of Triton, which they pin."""

REFUSED, FENCED, ONE_STAGE = "refused", "fenced", "one stage"

DV_ALONE = "backward_dkv for dV alone"
"""A form of a kernel with a loop of its own, as a kernel's name."""


class Hazard(NamedTuple):
    """A compiler fault for one major compute capability.

    Every release of Triton before `sound` has it.
    """

    major: int
    sound: str  # first release without the fault
    fault: str
    answer: str  # REFUSED; FENCED: the kernels emit the fence; ONE_STAGE: `kernels` copy nothing asynchronously
    kernels: tuple[str, ...] = ()  # empty: every kernel with a matrix product


HAZARDS = (
    Hazard(9, "3.7.1", "wgmma reads asynchronous copies without a fence between them", FENCED),
    Hazard(10, "3.7.1", "tcgen05 products read asynchronous copies without a fence between them", REFUSED),
    Hazard(10, "3.8.0", "warps race in tensor memory", REFUSED),
    Hazard(
        10,
        "3.9.0",
        "the fence is missing in loops whose other operand was stored before",
        ONE_STAGE,
        ("backward_dq", DV_ALONE),
    ),
)


def compiler_hazards(capability: int, triton_version: str) -> list[str]:
    """List why Triton compiles kernels with matrix products wrongly, in plain English; empty if it does not.

    Faults that the kernels avoid are not listed.

    Args:
        capability: Compute capability, 90 for 9.0.
        triton_version: `triton.__version__`.
    """
    major, minor = divmod(capability, 10)
    if major not in EXECUTED_MAJORS:
        return [f"compute capability {major}.{minor} is not supported: its matrix instructions depend on the compiler"]
    refused = [hazard for hazard in _hazards(capability, triton_version) if hazard.answer == REFUSED]
    if not refused:
        return []
    sound = max((hazard.sound for hazard in refused), key=parse_release)
    faults = " and ".join(hazard.fault for hazard in refused)
    return [
        f"Triton {triton_version} compiles for compute capability {major}.{minor} with a known fault: {faults}; "
        f"use torch {TORCH_WITH[sound]} or later, which brings Triton {sound}"
    ]


def needs_copy_fence(capability: int, triton_version: str) -> bool:
    """Return whether a kernel has to fence asynchronous copies itself."""
    return any(hazard.answer == FENCED for hazard in _hazards(capability, triton_version))


def is_pipelined(kernel: str, capability: int, triton_version: str) -> bool:
    """Return whether a kernel, or DV_ALONE, may copy tiles asynchronously."""
    hazards = _hazards(capability, triton_version)
    # One stage does not make a refused pair right: its tiles are left alone.
    is_refused = any(hazard.answer == REFUSED for hazard in hazards)
    return is_refused or not any(hazard.answer == ONE_STAGE and kernel in hazard.kernels for hazard in hazards)


def _hazards(capability: int, triton_version: str) -> list[Hazard]:
    release = parse_release(triton_version)
    return [hazard for hazard in HAZARDS if hazard.major == capability // 10 and release < parse_release(hazard.sound)]


def parse_release(version: str) -> tuple[int, int, int, bool]:
    """Parse a version; the last entry is False for a pre-release."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?P<pre>\.?(?:a|b|rc|dev)\d*)?", version)
    if found is None:
        raise ValueError(f"Triton's version {version!r} is not a version number")
    return int(found[1]), int(found[2]), int(found[3] or 0), found["pre"] is None
