"""The rows of one benchmark run, logged as they are measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .processes import Worker, free_memory, memory_groups, run_workers
from .results import ATTENTION, Row, RowLog, rounded, row_of_result

LONGEST_REASON = 500  # characters
ALL = "all baselines"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Outcome:
    """Baselines of a case without a row: reasons by name.

    Attributes:
        wrong: Those that failed the check.
        missing: Those that cannot run here.
    """

    wrong: dict[str, str]
    missing: dict[str, str]


class Session:
    """Rows of a run, its log and its time budget.

    Args:
        conditions: What the run is measured on.
        log: File to which each row is written as soon as it is measured.
        budget: Seconds after which the remaining benchmarks are skipped.
    """

    def __init__(self, conditions: dict[str, Any], log: Path | None = None, budget: float | None = None) -> None:
        self.conditions = conditions
        self.rows: list[Row] = []
        self._log = RowLog(log, conditions) if log is not None else None
        self._budget = budget
        self._started = time.monotonic()

    def over_budget(self) -> str | None:
        """Return the reason to skip the remaining cases. It is None if there is time left."""
        if self._budget is None or time.monotonic() - self._started <= self._budget:
            return None
        return f"the run's budget of {self._budget:g} seconds is spent"

    def add(self, row: Row, logged: Row | None = None) -> None:
        """Keep a row, and log it or its shorter form `logged`."""
        self.rows.append(row)
        if self._log is not None:
            self._log.measured(rounded(row) if logged is None else logged)

    def leave_out(self, case: str, baseline: str, reason: str, bench: str = ATTENTION) -> None:
        """Log why a baseline has no row."""
        if self._log is not None:
            self._log.left_out(case, baseline, reason[:LONGEST_REASON], bench)

    def time_workers(
        self,
        bench: str,
        case: str,
        threads: int,
        workers: Sequence[Worker],
        facts: Mapping[str, Any],
        missing: Mapping[str, str] = _NOTHING,
        *,
        device: str = "cpu",
        per_call: Mapping[str, float] = _NOTHING,
        **rules: Any,
    ) -> Outcome:
        """Time workers in turns, and keep a row for each.

        Each worker has its own process. Workers that do not fit into memory together run in several groups. The first
        worker is in every group, and the rows name their group.

        Args:
            bench: Name of the benchmark.
            case: Name of the case.
            threads: Threads of each process.
            workers: The baselines. Facts that `prepare` returns go into the row: its kernel and its errors at least.
            facts: Fields of every row. `flops` becomes `tflops`.
            missing: Reasons by name of baselines that are known to be missing.
            device: Device whose memory the processes share.
            per_call: Amounts that one call processes. Each becomes a rate under its name.
            rules: Further arguments of `run_workers`.

        Returns:
            The baselines without a row.
        """
        if (reason := self.over_budget()) is not None:
            self.leave_out(case, ALL, reason, bench)
            return Outcome({}, {ALL: reason})
        wrong = {}
        groups, too_large = memory_groups(workers, free_memory(device))
        missing = {**missing, **too_large}
        for number, group in enumerate(groups, start=1):
            named = {"group": number} if len(groups) > 1 else {}
            for result in run_workers(group, threads=threads, memory=True, **rules):
                if result.failure is not None:
                    wrong[result.name] = result.failure
                elif result.unavailable is not None:
                    missing[result.name] = result.unavailable
                else:
                    row = {"bench": bench, "threads": threads, "case": case, **named, **facts}
                    self.add(row | row_of_result(result, per_call, row.get("flops")))
        for name, reason in {**missing, **wrong}.items():
            self.leave_out(case, name, reason, bench)
        return Outcome(wrong, missing)
