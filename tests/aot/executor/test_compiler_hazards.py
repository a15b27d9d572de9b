"""The smallest kernels of the table of compiler faults, executed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the Triton interpreter and compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot.executor.driver import ExecutorDriver  # noqa: E402
from beit_fast.kernels.aot.executor.launch import Options  # noqa: E402
from beit_fast.kernels.aot.executor.schedule import RANDOM, Schedule  # noqa: E402
from beit_fast.kernels.common.compiler_hazards import parse_release  # noqa: E402

from ...support.oracle import relative_error  # noqa: E402
from ..hazard_kernels import SHAPES, chained_products, copied_product, owned_product  # noqa: E402

STEPS = 4
EXECUTED = {
    # kernel, capability: kind of the hazard, and the first release of Triton without it
    (copied_product, 90): ("ProxyError", "3.7.1"),
    (copied_product, 100): ("ProxyError", "3.7.1"),
    (owned_product, 90): ("ProxyError", "3.7.1"),
    (owned_product, 100): ("ProxyError", "3.9.0"),
    (chained_products, 100): ("RaceError", "3.8.0"),
    (chained_products, 90): ("RaceError", "0.0.0"),
}


@pytest.mark.parametrize(("kernel", "capability"), EXECUTED)
def test_smallest_kernel_executed_shows_the_fault_of_the_table(kernel: Any, capability: int) -> None:
    kind, sound = EXECUTED[kernel, capability]
    sizes = dict(zip("MNK", SHAPES[kernel], strict=True))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(STEPS, sizes[rows], sizes["K"], generator=generator).bfloat16() for rows in "MN")
    if kernel is copied_product:
        exact, steps = torch.einsum("smk,snk->mn", a.double(), b.double()), (STEPS,)
    else:
        scores = torch.einsum("mk,snk->smn", a[0].double(), b.double())
        parts = torch.einsum("smn,snk->smk", scores, b.double())
        exact, steps = (parts[0], ()) if kernel is chained_products else (parts.sum(0), (STEPS,))
    out = torch.zeros(exact.shape)

    with ExecutorDriver(capability, Options(Schedule(RANDOM, 1), collect=True)) as driver:
        kernel[(1,)](a, b, out, *steps, **sizes, num_warps=8, num_stages=2)

    kinds = {hazard.kind for launch in driver.launches for hazard in launch.hazards}
    is_faulty = parse_release(triton.__version__) < parse_release(sound)
    assert kinds == ({kind} if is_faulty else set())
    # A race changes numbers. The executor does not model the stale data of a missing fence.
    assert (relative_error(out, exact) > 0.1) == (is_faulty and kind == "RaceError")
