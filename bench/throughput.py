"""Clips and tokens a second against batch size and masking strategy: ``python -m bench.throughput``.

What decoding delivers is another figure: clips are in memory, of the device or of the host.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adamae_fast.config import MaskConfig
from bench import arms, command, conditions
from bench.arms import Setting
from bench.step import PLANS, QUICK, timing_row
from bench.timing import Plan, run_in_turns

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


def measure(setting: Setting, name: str, timing: Plan) -> list[Row]:
    """One arm at one batch size, a row for each of :data:`CLIPS`; a batch that does not fit is a result, too."""
    row: Row = {
        "arm": name,
        "strategy": setting.mask.strategy,
        "ratio": setting.mask.ratio,
        "batch": setting.batch_size,
    }
    gc.collect()
    rows = []
    clips = "device"
    try:
        arm = arms.builders(setting, arms.plan_for(setting.device, None))[0][name]()
        for clips in CLIPS[setting.device.type]:
            if clips == "pinned":
                arm.clips = arm.clips.cpu().pin_memory()
            result = run_in_turns({name: arm.runner(timing.warm_up)}, timing)[name]
            figures = timing_row(result, setting, conditions.device_name(setting.device))
            rows.append({**row, "clips": clips, **figures})
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        rows.append({**row, "clips": clips, "refused": "out of memory"})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = command.parser("throughput", __doc__)
    parser.add_argument("--arm", default="ours-none", help="an arm of bench.step")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes")
    options = parser.parse_args(arguments)
    first = command.setting_of(options)
    taken = conditions.collect(first.device)
    build, skipped = arms.builders(first, arms.plan_for(first.device, None))
    if options.arm not in build:
        raise ValueError(f"--arm={options.arm!r}: {skipped.get(options.arm, 'no such arm')}; choose {', '.join(build)}")
    timing = QUICK if options.quick else dataclasses.replace(PLANS[first.device.type], rounds=6)
    batches = options.batch or ([1, 2] if options.quick else BATCHES[first.device.type])
    masks = [dataclasses.replace(mask, ratio=min(mask.ratio, 0.9)) for mask in MASKS] if options.quick else MASKS
    rows: list[Row] = []
    with command.progress(len(masks) * len(batches)) as (say, advance):
        for mask in masks:
            for batch in batches:
                say(f"{mask.strategy} {mask.ratio}, batch {batch}")
                setting = dataclasses.replace(first, mask=mask, batch_size=batch)
                rows += measure(setting, options.arm, timing)
                advance()
    table = Table("strategy", "ratio", "batch", "clips", "ms", "CPU ms", "clips/s", "tokens/s", "MFU")
    for row in rows:
        cells = [row["strategy"], str(row["ratio"]), str(row["batch"]), row["clips"]]
        if "refused" in row:
            table.add_row(*cells, row["refused"])
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        figures = (row["ms"], row["cpu_ms"], row["clips_per_s"])
        table.add_row(*cells, *(f"{figure:.2f}" for figure in figures), f"{row['tokens_per_s']:.0f}", mfu)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    command.finish("throughput", {"conditions": taken, "rows": rows}, options)
    return 0


if __name__ == "__main__":
    command.run(main)
