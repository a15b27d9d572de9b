"""Rows of results: what a line of a file must hold, and whether it is current."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .cases import DTYPES, Case, NormCase
from .check import SAME_BITS, SCHEDULES
from .plans import Plan, plan_of
from .sources import MODULES, source_hash

Row = dict[str, Any]

ORDERS = tuple(map(str, SCHEDULES))
LARGEST_BUDGET = 64
"""Machine epsilons of a case's coarsest dtype. The budgets of the table are up to 21 of them."""


class DamagedRowError(ValueError):
    """A current row contradicts itself or what its case launches."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_kernel(value: Any) -> bool:
    """Return whether a value names tile and source hash. Some kernels have no tile."""
    return isinstance(value, str) and re.fullmatch(r"(\S+ )*[0-9a-f]{12}", value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0  # NaN is not


def _maps_to(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check of a dict whose values are valid. Keys of JSON are text."""
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


_are_numbers = _maps_to(_is_number)

FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "case": (_is_text, "text"),
    "plan": (_is_text, "text"),
    "kernels": (_maps_to(_is_kernel), "the tile and source hash of each kernel"),
    "launches": (_is_count, "a whole number"),
    "budgets": (_are_numbers, "a number for each result"),
    "errors": (
        _maps_to(lambda value: value == SAME_BITS or _are_numbers(value)),
        f"for each order of warps a number for each result, or {SAME_BITS!r}",
    ),
    "hazards": (_maps_to(_maps_to(_is_count)), "a whole number for each hazard and order of warps"),
    "wrong": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts"),
}
"""What every row has: by name, whether a value is valid, and what it has to be. See check.py."""
OPTIONAL_FIELDS = {"first hazard": (_is_text, "text")}


def parse(line: str, place: str) -> Row:
    """Return the row of a line.

    Raises:
        ValueError: If it is not a row; it names the place and everything that is wrong.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}); restore the file, or delete the line and rerun") from None
    if errors := _type_errors(row):
        text = "; ".join(errors)
        raise ValueError(f"{place} is not a row of results: {text}; restore the file, or delete the line and rerun")
    assert isinstance(row, dict)
    return row


def _type_errors(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return [f"it is {reprlib.repr(row)} (expected an object)"]
    missing = sorted(FIELDS.keys() - row.keys())
    return [f"{', '.join(missing)} missing"] * bool(missing) + [
        f"{name!r} is {reprlib.repr(row[name])} (expected {expected})"
        for name, (is_valid, expected) in (FIELDS | OPTIONAL_FIELDS).items()
        if name in row and not is_valid(row[name])
    ]


def is_current(row: Row, case: Case, triton_version: str) -> bool:
    """Return whether a row is of the kernels as they are now.

    They are compiled from the same source and launched in the same way, and every order of warps was judged. Another
    plan, source or set of orders is of another state of the repository: the case has to run again.

    Raises:
        DamagedRowError: If the row says that it is of the present kernels, and contradicts them or itself.
    """
    plan = plan_of(case, triton_version)
    # A case that failed before its first launch names no kernel.
    is_of_sources = bool(row["kernels"] or row["errors"]) and all(
        hashed == source_hash(name) for name, hashed in checked_sources([row]) if name in MODULES
    )
    if not is_of_sources or row["plan"] != plan.hash or not _is_judged(row):
        return False
    if errors := [*_plan_errors(row, plan), *_verdict_errors(row, plan), *_budget_errors(row, case)]:
        raise DamagedRowError("; ".join(errors))
    return True


def checked_sources(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """Yield kernel and source hash of everything that was launched."""
    for row in rows:
        for name, text in row["kernels"].items():
            yield name, text.split()[-1]


def _is_judged(row: Row) -> bool:
    """Return whether each order of warps has errors or is wrong."""
    wrong = {order for order in ORDERS for text in row["wrong"] if text.startswith(f"{order}: ")}
    return row["errors"].keys() | wrong == set(ORDERS)


def _plan_errors(row: Row, plan: Plan) -> list[str]:
    """Compare kernels, tiles, launches and results with those of the plan."""
    errors = []
    # An order that a kernel's error ended has neither launches nor errors, and may lack kernels.
    complete = len(row["errors"])
    if missing := sorted(plan.tiles.keys() - row["kernels"].keys()) if complete else []:
        errors.append(f"kernels {', '.join(missing)} missing")
    if unknown := sorted(row["kernels"].keys() - plan.tiles.keys()):
        errors.append(f"kernels {', '.join(unknown)} are not launched")
    for name, text in row["kernels"].items():
        tile = " ".join(text.split()[:-1])
        if name in plan.tiles and tile != plan.tiles[name]:
            errors.append(f"the tile of {name} is {tile!r} (expected {plan.tiles[name]!r})")
    if row["launches"] != complete * plan.launches:
        errors.append(f"'launches' is {row['launches']} (expected {complete * plan.launches})")
    if row["budgets"].keys() != plan.results:
        errors.append(f"budgets of {_names(row['budgets'])} (expected {_names(plan.results)})")
    return errors


def _verdict_errors(row: Row, plan: Plan) -> list[str]:
    """Compare errors with budgets, and later orders with the first one."""
    errors, wrong = [], row["wrong"]
    judged = [order for order in ORDERS if order in row["errors"]]
    for order in judged:
        numbers = row["errors"][order]
        if numbers == SAME_BITS:
            if order == judged[0]:
                errors.append(f"{order} is {SAME_BITS!r}, but the first order (expected numbers)")
            continue
        if order != judged[0] and not any(text.startswith(f"{order}: other bits") for text in wrong):
            errors.append(f"{order} has numbers (expected {SAME_BITS!r}, or a text in 'wrong')")
        if numbers.keys() != plan.results:
            errors.append(f"errors of {_names(numbers)} in {order} (expected {_names(plan.results)})")
        errors += [
            f"the error of {name} in {order} is {number}, above its budget of {row['budgets'][name]}"
            for name, number in numbers.items()
            if number > row["budgets"].get(name, number) and f"{order}: {name}" not in wrong
        ]
    if "first hazard" in row and not row["hazards"]:
        errors.append("'first hazard' without hazards")
    return errors


def _budget_errors(row: Row, case: Case) -> list[str]:
    """Return which budgets cannot be those of the case's dtypes."""
    dtypes = [case.dtype, case.row_dtype] if isinstance(case, NormCase) else [case.dtype]
    # tf32 keeps 10 bits, as fp16 does.
    epsilon = max(torch.finfo(torch.float16 if dtype == "tf32" else DTYPES[dtype]).eps for dtype in dtypes)
    return [
        f"the budget of {name} is {budget} (expected above 0, up to {LARGEST_BUDGET * epsilon:.2g})"
        for name, budget in row["budgets"].items()
        if not 0 < budget <= LARGEST_BUDGET * epsilon
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
