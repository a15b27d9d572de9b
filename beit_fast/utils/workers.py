"""Worker processes of a DataLoader."""

from __future__ import annotations

import signal


def ignore_interrupt(worker: int) -> None:
    """Ignore Ctrl-C in a worker; pass it as `worker_init_fn`.

    Ctrl-C reaches all processes of a terminal. The main process stops its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
