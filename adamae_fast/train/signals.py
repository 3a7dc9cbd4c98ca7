"""Ctrl-C and SIGTERM end a run between two steps, so that it can save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Yield a list that receives the name of the first SIGTERM or SIGINT; a second one ends the process as usual.

    Only the main thread may watch signals; elsewhere the list stays empty.
    """
    received: list[str] = []
    watched = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    # What the parent process chose to ignore, as nohup does, stays ignored.
    previous = {n: h for n in watched if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for number in previous:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        restore()
