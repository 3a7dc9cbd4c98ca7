"""How a run ended: summary.json, the report, and the last lines on the screen."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice, repeat
from shlex import quote

from rich.console import Console

from adamae_fast.config import ModelConfig, PretrainConfig, RunConfig
from adamae_fast.data.manifest import Entry
from adamae_fast.data.synthetic import read_boxes
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.figures import headline
from adamae_fast.report.visualize import Report, write_report
from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train.sampler_watch import NUM_SEARCHED

log = logging.getLogger("adamae_fast")

_CLASSIFIER_KEYS = ("size", "num_frames", "frame_size", "tubelet_size", "patch_size")
"""Of the group ``model``: what a classifier must have as its encoder has it."""

NUM_PICTURED = 6


def write_summary(
    run: RunFolder,
    config: PretrainConfig,
    model: AdaMAE,
    entries: Sequence[Entry],
    step: int,
    total_steps: int,
    stopped_by: str | None,
    console: Console,
) -> dict[str, object]:
    """Write summary.json, and report.html if the run is complete; print where everything is and the figures as JSON.

    A report that cannot be drawn is logged as an error; the run and its figures stand.
    """
    summary = summarize(run, step, total_steps, stopped_by)
    write_summary_file(run, summary)
    if step == total_steps:
        with console.status("drawing the report"):
            try:
                report = _draw_report(run, config, model, entries)
            except Exception:  # whatever goes wrong in a picture must not cost a finished run its summary
                log.exception("the report could not be drawn; adamae-fast visualize %s VIDEOS… draws it anew", run.path)
            else:
                summary["report"] = str(report.path)
                for name, figure in (report.adaptivity or {}).items():
                    if isinstance(figure, dict):
                        summary[f"adaptivity_{name}"] = _rounded(figure["value"])
                write_summary_file(run, summary)
    is_finished = step == total_steps
    next_commands = suggest_commands(run, config, model, entries) if is_finished else ()
    print_summary(summary, ("report", "metrics", "checkpoint"), console, next_commands)
    return summary


def suggest_commands(run: RunFolder, config: PretrainConfig, model: AdaMAE, entries: Sequence[Entry]) -> list[str]:
    """Commands to go on with after pre-training. What stands in capitals is the user's to give."""
    bad = run.quarantined_paths()
    videos = [entry.path for entry in entries[:NUM_SEARCHED] if entry.kind == "video" and entry.path not in bad]
    commands = []
    if videos:
        command = "visualize" if model.sampler is None else "saliency"
        commands.append(f"adamae-fast {command} {quote(str(run.path))} {quote(videos[0])}")
    default = ModelConfig()
    sizes = {key: getattr(config.model, key) for key in _CLASSIFIER_KEYS}
    options = [f"--model.{key}={value}" for key, value in sizes.items() if value != getattr(default, key)]
    labelled = all(entry.label is not None for entry in entries)
    lists = [f"--data.manifest {quote(config.data.manifest) if labelled else 'LABELLED_LIST'}"]
    if labelled and config.data.root:
        lists.append(f"--data.root {quote(config.data.root)}")
    lists.append("--val.manifest ANOTHER_LIST")
    commands.append(" ".join(["adamae-fast finetune --init", quote(str(run.path)), *options, *lists]))
    return commands


def summarize(run: RunFolder, step: int, total_steps: int, stopped_by: str | None) -> dict[str, object]:
    """What the summary of every run holds."""
    checkpoints = run.list_checkpoints()
    summary: dict[str, object] = {
        "step": step,
        "steps": total_steps,
        "stopped_by": stopped_by,
        **headline(read_json_lines(run.metrics)),
        "quarantined": len(run.quarantined_paths()),
        "metrics": str(run.metrics),
        "checkpoint": str(checkpoints[-1]) if checkpoints else None,
    }
    return {name: _rounded(value) for name, value in summary.items()}


def print_facts(facts: Iterable[tuple[str, str]], console: Console) -> None:
    """Print a line for each name and fact."""
    for name, fact in facts:
        console.print(f"{name:<14}{fact}", soft_wrap=True, highlight=False, markup=False)


def print_stopped(config: RunConfig, step: int, stopped_by: str, console: Console) -> None:
    """Say that a signal has stopped the run, and how it goes on."""
    command = "the same command" if config.resume == "auto" else "the same command with --resume auto"
    console.print(f"stopped by {stopped_by} after step {step}; {command} continues", soft_wrap=True)


def print_summary(
    summary: Mapping[str, object], names: Sequence[str], console: Console, next_commands: Sequence[str] = ()
) -> None:
    """Print how the loss fell, those of ``names`` that there are, what to run next, and the whole as a line of JSON."""
    lines = {name: summary.get(name) for name in names}
    if summary["loss_fall"] is not None:
        fall = f"{summary['loss_first']:.4g} → {summary['loss_last']:.4g} (mean of the last lines of metrics.jsonl)"
        lines = {"loss": fall, **lines}
    print_facts(((name, str(value)) for name, value in lines.items() if value is not None), console)
    print_facts(zip(chain(["next"], repeat("")), next_commands, strict=False), console)
    console.out(json.dumps(summary), highlight=False)


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_summary_file(run: RunFolder, summary: Mapping[str, object]) -> None:
    """Write summary.json, whole or not at all."""
    temporary = run.summary.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(run.summary)


def _draw_report(run: RunFolder, config: PretrainConfig, model: AdaMAE, entries: Sequence[Entry]) -> Report:
    """Picture the first readable videos; measure adaptivity on those whose moving boxes are known."""
    bad = run.quarantined_paths()
    videos = [entry for entry in islice(entries, NUM_SEARCHED) if entry.path not in bad]
    boxed = [entry for entry in videos if read_boxes(entry.path) is not None]
    return write_report(run, model, config, videos[:NUM_PICTURED], boxed_videos=boxed)
