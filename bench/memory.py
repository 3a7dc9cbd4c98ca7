"""The memory column of the paper's Table 1, ours beside the published code: ``python -m bench.memory``.

On a GPU: the allocated peak of a step at batch 16, as the paper's, and the largest batch that fits. Without one: bytes
kept for the backward, counted by saved-tensor hooks on the CPU in fp32 and predicted from the configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adamae_fast.config import Recompute, SamplerConfig
from adamae_fast.plan import work
from bench import arms, command, conditions, predict, table1
from bench.arms import Builder, Setting
from bench.checkout import Checkout
from bench.saved import CASTS, saved_bytes
from bench.step import give_back_unused, memory_on_gpu
from bench.table1 import Case

GIB = 2**30


CASES = tuple(case for case in table1.CASES if case.paper_gib is not None)
"""Table 1 (a), (b), (c), (f): those for which the paper states memory."""

QUICK_CASES = ("adaptive 95 %", "tube 75 %", "8 blocks", "MLP")

OURS: tuple[Recompute, ...] = ("none", "pointwise", "fc1")
"""Policies that are shown."""

PUBLISHED_GUESS = 96
"""Clips of the published code that should fit into 80 GB."""


def shrunk(case: Case) -> Case:
    """The same case of a tiny model."""
    model = dataclasses.replace(case.model, size="nano", frame_size=command.TINY[0].frame_size)
    return dataclasses.replace(case, model=model, mask=dataclasses.replace(case.mask, ratio=min(case.mask.ratio, 0.9)))


def setting_of(case: Case, setting: Setting, batch_size: int) -> Setting:
    """The case on the device of ``setting``."""
    return dataclasses.replace(setting, model=case.model, mask=case.mask, batch_size=batch_size)


def arms_of(setting: Setting, checkout: Checkout | None) -> tuple[str, dict[str, Builder]]:
    """Name of the baseline, and how to build it, as "published", and the policies of :data:`OURS`.

    The baseline is the published code where it can do the case, else its stand-in; in the published precision.
    """
    can_do = setting.mask.strategy == "adaptive" and setting.model.sampler == SamplerConfig()
    plan = arms.plan_for(setting.device, checkout if can_do else None)
    build, _ = arms.builders(setting, plan)
    name = f"published{'-like' if plan.checkout is None else ''}-{plan.precisions[0]}"
    return name, {"published": build[name], **{f"ours-{policy}": build[f"ours-{policy}"] for policy in OURS}}


def on_gpu(case: Case, setting: Setting, checkout: Checkout | None) -> dict[str, Any]:
    """Allocated peaks in bytes, and the prediction of ours."""
    name, build = arms_of(setting, checkout)
    row: dict[str, Any] = {"published_arm": name}
    for arm, builder in build.items():
        try:
            row[arm] = memory_on_gpu(builder)["allocated_bytes"]
        except torch.cuda.OutOfMemoryError:
            row[arm] = "out of memory"
    for policy in OURS:
        row[f"predicted-{policy}"] = work.device_bytes(case.model, case.mask, policy, setting.batch_size)
    return row


def on_cpu(case: Case, setting: Setting, checkout: Checkout | None) -> dict[str, Any]:
    """Bytes kept a clip, counted and predicted, and the prediction of a GPU's peak."""
    name, build = arms_of(setting, checkout)
    row: dict[str, Any] = {"published_arm": name}

    def counted(name: str) -> int:
        give_back_unused()  # arms refer to themselves: without it those of all cases would be there at the end
        arm = build[name]()
        kept = saved_bytes(arm.model, arm.keep)
        kept.pop(CASTS, None)
        return round(kept.total() / setting.batch_size)

    row["published"] = counted("published")
    row["predicted-published"] = predict.kept_bytes_published(case.model, case.mask)
    once = work.kept_bytes_once(case.model, case.mask) / setting.batch_size
    for policy in OURS:
        row[f"ours-{policy}"] = counted(f"ours-{policy}")
        row[f"predicted-{policy}"] = round(work.kept_bytes(case.model, case.mask, policy).total() + once)
        row[f"gpu-predicted-{policy}"] = work.device_bytes(case.model, case.mask, policy, 16)
    return row


