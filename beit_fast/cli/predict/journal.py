"""A run of `beit-fast predict` on the disk: what is done survives a kill at any moment, and the end is one whole file.

Beside OUT lies the folder OUT.run:

    manifest.json    what the results depend on, and once OUT is complete, how many there are
    1-of-4.part      what rank 1 of 4 has done, a line for each batch: checksum, number, failures, records
    lock             held by whoever starts, joins or ends the run

A batch is the unit that is done or not. Which images it has follows from the data set alone, so the same images go
through the model together whichever process takes them, and numbers do not depend on kills or on how many ranks
there are. A line is written at once and flushed; what of it a kill left behind fails its checksum and is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

from ...utils.files import atomic_write_text, flush_to_disk, json_text, read_json_object, replace_files

Record: TypeAlias = dict[str, Any]
Writer: TypeAlias = Callable[[Path, Iterator[Sequence[Record]]], None]

_MANIFEST, _LOCK, _MERGED = "manifest.json", "lock", "merged.unfinished"
_LINE = re.compile(rb"([0-9a-f]{8}) ((\d+) (\d+) (.*\n))", re.DOTALL)


class Outcome(NamedTuple):
    """What a complete run came to: how many images there are, and how many of them have an error."""

    images: int
    failures: int


class Batch(NamedTuple):
    """Where a finished batch lies in a part, and how many of its images have an error."""

    number: int
    failures: int
    part: Path
    offset: int
    size: int


def read_part(part: Path) -> tuple[list[Batch], int]:
    """The finished batches of a part, and where they end: what comes after was being written at a kill."""
    batches, end = [], 0
    with part.open("rb") as stream:
        for line in stream:
            match = _LINE.fullmatch(line)
            if match is None or int(match[1], 16) != zlib.crc32(match[2]):
                break
            batches.append(Batch(int(match[3]), int(match[4]), part, end + match.start(5), len(match[5])))
            end += len(line)
    return batches, end


def part_line(number: int, records: Sequence[Record]) -> bytes:
    """A finished batch as it is written."""
    failures = sum(record["error"] is not None for record in records)
    # A name that is not UTF-8 holds surrogates, of which backslashreplace makes what JSON escapes them to.
    text = json.dumps(list(records), ensure_ascii=False).encode("utf-8", "backslashreplace")
    line = b"%d %d %s\n" % (number, failures, text)
    return b"%08x %s" % (zlib.crc32(line), line)


class Part:
    """The part that this process appends to, locked against all others until it is closed."""

    def __init__(self, path: Path, done: frozenset[int]) -> None:
        self.done = done
        self._stream = path.open("ab")
        if not _try_lock(self._stream):
            self._stream.close()
            raise BlockingIOError(f"another process is writing {os.fspath(path)!r}: is this command running already?")
        self._stream.truncate(read_part(path)[1])
        flush_to_disk(path.parent)

    def append(self, number: int, records: Sequence[Record]) -> None:
        """Add a finished batch; it is on the disk when this returns."""
        self._stream.write(part_line(number, records))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Let go of the part, whose lines others can read from then on, on network file systems too."""
        self._stream.close()


