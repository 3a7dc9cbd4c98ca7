"""Ctrl-C, SIGTERM and SIGUSR1 end a run between two steps, so that it can save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what schedulers are told to send some time before they end a job."""


@contextmanager
def stop_signals(*, patient: bool = False) -> Iterator[list[str]]:
    """Yield a list that receives the name of the first signal of WATCHED; a second one ends the process as usual.

    A ``patient`` process takes no notice of further ones: torchrun passes on a signal that the scheduler has sent to
    every process already, and ends by SIGKILL what does not end in time. Only the main thread may watch signals;
    elsewhere the list stays empty.
    """
    received: list[str] = []
    watched = WATCHED if threading.current_thread() is threading.main_thread() else ()
    # What the parent process chose to ignore, as nohup does, stays ignored.
    previous = {n: h for n in watched if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number: int, frame: object) -> None:
        if not received:
            received.append(signal.Signals(number).name)
        if not patient:
            restore()

    for number in previous:
        signal.signal(number, remember)
    try:
        yield received
    finally:
        restore()
