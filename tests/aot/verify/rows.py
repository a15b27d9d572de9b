"""Rows of results for tests, without a launch."""

from __future__ import annotations

from typing import Any

import triton

from beit_fast.kernels.aot.verify.cases import Case
from beit_fast.kernels.aot.verify.check import SAME_BITS
from beit_fast.kernels.aot.verify.plans import plan_of
from beit_fast.kernels.aot.verify.rows import ORDERS, Row
from beit_fast.kernels.aot.verify.sources import source_hash

BUDGET, ERROR = 1e-6, 1e-7


def row_of(case: Case, version: str = triton.__version__, **changes: Any) -> Row:
    """Return a row without errors, of kernels as they are."""
    plan = plan_of(case, version)
    results = sorted(plan.results)
    kernels = {name: f"{tile} {source_hash(name)}".strip() for name, tile in plan.tiles.items()}
    errors = dict.fromkeys(ORDERS, SAME_BITS) | {ORDERS[0]: dict.fromkeys(results, ERROR)}
    row = {"case": str(case), "plan": plan.hash, "kernels": kernels, "launches": len(ORDERS) * plan.launches}
    row |= {"budgets": dict.fromkeys(results, BUDGET), "errors": errors}
    return row | {"hazards": {}, "wrong": []} | changes
