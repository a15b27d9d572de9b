"""How a command ends as a process: exit codes, closed pipes and encodings."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from .options import ExitCode


def run(name: str, action: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    Bad input is one message on stderr and `ERROR`; an interrupt and a closed pipe end without a traceback. Characters
    that the encoding of stdout lacks are printed as escapes.

    Args:
        name: The command, for messages.
        action: Runs the command.
    """
    try:
        with _escaped(sys.stdout):
            return action()
    except KeyboardInterrupt:
        return _end(f"{name}: interrupted", ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader closed the pipe
        return _end(None, ExitCode.CLOSED_PIPE)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        return _end(f"{name}: {error}", ExitCode.ERROR)


@contextlib.contextmanager
def _escaped(stream: TextIO | None) -> Iterator[None]:
    """Print with escapes, and flush at the end.

    An error of the flush then has a handler.
    """
    reconfigure = getattr(stream, "reconfigure", None)
    if stream is None or reconfigure is None:
        yield
        return
    errors = stream.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        reconfigure(errors=errors)  # flushes


def report_to_torchrun(message: str) -> None:
    """Put the reason of an exit code on torchrun's error page.

    Without torchrun nothing is written.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": content}))


def _end(message: str | None, code: ExitCode) -> ExitCode:
    if message is not None:
        report_to_torchrun(message)
        with contextlib.suppress(BrokenPipeError):
            print(message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        _discard_if_broken(stream)
    return code


def _discard_if_broken(stream: TextIO | None) -> None:
    """Redirect a stream that cannot be flushed: the interpreter flushes it again at exit, and complains."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):  # it has no file descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
