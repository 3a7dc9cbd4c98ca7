"""What a run writes down while it goes on: metrics.jsonl, TensorBoard curves, and the live progress line."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from adamae_fast.run_folder import RunFolder, read_json_lines

T = TypeVar("T")


class Stopwatch:
    """Adds up the time of what runs within it; on a GPU, the time that its stream takes, measured by events in it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._start = self._seconds = 0.0
        self._events: list[torch.cuda.Event] = []

    def _stamp(self) -> None:
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()

    def __enter__(self) -> None:
        if self._on_gpu:
            self._stamp()
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._seconds += time.perf_counter() - self._start
        if self._on_gpu:
            self._stamp()

    def lap(self) -> float:
        """Return the seconds and start at 0 again. To be called when the GPU has done all of it."""
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        seconds = sum(begin.elapsed_time(end) for begin, end in pairs) / 1000 if self._on_gpu else self._seconds
        self.reset()
        return seconds


class IntervalClock:
    """Measures the interval since the last report: how fast it went, and which share of it was waiting for data.

    On a CPU, this is the time in which the loop waited. A GPU is behind the loop, and computes while that waits: there
    it is the time in which the GPU had nothing left to do, measured by events in its own stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._waiting = Stopwatch(device)
        self.restart()

    def restart(self) -> None:
        """Begin the next interval; what came since the last one counts for neither."""
        self._start = time.perf_counter()
        self._waiting.reset()

    def wait_for(self, produce: Callable[[], T]) -> T:
        """Call ``produce`` and count its time as waiting. Waits for no device."""
        with self._waiting:
            return produce()

    def lap(self, steps: int, clips_per_step: int) -> dict[str, float]:
        """Return the rates of an interval of ``steps`` steps, and begin the next one.

        To be called when the GPU has done all of them.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        waited = self._waiting.lap()
        rates = {
            "clips_per_second": steps * clips_per_step / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait_share": min(1.0, waited / seconds),
        }
        self.restart()
        return rates


SLOW_SHARE = 0.1
"""A process is told to be slow where the others wait for it for a larger share of the time."""

_MERGED: dict[str, Callable[[Sequence[float]], float]] = {
    "data_wait_share": max,  # while one waits, so do all
    "batches_ready": min,
    "memory_bytes": max,
}
"""How a figure of several processes becomes one; the others are averaged."""


def over_processes(laps: Sequence[Mapping[str, float]], steps: int) -> dict[str, float]:
    """Return the figures of an interval of ``steps`` steps from those of each process, in the order of their ranks.

    ``forward_seconds`` is not among them: with the wait for data, it is the time that a process takes before its
    gradients meet those of others. Of several processes, slowest_rank takes longest, and slowest_rank_share is the
    share of the interval by which that is longer than the median (with an even number, the smaller of the two in the
    middle).
    """
    names = {name: None for lap in laps for name in lap if name != "forward_seconds"}  # in their order
    merged = {}
    for name in names:
        values = [lap[name] for lap in laps if name in lap]
        merged[name] = values[0] if len(values) == 1 else _MERGED.get(name, statistics.fmean)(values)
    if len(laps) > 1:
        own = [lap["data_wait_share"] * lap["seconds_per_step"] + lap["forward_seconds"] / steps for lap in laps]
        merged["slowest_rank"] = own.index(max(own))
        merged["slowest_rank_share"] = (max(own) - statistics.median_low(own)) / merged["seconds_per_step"]
    return merged


class MetricsLog:
    """One JSON object a logged step, and the same figures as TensorBoard curves."""

    def __init__(self, run: RunFolder, first_step: int, *, tensorboard: bool) -> None:
        keep_metrics_until(run.metrics, first_step)
        keep_metrics_until(run.validation, first_step)
        self._run = run
        self._file = run.metrics.open("a")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run.tensorboard), purge_step=first_step + 1)

    def write(self, metrics: dict[str, float]) -> None:
        """Append one line and flush it, so that a killed run keeps it; a value that is not finite becomes null."""
        self._file.write(_line(metrics))
        self._file.flush()
        self._draw(metrics, "")

    def write_validation(self, metrics: dict[str, float]) -> None:
        """Append one line to validation.jsonl; its curves are called val/…."""
        with self._run.validation.open("a") as file:
            file.write(_line(metrics))
        self._draw(metrics, "val/")

    def write_alarm(self, name: str, step: int, message: str) -> None:
        """Show a text in TensorBoard, as alarms/NAME; the report finds alarms in the metrics by itself."""
        if self._writer is not None:
            self._writer.add_text(f"alarms/{name}", message, global_step=step)

    def _draw(self, metrics: dict[str, float], prefix: str) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                if name != "step":
                    self._writer.add_scalar(f"{prefix}{name}", value, global_step=int(metrics["step"]))

    def close(self) -> None:
        """Flush and close both outputs."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _line(metrics: dict[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines after ``step`` (and a torn last line): a resumed run writes them again."""
    kept = [entry for entry in read_json_lines(path) if entry["step"] <= step]
    if path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        temporary.replace(path)


class ProgressLine:
    """A live line in a terminal; in a log file, one plain line a report and at most one every ten seconds."""

    PLAIN_INTERVAL_S = 10.0

    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps
        self._last_plain = float("-inf")
        self._bar = Progress(
            BarColumn(bar_width=16),
            TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            TextColumn("ETA", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            # What does not fit beside the columns before it is cut, never they.
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, figures="")

    def advance(self, step: int) -> None:
        """Move the bar to ``step`` steps done."""
        self._bar.update(self._task, completed=step)

    def report(self, metrics: dict[str, float]) -> None:
        """Show the newest figures."""
        figures = (
            f"loss {metrics['loss']:.4f} · {metrics['clips_per_second']:.1f} clips/s · "
            f"data wait {metrics['data_wait_share']:.0%} · quarantined {metrics['quarantined']:.0f} · "
            f"{metrics['batches_ready']:.1f} ready"
        )
        if "decode_seconds" in metrics:
            figures += f" · decode {metrics['decode_seconds'] * 1000:.0f} ms/clip"
        if "dali_share" in metrics:
            figures += f" · DALI {metrics['dali_share']:.0%}"
        if metrics.get("slowest_rank_share", 0.0) > SLOW_SHARE:
            figures += f" · waits for rank {metrics['slowest_rank']:.0f} {metrics['slowest_rank_share']:.0%}"
        self._bar.update(self._task, figures=figures)
        now = time.monotonic()
        is_last = metrics["step"] == self._total_steps
        if not self._console.is_terminal and (is_last or now - self._last_plain >= self.PLAIN_INTERVAL_S):
            self._last_plain = now
            left = timedelta(seconds=round((self._total_steps - metrics["step"]) * metrics["seconds_per_step"]))
            line = f"step {metrics['step']:.0f}/{self._total_steps} · {figures} · ETA {left}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()
