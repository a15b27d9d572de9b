"""The progress of a run of `beit-fast predict` on disk.

The run can resume after a kill.

Beside OUT is the folder OUT.run:

    manifest.json           the options that the results depend on, and the counts when OUT is complete
    batches/00000012.json   the records of one batch
    0-of-4.lock             held by rank 0 of 4 while it runs
    lock                    held while a process starts, joins or finishes the run

A batch is either done or not: its file appears by an atomic rename. The images of a batch depend on the data set only.
Hence the results do not depend on kills or on the number of ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

from ...utils.files import atomic_write_text, json_text, read_json_object, replace_files, try_lock, writing

Record: TypeAlias = dict[str, Any]
Writer: TypeAlias = Callable[[Path, Iterator[Sequence[Record]]], None]

_MANIFEST, _LOCK, _BATCHES, _MERGED = "manifest.json", "lock", "batches", "merged.unfinished"
_IMAGES = {"images", "image names"}  # options that change with the files of a data set
_BATCH_NAME = re.compile(r"(\d{8,})\.json")


class Outcome(NamedTuple):
    """Counts of a complete run: all images, and those with an error."""

    images: int
    failures: int


class Share:
    """The batches that one rank writes; a context manager that locks the rank against other processes.

    Attributes:
        done: The batches that any process has done.
    """

    def __init__(self, lock: Path, batches: Path, done: frozenset[int]) -> None:
        self.done = done
        self._batches = batches
        self._lock = lock.open("ab")
        if not try_lock(self._lock):
            self._lock.close()
            raise BlockingIOError(f"another process holds {os.fspath(lock)!r}: is this command already running?")

    def write(self, number: int, records: Sequence[Record]) -> None:
        """Save a finished batch; it is on disk when this returns."""
        # Escaped to ASCII: a name that is not UTF-8 contains surrogates.
        atomic_write_text(_batch_file(self._batches, number), json.dumps(list(records)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()


def folder_of(out: Path) -> Path:
    """Return the folder of the run that writes `out`."""
    return out.with_name(f"{out.name}.run")


def check_resumable(out: Path) -> None:
    """Check that `out` does not exist, or that a run made it.

    Raises:
        FileExistsError: If `out` exists without the folder of a run.
    """
    folder = folder_of(out)
    if out.exists() and not (folder / _MANIFEST).exists():
        raise FileExistsError(
            f"{os.fspath(out)!r} exists, but {folder.name!r} beside it does not, so it cannot be resumed; choose "
            "another OUT, or pass --overwrite"
        )


class Run:
    """The run that writes `out`.

    Args:
        out: The file of the results.
        options: All that the results depend on, in JSON's types. A run resumes under equal options only.
        num_batches: The number of batches.
    """

    def __init__(self, out: Path, options: Mapping[str, Any], num_batches: int) -> None:
        self.out = out
        self.folder = folder_of(out)
        self.options = dict(options)
        self.num_batches = num_batches

    def restart(self) -> None:
        """Discard all progress; an existing `out` stays until the new results are complete.

        Raises:
            BlockingIOError: If other processes are running.
        """
        with self._locked():
            self._check_not_running(self._rank_locks())
            self._remove_batches()
            self._write_manifest(None)

    def drop_failures(self) -> None:
        """Discard the batches in which an image has an error.

        Raises:
            BlockingIOError: If other processes are running.
            ValueError: If the run has other options.
        """
        if not self._is_started():
            return
        with self._locked():
            outcome = self._outcome()
            if outcome is not None and outcome.failures == 0:
                return
            self._check_not_running(self._rank_locks())
            self._write_manifest(None)
            for number in self._done():
                if any(record["error"] is not None for record in self._records(number)):
                    _batch_file(self.folder / _BATCHES, number).unlink()

    def join(self, rank: int, world: int) -> Share | Outcome:
        """Start or resume the run as one rank.

        If the run is complete, return its outcome.

        Raises:
            BlockingIOError: If other processes are running that are not ranks of the same `world`.
            FileExistsError: If `out` exists and was not made by a run.
            ValueError: If the run has other options.
        """
        check_resumable(self.out)
        with self._locked():
            outcome = self._outcome() if self._is_started() else None
            if outcome is not None and self.out.exists():
                self._clean_up(outcome)
                return outcome
            self._check_not_running(
                [lock for lock in self._rank_locks() if not lock.name.endswith(f"-of-{world}.lock")]
            )
            if outcome is not None or not self._is_started():  # `out` was removed, or the run is new
                self._write_manifest(None)
            (self.folder / _BATCHES).mkdir(exist_ok=True)
            return Share(self.folder / f"{rank}-of-{world}.lock", self.folder / _BATCHES, frozenset(self._done()))

    def times(self, share: Share | Outcome) -> dict[int, float]:
        """Return when each batch that was done at `join` was written.

        For a complete run that is the time of `out`.
        """
        if isinstance(share, Outcome):
            return dict.fromkeys(range(self.num_batches), self.out.stat().st_mtime)
        times = {}
        for number in share.done:
            with suppress(FileNotFoundError):  # another process has completed the run
                times[number] = _batch_file(self.folder / _BATCHES, number).stat().st_mtime
        return times

    def finish(self, write: Writer) -> Outcome | None:
        """Write `out` if all batches are done, by whichever process; return None if some are not.

        Of several processes that finish at the same time one writes and the others wait. If it is killed, the next one
        writes.

        Raises:
            ValueError: If the file of a batch is damaged.
        """
        with self._locked():
            outcome = self._outcome()
            if outcome is not None:
                return outcome
            if len(self._done()) < self.num_batches:
                return None
            images = failures = 0

            def batches() -> Iterator[list[Record]]:
                nonlocal images, failures
                for number in range(self.num_batches):
                    records = self._records(number)
                    images += len(records)
                    failures += sum(record["error"] is not None for record in records)
                    yield records

            merged = self.folder / _MERGED
            write(merged, batches())
            replace_files([(merged, self.out)])
            outcome = Outcome(images, failures)
            self._write_manifest(outcome)
            self._clean_up(outcome)
            return outcome

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with writing("progress", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("ab") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX)  # released by the system when the process ends
            yield

    def _rank_locks(self) -> list[Path]:
        return sorted(self.folder.glob("*-of-*.lock"))

    def _check_not_running(self, locks: Sequence[Path]) -> None:
        for lock in locks:
            with lock.open("ab") as stream:
                if not try_lock(stream):
                    raise BlockingIOError(
                        f"another process holds {os.fspath(lock)!r}; wait until it has ended, or stop it"
                    )

    def _remove_batches(self) -> None:
        shutil.rmtree(self.folder / _BATCHES, ignore_errors=True)
        for file in [*self._rank_locks(), self.folder / _MERGED]:
            file.unlink(missing_ok=True)

    def _clean_up(self, outcome: Outcome) -> None:
        if outcome.failures == 0:  # else --retry-failed needs the other batches
            self._remove_batches()

    def _done(self) -> list[int]:
        try:
            names = os.listdir(self.folder / _BATCHES)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_BATCH_NAME.fullmatch, names) if match)

    def _records(self, number: int) -> list[Record]:
        file = _batch_file(self.folder / _BATCHES, number)
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(file)!r} is damaged; delete it and rerun the same command") from error

    def _is_started(self) -> bool:
        return (self.folder / _MANIFEST).exists()

    def _outcome(self) -> Outcome | None:
        """The outcome of a complete run, or None; ValueError if the run has other options."""
        manifest = read_json_object(self.folder / _MANIFEST)
        if not isinstance(before := manifest.get("options"), dict) or "complete" not in manifest:
            name = os.fspath(self.folder / _MANIFEST)
            raise ValueError(f"{name!r} is damaged; choose another OUT, or pass --overwrite")
        names = sorted(before.keys() | self.options.keys())
        changed = [name for name in names if before.get(name) != self.options.get(name)]
        if changed:
            shown = "; ".join(
                f"{name}: {before.get(name)!r} before, {self.options.get(name)!r} now" for name in changed
            )
            images = "; for new images only, pass a list of them and another OUT" if set(changed) <= _IMAGES else ""
            raise ValueError(
                f"{os.fspath(self.out)!r} was started with other options ({shown}); pass the same ones, choose another "
                f"OUT, or pass --overwrite to start from the beginning{images}"
            )
        return None if manifest["complete"] is None else Outcome(**manifest["complete"])

    def _write_manifest(self, outcome: Outcome | None) -> None:
        complete = None if outcome is None else outcome._asdict()
        text = json_text({"options": self.options, "complete": complete}, owner="the run")
        atomic_write_text(self.folder / _MANIFEST, text)


def _batch_file(folder: Path, number: int) -> Path:
    return folder / f"{number:08}.json"
