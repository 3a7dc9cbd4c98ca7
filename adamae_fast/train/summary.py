"""How a run ended: summary.json, the report, and the last lines on the screen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice

from rich.console import Console

from adamae_fast.config import PretrainConfig
from adamae_fast.data.manifest import Entry
from adamae_fast.data.synthetic import read_boxes
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.html import read_json_lines
from adamae_fast.report.visualize import Report, write_report
from adamae_fast.run_folder import RunFolder
from adamae_fast.train.metrics import read_metrics

NUM_PICTURED = 6
NUM_BOXED = 64
SMOOTHED_LINES = 5
"""Logged lines whose mean loss counts as the last loss: one batch alone says little."""


def write_summary(
    run: RunFolder, config: PretrainConfig, model: AdaMAE, entries: Sequence[Entry], step: int, total_steps: int,
    console: Console,
) -> dict[str, object]:  # fmt: skip
    """Write summary.json, and report.html if the run is complete; print where everything is and the figures as JSON.

    ``loss_first`` is the first logged loss, ``loss_last`` the mean of the last five, ``loss_fall`` their relative
    difference; throughput and data wait are means over all logged intervals.
    """
    metrics = read_metrics(run.metrics)
    first, last = metrics[0]["loss"], _mean([line["loss"] for line in metrics[-SMOOTHED_LINES:]])
    summary: dict[str, object] = {
        "step": step,
        "steps": total_steps,
        "loss_first": first,
        "loss_last": last,
        "loss_fall": 1 - last / first,
        "clips_per_second": _mean([line["clips_per_second"] for line in metrics]),
        "data_wait_share": _mean([line["data_wait_share"] for line in metrics]),
        "quarantined": metrics[-1]["quarantined"],
        "checkpoint": str(run.list_checkpoints()[-1]),
        "metrics": str(run.metrics),
    }
    if step == total_steps:
        with console.status("drawing the report"):
            report = _report(run, config, model, entries)
        summary["report"] = str(report.path)
        if report.adaptivity is not None:
            summary["adaptivity_adaptive"] = report.adaptivity["adaptive"]["value"]
            summary["adaptivity_random"] = report.adaptivity["random"]["value"]
    run.summary.write_text(json.dumps(summary, indent=1) + "\n")
    for name in ("report", "metrics", "checkpoint"):
        if name in summary:
            console.print(f"{name}: {summary[name]}", soft_wrap=True, highlight=False)
    console.out(json.dumps(summary), highlight=False)
    return summary


def _report(run: RunFolder, config: PretrainConfig, model: AdaMAE, entries: Sequence[Entry]) -> Report:
    """Picture the first readable videos; measure adaptivity on the first ones whose moving boxes are known."""
    bad = {line["path"] for line in read_json_lines(run.quarantine)}
    videos = [entry.path for entry in entries if entry.kind == "video" and entry.path not in bad]
    boxed = islice((path for path in videos if read_boxes(path) is not None), NUM_BOXED)
    return write_report(run, model, config, videos[:NUM_PICTURED], boxed_videos=list(boxed))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