PRECISION = 32
"""The largest batch is found to this part of it; each try costs a model and three steps."""


def fits(build: Builder) -> bool:
    """Whether three steps run without running out of memory."""
    give_back_unused()
    try:
        arm = build()
        for _ in range(3):
            arm.step()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that fits, by bisection; 0: none. ``guess`` only saves tries."""
    low, high = 0, max(guess, 1)
    while fits(high):
        low, high = high, high + max(high // 8, 1)
    while low == 0 and high > 1:  # the guess was too much: down in small steps, too
        lower = high - max(high // 8, 1)
        low, high = (lower, high) if fits(lower) else (0, lower)
    while high - low > max(low // PRECISION, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batches(options: argparse.Namespace, setting: Setting, checkout: Checkout | None) -> dict[str, Any]:
    """Of the published code and of ours: tried on a GPU, predicted without one."""
    limit = int(options.memory_gb * 1e9)
    found: dict[str, Any] = {"memory_gb": options.memory_gb, "how": "predicted"}
    for policy in OURS:

        def predicted(batch: int, policy: Recompute = policy) -> bool:
            return work.device_bytes(setting.model, setting.mask, policy, batch) <= limit

        found[f"ours-{policy}"] = largest(predicted, 64)
    if setting.device.type == "cpu":
        return found
    found["how"] = f"tried, to 1/{PRECISION}"
    total = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        for name in ("published", *(f"ours-{policy}" for policy in OURS)):

            def tried(batch: int, name: str = name) -> bool:
                at = dataclasses.replace(setting, batch_size=batch)
                return fits(arms_of(at, checkout)[1][name])

            found[name] = largest(tried, found.get(name, PUBLISHED_GUESS))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def print_table(rows: list[dict[str, Any]], *, gpu: bool) -> None:
    """What a person reads."""
    unit, scale = ("GiB", GIB) if gpu else ("MB a clip", 1e6)
    table = Table("Table 1", "case", "paper, GiB", f"published, {unit}", *(f"ours {policy}" for policy in OURS), "arm")
    for row in rows:
        values = [row["published"], *(row[f"ours-{policy}"] for policy in OURS)]
        shown = [f"{value / scale:.2f}" if isinstance(value, int) else value for value in values]
        table.add_row(row["part"], row["case"], str(row["paper_gib"]), *shown, row["published_arm"])
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure or count, print, write; return 1 if anything was refused."""
    parser = command.parser("memory", __doc__)
    parser.add_argument("--memory-gb", type=float, default=80.0, help="memory for the largest batch")
    parser.add_argument("--no-largest", action="store_true", help="leave out the largest batch")
    options = parser.parse_args(arguments)
    checkout, first = command.checkout_of(options), command.setting_of(options)
    gpu = first.device.type == "cuda"
    taken = conditions.collect(first.device)
    cases = [shrunk(case) for case in CASES if case.name in QUICK_CASES] if options.quick else list(CASES)
    rows: list[dict[str, Any]] = []
    done: dict[Any, dict[str, Any]] = {}
    with command.progress(len(cases)) as (say, advance):
        for case in cases:
            say(f"{case.part}, {case.name}")
            key = (case.model, case.mask)
            if key not in done:  # the default stands in four parts of the table
                setting = setting_of(case, first, 16 if gpu and not options.quick else 2)
                done[key] = on_gpu(case, setting, checkout) if gpu else on_cpu(case, setting, checkout)
            rows.append({"part": case.part, "case": case.name, "paper_gib": case.paper_gib, **done[key]})
            advance()
        if not options.no_largest:
            say("largest batch")
    result = {
        "conditions": taken,
        "what": "allocated peak at batch 16" if gpu else "kept for the backward, for each clip, fp32 at batch 2",
        "rows": rows,
        "largest_batch": None,
    }
    if not options.no_largest:
        command.write("memory", result, options)  # the search takes a while and may be cut off
        result["largest_batch"] = largest_batches(options, first, checkout)
    print_table(rows, gpu=gpu)
    command.finish("memory", result, options)
    return 0


if __name__ == "__main__":
    command.run(main)
