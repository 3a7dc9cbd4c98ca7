"""Clips and tokens a second against batch size and masking strategy: ``python -m bench.throughput``.

At each batch size all masks take turns, with each of the arms of ``bench.step`` that are asked for. What decoding
delivers is another figure: clips are in memory, of the device or of the host.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamae_fast.config import MaskConfig
from bench import arms, command, conditions
from bench.arms import Arm, Setting, Skipped
from bench.parity import PretrainParity
from bench.step import PLANS, QUICK, check_parity, timing_row
from bench.timing import Plan, Runner, run_in_turns

MASKS = (
    MaskConfig(),
    MaskConfig(strategy="tube", ratio=0.9),
    MaskConfig(strategy="random", ratio=0.9),
    MaskConfig(strategy="frame", ratio=0.875),
)

BATCHES = {"cpu": (1, 2), "cuda": (8, 16, 32, 64, 128)}

CLIPS = {"cpu": ("device",), "cuda": ("device", "pinned")}
"""Where a step's clips are: on the device already, or in pinned host memory, uploaded by the step itself."""

Row = dict[str, Any]
Case = tuple[str, Setting]
"""An arm, and what it trains."""

FAILED = "parity: "
"""What a reason begins with where an arm computes something else."""


def told(name: str, mask: MaskConfig) -> str:
    """An arm with a mask, in words."""
    return f"{name}, {mask.strategy} {mask.ratio:g}"


def check(cases: Sequence[Case], plan: arms.Plan) -> Skipped:
    """Why some must not be timed: the published code has adaptive masks alone, or an arm fails its parity."""
    skipped: Skipped = {}
    for name, setting in cases:
        few = dataclasses.replace(setting, batch_size=min(setting.batch_size, 2))
        try:
            arm = arms.builders(few, plan)[0][name]()
        except ValueError as error:
            skipped[told(name, setting.mask)] = str(error)
        else:
            fault = check_parity(arm, PretrainParity(few))
            skipped |= {told(name, setting.mask): FAILED + fault} if fault else {}
    return skipped


def measure(cases: Sequence[Case], plan: arms.Plan, timing: Plan) -> list[Row]:
    """Cases of one batch size in turns, a row for each of :data:`CLIPS`; one that does not fit is a result, too."""
    gc.collect()
    rows: list[Row] = []
    built: dict[str, tuple[Row, Arm]] = {}
    runners: dict[str, Runner] = {}
    for name, setting in cases:
        mask = setting.mask
        row = {"arm": name, "strategy": mask.strategy, "ratio": mask.ratio, "batch": setting.batch_size}
        key = told(name, mask)
        try:
            arm = arms.builders(setting, plan)[0][name]()
            runners[key] = arm.runner(timing.warm_up)
            built[key] = row, arm
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows.append({**row, "clips": "device", "refused": "out of memory beside those before it"})
    for clips in CLIPS[cases[0][1].device.type]:
        if clips == "pinned":
            for key, (_, arm) in built.items():
                arm.clips = arm.clips.cpu().pin_memory()
                runners[key] = arm.runner(warm_up=1)
        for key, result in run_in_turns(runners, timing).items():
            row, arm = built[key]
            figures = timing_row(result, arm.setting, conditions.device_name(arm.setting.device))
            rows.append({**row, "clips": clips, **figures})
    return rows


def speedups(rows: Sequence[Row], baseline: str) -> list[float | None]:
    """How many times as fast as the baseline each row is, with the same mask, batch and clips; None without figures."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["strategy"], row["batch"], row["clips"]

    base = {key(row): row["ms"] for row in rows if row["arm"] == baseline and "ms" in row}
    return [round(base[key(row)] / row["ms"], 3) if "ms" in row and key(row) in base else None for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return command.REFUSED if an arm failed its parity."""
    parser = command.parser("throughput", __doc__)
    parser.add_argument(
        "--arm", nargs="+", default=["ours-none"], metavar="NAME", help="arms of bench.step; the first is the baseline"
    )
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes")
    options = parser.parse_args(arguments)
    checkout = command.checkout_of(options)
    first = command.setting_of(options)
    taken = conditions.collect(first.device)
    plan = arms.plan_for(first.device, checkout)
    build, missing = arms.builders(first, plan)
    for name in options.arm:
        if name not in build:
            raise ValueError(f"--arm={name!r}: {missing.get(name, 'no such arm')}; choose from {', '.join(build)}")
    timing = QUICK if options.quick else dataclasses.replace(PLANS[first.device.type], rounds=6)
    batches = options.batch or ([1, 2] if options.quick else BATCHES[first.device.type])
    masks = [dataclasses.replace(mask, ratio=min(mask.ratio, 0.9)) for mask in MASKS] if options.quick else MASKS
    baseline = options.arm[0]
    rows: list[Row] = []
    with command.progress(len(batches) + 1) as (say, advance):
        say("parity of every arm with every mask")
        cases = [(name, dataclasses.replace(first, mask=mask)) for mask in masks for name in options.arm]
        skipped = check(cases, plan)
        if len(skipped) == len(cases):
            raise ValueError(f"--arm {' '.join(options.arm)}: nothing can be measured: {'; '.join(skipped.values())}")
        advance()
        for batch in batches:
            say(f"batch {batch}, in turns")
            of_batch = [
                (name, dataclasses.replace(setting, batch_size=batch))
                for name, setting in cases
                if told(name, setting.mask) not in skipped
            ]
            rows += measure(of_batch, plan, timing)
            advance()
    order = [mask.strategy for mask in masks]
    rows.sort(key=lambda row: order.index(row["strategy"]))
    result = {
        "conditions": taken,
        "published_checkout": checkout.commit if checkout else None,
        "speedup_over": baseline,
        "rows": [{**row, "speedup": faster} for row, faster in zip(rows, speedups(rows, baseline), strict=True)],
        "skipped": skipped,
    }
    print_table(result["rows"], baseline, skipped)
    command.finish("throughput", result, options)
    return command.REFUSED if any(reason.startswith(FAILED) for reason in skipped.values()) else 0


def print_table(rows: Sequence[Row], baseline: str, skipped: Skipped) -> None:
    """What a person reads."""
    table = Table("arm", "mask", "batch", "clips", "ms", f"× {baseline}", "CPU ms", "clips/s", "tokens/s", "MFU")
    for row in rows:
        cells = [row["arm"], f"{row['strategy']} {row['ratio']:g}", str(row["batch"]), row["clips"]]
        if "refused" in row:
            table.add_row(*cells, row["refused"])
            continue
        faster, mfu = row["speedup"], row["mfu"]
        table.add_row(
            *cells,
            f"{row['ms']:.1f}",
            "" if faster is None else f"{faster:.2f}",
            f"{row['cpu_ms']:.1f}",
            f"{row['clips_per_s']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            "" if mfu is None else f"{mfu:.1%}",
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    for case, reason in skipped.items():
        console.print(f"{case}: {escape(reason)}", highlight=False)


if __name__ == "__main__":
    command.run(main)
