"""A child process that calls a function, each time within a limit."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

STARTUP = 120.0
"""Most seconds from the start of a child to its first call: it imports torch."""


class ChildError(Exception):
    """A child process without a result: it was killed, or ended."""


class Child:
    """A process that calls one function.

    It is started at the first call, and again after a call without a result. A kernel that never ends cannot be
    stopped in its own process: the process is killed.

    Args:
        function: What the child calls: a function of a module, which must not raise.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._process: Any = None
        self._pipe: Any = None

    def call(self, *arguments: Any, limit: float) -> Any:
        """Return `function(*arguments)`, called in the child.

        Args:
            arguments: What can be pickled.
            limit: Seconds after which the child is killed. The start of a new child does not count.

        Raises:
            ChildError: If the child was killed, or ended by itself.
        """
        try:
            if self._process is None:
                self._start()
                self._receive(STARTUP, "the child process did not start")
            self._pipe.send(arguments)
            return self._receive(limit, "no end")
        except (EOFError, ConnectionError) as error:
            self._process.join(10)
            ended = self._process.exitcode
            self.close()
            raise ChildError(f"the child process ended with exit code {ended}") from error
        except BaseException:  # an interrupt as well: the child would stay behind
            self.close()
            raise

    def close(self) -> None:
        """Kill the child, if there is one."""
        if self._process is not None:
            self._process.kill()
            # A driver may hold a process for a while; nothing here depends on its end.
            self._process.join(10)
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        # A new interpreter: CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        # Ctrl-C reaches the child too, which inherits this mask: its traceback would hide the message of the parent.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
            self._process = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def _receive(self, limit: float, late: str) -> Any:
        if not self._pipe.poll(limit):
            raise ChildError(f"{late} within {limit:.0f} s")
        return self._pipe.recv()


def _serve(pipe: Any, function: Callable[..., Any]) -> None:
    """Answer calls until the parent ends. The first message says that the child has started."""
    try:
        pipe.send(None)
        while True:
            pipe.send(function(*pipe.recv()))
    except (EOFError, ConnectionError):
        return
