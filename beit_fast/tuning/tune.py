"""Measure candidate tiles, first correctness and then time; keep the fastest."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import atomic_write_text, json_text, writing
from .candidates import Tile
from .reference import relative_error
from .timer import Clock, interleaved_times

ROUNDS = 15
"""Timed rounds of each candidate."""
LEAST_GAIN = 0.02
"""Part of the time that a tile has to save to replace the shipped one."""


@dataclass(frozen=True)
class Trial:
    """One call with its fp64 results and the errors that are allowed."""

    run: Callable[[], Mapping[str, Tensor]]
    exact: Mapping[str, Tensor]
    budgets: Mapping[str, float]


@dataclass(frozen=True)
class Job:
    """One kernel for one shape.

    Attributes:
        kernel: One of kernels.common.tuned_tiles.TILE_FIELDS.
        label: The shape, for people.
        variant: dtype and sizes, as the launcher names them.
        amount: Rows, or heads of all samples.
        tiles: Candidates; the first is the shipped one.
        trial: Draws the call that is timed.
        others: Draw calls that the winner must compute as well: other options of the same launch.
    """

    kernel: str
    label: str
    variant: str
    amount: int
    tiles: Sequence[Tile]
    trial: Callable[[], Trial]
    others: Sequence[Callable[[], Trial]] = ()


@dataclass(frozen=True)
class Outcome:
    """What one job found.

    Attributes:
        kernel: The kernel.
        label: The shape.
        shipped: The tile of the tables.
        chosen: The tile to use; None if the shipped one is wrong, then nothing is written.
        seconds: Median seconds by tile.
        excluded: Reasons by tile.
    """

    kernel: str
    label: str
    shipped: Tile
    chosen: Tile | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "shipped": tile_name(self.shipped), "chosen": self.chosen and tile_name(self.chosen)}


def tile_name(tile: Tile) -> str:
    """Return a tile as text: "64x64x4x2"."""
    return "x".join(map(str, tile))


def tune_job(job: Job, clock_of: Callable[[], Clock], rounds: int = ROUNDS) -> Outcome:
    """Measure the candidates of one kernel.

    Args:
        job: The kernel, its shape and its candidates.
        clock_of: Returns a new timer.
        rounds: Timed rounds of each candidate, in turns.
    """
    shipped, trial, excluded = job.tiles[0], job.trial(), {}
    for tile in job.tiles:
        reason = exclusion_reason(job.kernel, tile, trial, may_spill=tile == shipped)
        if reason is not None:
            excluded[tile_name(tile)] = reason
    named = {tile_name(tile): tile for tile in job.tiles if tile_name(tile) not in excluded}
    if tile_name(shipped) not in named:
        return Outcome(job.kernel, job.label, shipped, excluded=excluded)

    def scope(name: str) -> AbstractContextManager[None]:
        from ..kernels.common import tuned_tiles

        return tuned_tiles.force(job.kernel, named[name])

    times = interleaved_times(dict.fromkeys(named, trial.run), clock_of(), rounds, scope)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    del trial
    chosen = _accepted(job, named, seconds, excluded)
    return Outcome(job.kernel, job.label, shipped, chosen, seconds, excluded)


def _accepted(
    job: Job, named: Mapping[str, Tile], seconds: Mapping[str, float], excluded: dict[str, str]
) -> Tile | None:
    """Return the fastest tile that also computes the other trials; None if the shipped one does not."""
    shipped = job.tiles[0]
    limit = (1 - LEAST_GAIN) * seconds[tile_name(shipped)]
    faster = [name for name in sorted(named, key=seconds.__getitem__) if seconds[name] < limit]
    others = [draw() for draw in job.others]
    for name in (*faster, tile_name(shipped)):
        tile = named[name]
        reasons = [exclusion_reason(job.kernel, tile, trial, may_spill=tile == shipped) for trial in others]
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None:
            return tile
        excluded[name] = reason
    return None


def exclusion_reason(kernel: str, tile: Tile, trial: Trial, may_spill: bool = False) -> str | None:
    """Return why a tile cannot be used, or None: it does not launch, it spills, or it is wrong."""
    from ..kernels.common import tuned_tiles
    from ..kernels.common.launch import observe_launches

    with tuned_tiles.force(kernel, tile), observe_launches() as launched:
        try:
            results = trial.run()
            errors = {name: relative_error(results[name], exact) for name, exact in trial.exact.items()}
        except Exception as error:  # too much shared memory, or no code for the tile
            return f"does not run: {' '.join(str(error).split())[:200] or type(error).__name__}"
    spilled = max((getattr(compiled, "n_spills", 0) or 0 for compiled in launched), default=0)
    if spilled and not may_spill:
        return f"spills {spilled} bytes of registers"
    wrong = [
        f"{name}: relative error {error:.2e} is over the budget {trial.budgets[name]:.2e}"
        for name, error in errors.items()
        if not error <= trial.budgets[name]  # NaN is not within any budget
    ]
    return "; ".join(wrong) or None


def tune(
    jobs: Sequence[Job], device: torch.device, clock_of: Callable[[], Clock], rounds: int = ROUNDS
) -> Iterator[Outcome]:
    """Run jobs one by one, and write each result at once.

    This process uses it from then on.

    Raises:
        OSError: Before anything is measured, if no result could be written.
    """
    check_folder(device)
    for job in jobs:
        outcome = tune_job(job, clock_of, rounds)
        if outcome.chosen is not None:
            save(device, job, outcome)
        yield outcome
        gc.collect()


def check_folder(device: torch.device) -> None:
    """Create the folder of a device's tuned tiles, and write there.

    Raises:
        OSError: If this fails; the error names the folder and the variable that sets it.
    """
    from ..kernels.common import tuned_tiles

    folder = tuned_tiles.file_of(tuned_tiles.identity_of(device)).parent
    with writing(_WRITTEN, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")


_WRITTEN = "tuned tiles (XDG_CACHE_HOME sets their folder)"


def save(device: torch.device, job: Job, outcome: Outcome) -> Path:
    """Add the result of a job to the device's tuned tiles.

    Returns:
        The file.
    """
    from ..kernels.common import tuned_tiles

    assert outcome.chosen is not None
    identity = tuned_tiles.identity_of(device)
    file = tuned_tiles.file_of(identity)
    seconds = (outcome.seconds[tile_name(tile)] for tile in (outcome.chosen, outcome.shipped))
    measured = tuned_tiles.Measured(job.kernel, job.variant, job.amount, outcome.chosen, *seconds)
    kept = [entry for entry in load(file, identity) if entry[:3] != measured[:3]]
    with writing(_WRITTEN, file):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json_text(tuned_tiles.content_of(identity, [*kept, measured]), "tuned tiles"))
    tuned_tiles.forget_read_files()
    return file


def load(file: Path, identity: Any) -> list[Any]:
    """Return the tuned tiles in a file; none if it does not exist or cannot be used."""
    from ..kernels.common import tuned_tiles

    try:
        return tuned_tiles.read(file, identity)
    except (FileNotFoundError, tuned_tiles.UnusableFileError):
        return []


def describe(device: torch.device) -> dict[str, Any]:
    """Describe the tuned tiles of a device, for JSON: file, number of tiles, and why they are not used."""
    from ..kernels.common import tuned_tiles

    identity = tuned_tiles.identity_of(device)
    file = tuned_tiles.file_of(identity)
    found: dict[str, Any] = {"file": str(file), "tiles": [], "reason": None}
    if not tuned_tiles.is_enabled():
        return {**found, "reason": f"{tuned_tiles.VARIABLE}=0"}
    try:
        entries = tuned_tiles.read(file, identity)
    except FileNotFoundError:
        return {**found, "reason": "none were measured (beit-fast tune)"}
    except tuned_tiles.UnusableFileError as error:
        return {**found, "reason": f"the tuned tiles in {file} are ignored: {error}"}
    return {**found, "tiles": tuned_tiles.content_of(identity, entries)["tiles"]}


def forget(device: torch.device) -> list[Path]:
    """Delete the tuned tiles of a device, for all versions.

    Returns:
        The deleted files.
    """
    from ..kernels.common import tuned_tiles

    folder = tuned_tiles.file_of(tuned_tiles.identity_of(device)).parent
    files = sorted(folder.glob("*.json"))
    for file in files:
        file.unlink()
    tuned_tiles.forget_read_files()
    return files
