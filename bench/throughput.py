"""Clips and tokens a second against batch size and masking strategy: ``python -m bench.throughput``.

Clips are on the device already: what the data path delivers is another figure.
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


def measure(setting: Setting, name: str, timing: Plan) -> dict[str, Any]:
    """One arm at one batch size; a batch that does not fit is a result, too."""
    row: dict[str, Any] = {
        "arm": name,
        "strategy": setting.mask.strategy,
        "ratio": setting.mask.ratio,
        "batch": setting.batch_size,
    }
    gc.collect()
    try:
        arm = arms.builders(setting, arms.plan_for(setting.device, None))[0][name]()
        result = run_in_turns({name: arm.runner(timing.warm_up)}, timing)[name]
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {**row, "refused": "out of memory"}
    return {**row, **timing_row(result, setting, conditions.device_name(setting.device))}


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
    rows = []
    with command.progress(len(masks) * len(batches)) as (say, advance):
        for mask in masks:
            for batch in batches:
                say(f"{mask.strategy} {mask.ratio}, batch {batch}")
                setting = dataclasses.replace(first, mask=mask, batch_size=batch)
                rows.append(measure(setting, options.arm, timing))
                advance()
    table = Table("strategy", "ratio", "batch", "ms", "clips/s", "tokens/s", "MFU")
    for row in rows:
        cells = [row["strategy"], str(row["ratio"]), str(row["batch"])]
        if "refused" in row:
            table.add_row(*cells, row["refused"])
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        table.add_row(*cells, f"{row['ms']:.1f}", f"{row['clips_per_s']:.1f}", f"{row['tokens_per_s']:.0f}", mfu)
    Console().print(table)
    command.finish("throughput", {"conditions": taken, "rows": rows}, options)
    return 0


if __name__ == "__main__":
    command.run(main)
