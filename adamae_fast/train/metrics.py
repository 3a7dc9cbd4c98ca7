"""What a run writes down while it goes on: metrics.jsonl, TensorBoard curves, and the live progress line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
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


class IntervalClock:
    """Measures the interval since the last report: how fast it went, and which share of it was waiting for data.

    On a CPU, this is the time in which the loop waited. A GPU is behind the loop, and computes while that waits: there
    it is the time in which the GPU had nothing left to do, measured by events in its own stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Begin the next interval; what came since the last one counts for neither."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait_for(self, produce: Callable[[], T]) -> T:
        """Call ``produce`` and count its time as waiting. Waits for no device."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = produce()
            end.record()
            self._gaps.append((begin, end))
            return result
        before = time.perf_counter()
        result = produce()
        self._waited += time.perf_counter() - before
        return result

    def lap(self, steps: int, clips_per_step: int) -> dict[str, float]:
        """Return the rates of an interval of ``steps`` steps, and begin the next one.

        To be called when the GPU has done all of them.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        waited = self._waited + sum(begin.elapsed_time(end) for begin, end in self._gaps) / 1000
        rates = {
            "clips_per_second": steps * clips_per_step / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait_share": min(1.0, waited / seconds),
        }
        self.restart()
        return rates


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
