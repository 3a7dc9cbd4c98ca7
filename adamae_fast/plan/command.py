"""The command ``adamae-fast plan``: recipe and options in, table or JSON out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from adamae_fast.config import PretrainConfig, add_fields, add_run_arguments, build_config
from adamae_fast.plan.calibration import calibration
from adamae_fast.plan.options import PlanOptions
from adamae_fast.plan.planner import Plan, make_plan, shown

if TYPE_CHECKING:  # it loads what plans alone do not need
    from adamae_fast.plan.dry_run import DryRun

WIDE = 120
"""Columns that the whole table takes."""


def add_plan_arguments(parser: ArgumentParser) -> None:
    """Every option of the plan, and every key of a recipe."""
    add_fields(parser, PlanOptions)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Rehearse the set-up of the first and the last process on this machine, and what all of them see.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object in place of the table.")
    add_run_arguments(parser, PretrainConfig)


def run_plan(parser: ArgumentParser, arguments: Namespace) -> int:
    """Plan and print; 0."""
    options = build_config(parser, arguments, PlanOptions)
    for key, value in options.recipe_overrides(arguments["train.batch_size"]).items():
        arguments[key] = value
    config = build_config(parser, arguments, PretrainConfig)
    plan = make_plan(config, options, calibration())
    found = None
    if arguments.dry_run:
        from adamae_fast.plan.dry_run import dry_run

        found = dry_run(config, options.num_gpus, options.videos.num_videos)
    if arguments.json:
        print(json.dumps(as_json(plan, options, found)))
        return 0
    print_plan(plan, Console())
    if found is not None:
        print_dry_run(found, options.num_gpus)
    return 0


def as_json(plan: Plan, options: PlanOptions, found: DryRun | None = None) -> dict[str, object]:
    """Everything of the table. ``high`` is the other end of a figure that is a range, else null."""
    return {
        "command": "plan",
        "title": plan.title,
        "options": asdict(options),
        "figures": {key: asdict(figure) for key, figure in plan.figures.items()},
        "warnings": plan.warnings,
        "dry_run": None if found is None else asdict(found),
    }


def print_plan(plan: Plan, console: Console) -> None:
    """What a person reads; in a narrow window without the last column."""
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    is_wide = console.width >= WIDE
    table = Table("", "", "basis", *([Column("how", overflow="fold")] if is_wide else []), title=escape(plan.title))
    group = ""
    for figure in plan.figures.values():
        if figure.group != group:
            group = figure.group
            table.add_section()
            table.add_row(f"[bold]{group}")
        colour = {"measured": "green", "exact": "default", "modelled": "yellow"}[figure.basis]
        basis = f"[{colour}]{figure.basis}"
        table.add_row(f"  {figure.name}", shown(figure), basis, *([escape(figure.how)] if is_wide else []))
    console.print(table)
    if not is_wide:
        console.print(f"What each figure rests on: --json, or a window of {WIDE} columns.")
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_dry_run(found: DryRun, num_processes: int) -> None:
    """What a person reads."""
    table = Table(
        "process", *(f"{name}, MB" for name in ("weights", "gradients", "moments", "sum")), "peak (modelled), MB",
        title=f"counted after a step of {num_processes} processes",
    )  # fmt: skip
    for process in found.processes:
        kept = (process.weights, process.gradients, process.moments, process.total, process.modelled_peak)
        table.add_row(str(process.rank), *(f"{x / 1e6:,.1f}" for x in kept))
    console = Console()
    console.print(table)
    console.print(found.rehearsed, soft_wrap=True, highlight=False, markup=False)
    stream = found.stream
    console.print(
        f"followed: all {num_processes} processes through {stream.num_places} places of the stream of videos, an epoch "
        f"and the next one's beginning, in {stream.num_steps} steps: each is seen by exactly one process",
        soft_wrap=True,
        highlight=False,
    )
    if stream.resumed_with is not None:
        console.print(f"the same where it goes on half-way with {stream.resumed_with} processes", highlight=False)
