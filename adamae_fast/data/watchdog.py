"""Ends data workers whose decoder is stuck: some damaged files keep one busy, or waiting, for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Self

CHECKS_PER_TIMEOUT = 10
"""How often a worker is looked at while it has its time."""


class Decoding(NamedTuple):
    """What a worker does at a moment."""

    pid: int
    """Its process."""

    entry: int
    """Index of the video that it decodes."""

    begun: int
    """Videos that it has begun so far, so that the same one a second time is another."""


class Watchdog:
    """A thread that kills each worker that decodes one video for longer than ``timeout`` seconds.

    It adds up the time between its own looks, and no look counts for more than two intervals: where everything stood
    still (Ctrl-Z, a machine suspended), no video is to blame.

    Args:
        workers: the processes that it may kill.
        decoding: tells what each worker is decoding, leaving out those that are not.
        timeout: seconds.
    """

    def __init__(self, workers: Sequence[BaseProcess], decoding: Callable[[], list[Decoding]], timeout: float) -> None:
        self.killed: dict[int, int] = {}
        """What each worker that it killed was decoding, by process id."""
        self._workers = {worker.pid: worker for worker in workers}
        self._decoding = decoding
        self._timeout = timeout
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog of the data workers", daemon=True)

    def __enter__(self) -> Self:
        if self._workers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._workers:
            self._thread.join()

    def _watch(self) -> None:
        interval = self._timeout / CHECKS_PER_TIMEOUT
        ages: dict[Decoding, float] = {}
        before = time.monotonic()
        while not self._stopped.wait(interval):
            now = time.monotonic()
            passed, before = min(now - before, 2 * interval), now
            ages = {state: ages[state] + passed if state in ages else 0.0 for state in self._decoding()}
            for state, age in ages.items():
                if age >= self._timeout and state.pid not in self.killed and state.pid in self._workers:
                    self.killed[state.pid] = state.entry
                    self._workers[state.pid].kill()