class Run:
    """The run that writes `out`.

    Args:
        options: all that the results depend on, in JSON's types; a run goes on under the same options only.
        batches: how many there are.
    """

    def __init__(self, out: Path, options: Mapping[str, Any], batches: int) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.run")
        self.options = dict(options)
        self.batches = batches

    def forget(self) -> None:
        """Begin anew: drop all that was done. The old results stay until the new ones are complete.

        Raises:
            BlockingIOError: processes are at work.
        """
        with self._locked():
            self._refuse_writers(self._parts())
            self._remove_parts()
            self._write_manifest(None)

    def forget_failures(self) -> None:
        """Drop the batches in which an image has an error, so that they are done again.

        Raises:
            BlockingIOError: processes are at work.
            ValueError: the run has other options.
        """
        if not self._is_begun():
            return
        with self._locked():
            outcome = self._outcome()
            if outcome is not None and outcome.failures == 0:
                return
            self._refuse_writers(self._parts())
            self._write_manifest(None)
            for part in self._parts():
                _drop_failures(part)

    def join(self, rank: int, world: int) -> Part | Outcome:
        """A part to write, with the batches that any process has done; or how the run ended, where it did.

        Raises:
            BlockingIOError: other processes are at work, and not as ranks of the same `world`.
            FileExistsError: there is an `out` that no run has made.
            ValueError: the run was begun with other options.
        """
        if self.out.exists() and not self._is_begun():
            raise FileExistsError(
                f"{os.fspath(self.out)!r} exists, and no {self.folder.name} beside it tells how it was made; give "
                "another OUT, or --overwrite"
            )
        with self._locked():
            outcome = self._outcome() if self._is_begun() else None
            if outcome is not None and self.out.exists():
                self._clean_up(outcome)
                return outcome
            self._refuse_writers([part for part in self._parts() if not part.name.endswith(f"-of-{world}.part")])
            if outcome is not None:  # and somebody has removed what it made
                self._remove_parts()
            if outcome is not None or not self._is_begun():
                self._write_manifest(None)
            return Part(self.folder / f"{rank}-of-{world}.part", frozenset(self._finished()))

    def finish(self, write: Writer) -> Outcome | None:
        """Make `out` of the parts if all batches are done, by whichever process; None if some are not.

        Of processes that end together one writes and the others wait for it; if it dies, the next one writes.
        """
        with self._locked():
            outcome = self._outcome()
            if outcome is not None:
                return outcome
            finished = self._finished()
            if len(finished) < self.batches:
                return None
            unfinished = self.folder / _MERGED
            counted = _Counted(_records_of(finished[number]) for number in range(self.batches))
            write(unfinished, iter(counted))
            replace_files([(unfinished, self.out)])
            self._write_manifest(counted.outcome)
            self._clean_up(counted.outcome)
            return counted.outcome

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # the system lets go of it when the process ends, however it ends
            yield

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("*-of-*.part"))

    def _remove_parts(self) -> None:
        for part in [*self._parts(), *self.folder.glob("*.unfinished")]:
            part.unlink()

    def _clean_up(self, outcome: Outcome) -> None:
        if outcome.failures == 0:  # else the parts are needed to do these alone again
            self._remove_parts()

    def _finished(self) -> dict[int, Batch]:
        return {batch.number: batch for part in self._parts() for batch in read_part(part)[0]}

    def _refuse_writers(self, parts: Sequence[Path]) -> None:
        for part in parts:
            with part.open("ab") as stream:
                if not _try_lock(stream):
                    raise BlockingIOError(
                        f"another process is writing {os.fspath(part)!r}; wait until it has ended, or end it"
                    )

    def _is_begun(self) -> bool:
        return (self.folder / _MANIFEST).exists()

    def _outcome(self) -> Outcome | None:
        """How the run ended, None where it did not; ValueError where its options are others."""
        manifest = read_json_object(self.folder / _MANIFEST)
        if not isinstance(begun := manifest.get("options"), dict) or "complete" not in manifest:
            raise ValueError(f"{os.fspath(self.folder / _MANIFEST)!r} is damaged; give another OUT, or --overwrite")
        names = sorted(begun.keys() | self.options.keys())
        changed = [name for name in names if begun.get(name) != self.options.get(name)]
        if changed:
            shown = "; ".join(f"{name}: {begun.get(name)!r} then, {self.options.get(name)!r} now" for name in changed)
            raise ValueError(
                f"{os.fspath(self.out)!r} was begun with other options ({shown}); give the same ones, another OUT, or "
                "--overwrite to begin anew"
            )
        return None if manifest["complete"] is None else Outcome(**manifest["complete"])

    def _write_manifest(self, outcome: Outcome | None) -> None:
        complete = None if outcome is None else outcome._asdict()
        text = json_text({"options": self.options, "complete": complete}, owner="the run")
        atomic_write_text(self.folder / _MANIFEST, text)


class _Counted:
    """Batches of records as they come, counted."""

    def __init__(self, batches: Iterator[Sequence[Record]]) -> None:
        self.batches = batches
        self.outcome = Outcome(0, 0)

    def __iter__(self) -> Iterator[Sequence[Record]]:
        for records in self.batches:
            failures = sum(record["error"] is not None for record in records)
            self.outcome = Outcome(self.outcome.images + len(records), self.outcome.failures + failures)
            yield records


def _records_of(batch: Batch) -> list[Record]:
    with batch.part.open("rb") as stream:
        stream.seek(batch.offset)
        return json.loads(stream.read(batch.size))


def _try_lock(stream: IO[bytes]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _drop_failures(part: Path) -> None:
    unfinished = part.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        for batch in read_part(part)[0]:
            if batch.failures == 0:
                stream.write(part_line(batch.number, _records_of(batch)))
    replace_files([(unfinished, part)])
