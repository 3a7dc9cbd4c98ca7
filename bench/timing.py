"""How long a call takes: all arms in one process, in turns, so that drift of the machine meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

Call = Callable[[], object]
"""One call of one arm in one mode."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often each arm is called."""

    warm_up: int = 20
    rounds: int = 20
    block: int = 5
    """Timed calls of one arm in one round."""


QUICK = Plan(warm_up=2, rounds=3, block=2)
"""To see that everything runs; its figures mean little."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float
    num_calls: int
    how: str
    """What was timed: calls, a CUDA graph of several calls, or several launches one after another."""
    cpu: float | None = None
    """CPU time of all threads of the process, median; waiting for the device in a loop counts. None: not measured."""


def summarize(seconds: list[float], how: str, cpu_seconds: Sequence[float] = ()) -> Timing:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    cpu = statistics.median(cpu_seconds) if cpu_seconds else None
    return Timing(statistics.median(seconds), fifths[0], fifths[3], len(seconds), how, cpu)


class Runner(Protocol):
    """One arm, ready to be timed."""

    how: str
    cpu_seconds: list[float]
    """CPU time of every timed call so far, of all threads; empty where calls are too short for that clock."""

    def seconds(self, repetitions: int) -> list[float]:
        """Run the call that often, after one more that is not timed, and return the time of each."""


class CpuRunner:
    """Wall clock around every call, with torch's threads as they are."""

    how = "calls"

    def __init__(self, call: Call, warm_up: int) -> None:
        self._call = call
        self.cpu_seconds: list[float] = []
        for _ in range(warm_up):
            call()

    def seconds(self, repetitions: int) -> list[float]:
        """As :class:`Runner` says."""
        self._call()  # the other arms have used the caches
        seconds = []
        for _ in range(repetitions):
            start_cpu = time.process_time()
            start = time.perf_counter()
            self._call()
            seconds.append(time.perf_counter() - start)
            self.cpu_seconds.append(time.process_time() - start_cpu)
        return seconds


CALLS_OF_GRAPH = 10
"""Calls between two events, where the clock would show the launch of a single one."""


class CudaRunner:
    """Events around a CUDA graph of several calls; around one launched call where a call waits for the device."""

    def __init__(self, call: Call, warm_up: int) -> None:
        self._call = call
        self.cpu_seconds: list[float] = []
        for _ in range(warm_up):
            call()
        torch.cuda.synchronize()
        self._graph = None if _waits_for_device(call) else self._capture()
        self.how = "launches" if self._graph is None else "graph"

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in range(CALLS_OF_GRAPH):
                    self._call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph

    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._call()

    def seconds(self, repetitions: int) -> list[float]:
        """As :class:`Runner` says; each time is the mean over the calls of a graph."""
        self._run()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
        events[0].record()
        for event in events[1:]:
            self._run()
            event.record()
        torch.cuda.synchronize()
        num_calls = 1 if self._graph is None else CALLS_OF_GRAPH
        return [start.elapsed_time(end) / 1000 / num_calls for start, end in pairwise(events)]


def _waits_for_device(call: Call) -> bool:
    """Whether the host waits in a call: such a call cannot be captured, and a failed capture leaves damage behind."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def make_runner(call: Call, device: torch.device, warm_up: int) -> Runner:
    """Return the call, warmed up, with the clock of its device."""
    return CudaRunner(call, warm_up) if device.type == "cuda" else CpuRunner(call, warm_up)


def time_in_turns(calls: dict[str, Call], device: torch.device, plan: Plan) -> dict[str, Timing]:
    """Time every call: rounds in which each arm gets a block of repetitions.

    On a GPU, a side stream must be current: graphs are not captured on the default one.
    """
    return run_in_turns({arm: make_runner(call, device, plan.warm_up) for arm, call in calls.items()}, plan)


def run_in_turns(runners: dict[str, Runner], plan: Plan) -> dict[str, Timing]:
    """Time runners that are warm: rounds in which each gets a block of repetitions."""
    seconds: dict[str, list[float]] = {arm: [] for arm in runners}
    for _ in range(plan.rounds):
        for arm, runner in runners.items():
            seconds[arm] += runner.seconds(plan.block)
    return {arm: summarize(seconds[arm], runner.how, runner.cpu_seconds) for arm, runner in runners.items()}


def copy_roof(device: torch.device, *, num_bytes: int = 2**28, repetitions: int = 20) -> float:
    """Bytes a second of a large copy, read and written bytes counted, on random data."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runner = make_runner(lambda: target.copy_(source), device, warm_up=3)
    return 2 * num_bytes / statistics.median(runner.seconds(repetitions))
