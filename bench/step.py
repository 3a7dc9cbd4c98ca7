"""A whole training step, all arms in turns in one process: ``python -m bench.step``.

Arms: the published code from a checkout (``--published``), an independent stand-in of the same operations, tuned
PyTorch, the same compiled, and ours with each recompute policy, with and without a CUDA graph. Every arm has to give
the loss and the gradients of our reference before it is timed. Clips are on the device already. With ``--task
finetune``: classifiers over all tokens (``bench/finetune_arms.py``), ours with each attention back end, too.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamae_fast.ops import library, triton_kernels
from adamae_fast.plan import work
from bench import arms, command, conditions, finetune_arms, predict
from bench.arms import Arm, Builder, Setting, Skipped
from bench.parity import Parity, PretrainParity
from bench.peak import peak_extra_bytes
from bench.profile import attention_that_ran, count, profiled
from bench.saved import CASTS, saved_bytes
from bench.timing import Plan, Timing, run_in_turns

PLANS = {"cpu": Plan(warm_up=2, rounds=6, block=2), "cuda": Plan(warm_up=20, rounds=20, block=5)}
QUICK = Plan(warm_up=1, rounds=2, block=1)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained."""

    name: str
    """Of the result file."""
    builders: Callable[[Setting, arms.Plan], tuple[dict[str, Builder], Skipped]]
    parity: Callable[[Setting], Parity]
    flops: Callable[[Setting], int]
    """Of one clip, forward and backward."""
    batches: Mapping[str, list[int]]
    """By the kind of device, where ``--batch`` gives none."""

    def describe(self, setting: Setting) -> str:
        """The model in words."""
        model = setting.model
        clip = f"{model.size}, {model.num_frames}×{model.frame_size}²"
        if self is PRETRAIN:
            return f"{clip}, ratio {setting.mask.ratio}"
        return f"classifier {clip}, {finetune_arms.NUM_CLASSES} classes, drop path {finetune_arms.DROP_PATH}"


PRETRAIN = Task(
    name="step",
    builders=arms.builders,
    parity=PretrainParity,
    flops=lambda setting: work.step_flops(setting.model, setting.mask),
    batches={"cpu": [2], "cuda": [16, 32]},
)
TASKS = {
    "pretrain": PRETRAIN,
    "finetune": Task(
        name="finetune_step",
        builders=finetune_arms.builders,
        parity=finetune_arms.FinetuneParity,
        flops=lambda setting: work.classifier_flops(setting.model, finetune_arms.NUM_CLASSES),
        batches={"cpu": [1], "cuda": [16]},
    ),
}


def check_parity(arm: Arm, parity: Parity) -> str | None:
    """Why an arm must not be timed; any failure is a reason."""
    try:
        return parity.fault(arm)
    except Exception as error:  # a compiler or a kernel may fail in any way; the others are measured
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def give_back_unused() -> None:
    """Free what nothing refers to, and give memory that the allocator keeps back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def memory_on_gpu(build: Builder, parity: Parity | None = None) -> Row:
    """Allocated and reserved peak of one arm alone, in the last step of its warm-up.

    The optimizer's moments exist by then, and a graph is recorded in that step: its pool is allocated there and never
    again. What the parity's fp32 had reserved is given back before.
    """
    give_back_unused()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    arm = build()
    if parity is not None and (fault := check_parity(arm, parity)):
        return {"refused": fault}
    give_back_unused()
    for _ in range(arms.WARM_UP - 1):
        arm.step()
    torch.cuda.reset_peak_memory_stats()
    arm.step()
    torch.cuda.synchronize()
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated() - allocated,
        "reserved_bytes": torch.cuda.memory_reserved() - reserved,
        "process_bytes": _process_bytes(),
    }


def _process_bytes() -> int:
    """Of the whole GPU, all processes and the CUDA context counted."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def memory_on_cpu(arm: Arm) -> Row:
    """Bytes kept for the backward, and the peak of a step beyond what was there before it."""
    arm.step()  # makes the optimizer's moments
    kept = saved_bytes(arm.model, arm.keep)
    casts = kept.pop(CASTS, 0)
    arm.model.zero_grad(set_to_none=True)
    return {
        "saved_bytes_per_clip": round(kept.total() / arm.setting.batch_size),
        "casts_bytes": casts,
        "peak_extra_bytes": peak_extra_bytes(arm.step, arm.setting.device),
    }


def timing_row(timing: Timing, setting: Setting, device_name: str, task: Task = PRETRAIN) -> Row:
    """Milliseconds by the clock and of CPU time, clips and tokens a second, share of the peak where that is known."""
    clips = setting.batch_size / timing.median
    flops, peak = task.flops(setting), predict.peak_flops(device_name)
    return {
        "ms": round(timing.median * 1e3, 3),
        "ms_p20": round(timing.p20 * 1e3, 3),
        "ms_p80": round(timing.p80 * 1e3, 3),
        "steps": timing.num_calls,
        "cpu_ms": None if timing.cpu is None else round(timing.cpu * 1e3, 3),
        "clips_per_s": round(clips, 3),
        "tokens_per_s": round(clips * work.grid_of(setting.model).num_tokens, 1),
        "mfu": None if peak is None else round(clips * flops / peak, 4),
    }


def backends_of(arm: Arm, profile: torch.profiler.profile) -> Row:
    """What ran: fused attention by the profile of a step; of ours, the choice for each part, and the operations."""
    row: Row = {"attention_ran": attention_that_ran(profile, arm.setting.device)}
    if isinstance(arm, arms.OurArm):
        on_gpu = arm.setting.device.type == "cuda"
        missing = triton_kernels.reason_missing() if on_gpu else library.reason_missing
        row["attention"] = dict(arm.stepper.attention_backends)
        row["operations"] = "reference" if missing else "triton" if on_gpu else "cpp"
    return row


def measure(
    task: Task, setting: Setting, plan: arms.Plan, timing: Plan, say: command.Say, only: list[str] | None = None
) -> tuple[list[Row], Skipped]:
    """Parity, memory, counts, time of every arm that can be built, or of those named in ``only``."""
    build, skipped = task.builders(setting, plan)
    if only:
        if unknown := [name for name in only if name not in build]:
            raise ValueError(f"--arm: {', '.join(unknown)} cannot be measured here; choose from {', '.join(build)}")
        build = {name: build[name] for name in build if name in only}
    say("parity: the reference")
    parity = task.parity(setting)
    rows: dict[str, Row] = {}
    on_gpu = setting.device.type == "cuda"
    built: dict[str, Arm] = {}
    for name in build:
        say(f"{name}: parity" + (" and memory" if on_gpu else ""))
        try:
            row = memory_on_gpu(build[name], parity) if on_gpu else {}
            if "refused" not in row:
                built[name] = build[name]()
                fault = None if on_gpu else check_parity(built[name], parity)
                row |= {"refused": fault} if fault else {}
        except Exception as error:
            row = {"refused": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        if "refused" in row:
            skipped[name] = str(row["refused"])
            built.pop(name, None)
        else:
            rows[name] = {"arm": name, "precision": built[name].precision, "batch": setting.batch_size, **row}
    for name, arm in built.items():
        say(f"{name}: bytes and calls")
        if on_gpu:
            for _ in range(arms.WARM_UP):
                arm.step()
        else:
            rows[name] |= memory_on_cpu(arm)
        profile = profiled(arm.step, setting.device)
        rows[name] |= {**asdict(count(profile)), **backends_of(arm, profile)}
    say("timing, in turns")
    name_of_device = conditions.device_name(setting.device)
    timings = run_in_turns({name: arm.runner(timing.warm_up) for name, arm in built.items()}, timing)
    for name, result in timings.items():
        rows[name] |= timing_row(result, setting, name_of_device, task)
    return list(rows.values()), skipped


def baseline(rows: list[Row]) -> str | None:
    """The arm that speed-ups are quoted against: the published code, as it is; else its stand-in."""
    names = [row["arm"] for row in rows]
    return next((name for name in names if name.startswith("published") and "like" not in name), None) or next(
        (name for name in names if name.startswith("published-like")), None
    )


def speedups(rows: list[Row]) -> dict[str, float]:
    """How many times as fast as the baseline."""
    base = baseline(rows)
    if base is None:
        return {}
    times: dict[str, float] = {row["arm"]: row["ms"] for row in rows}
    return {name: round(times[base] / ms, 3) for name, ms in times.items()}


def with_other_batches(result: Row, options: argparse.Namespace) -> Row:
    """The result, beside rows of other batches that the file has of the same commit, versions, model and checkout."""
    path = command.result_path(TASKS[options.task].name, result, options)
    before = json.loads(path.read_text()) if path and path.is_file() else None

    def what(result: Row) -> Row:
        taken = {key: value for key, value in result["conditions"].items() if key not in ("date", "load")}
        return {**taken, **{key: result[key] for key in ("model", "published_checkout")}}

    rows, skipped = result["rows"], result["skipped"]
    if before and what(before) == what(result):
        batches = {row["batch"] for row in rows}
        rows = [row for row in before["rows"] if row["batch"] not in batches] + rows
        skipped = before["skipped"] | skipped
    rows.sort(key=lambda row: row["batch"])
    by_batch = groupby(rows, key=lambda row: row["batch"])
    faster = {str(batch): speedups(list(same)) for batch, same in by_batch}
    return {**result, "rows": rows, "skipped": skipped, "speedup_over": baseline(rows), "speedup": faster}


def print_table(rows: list[Row], skipped: Mapping[str, str]) -> None:
    """What a person reads."""
    faster = speedups(rows)
    table = Table("arm", "ms [p20, p80]", f"× {baseline(rows)}", "clips/s", "MB", "reads", "waits", "launches")
    for row in rows:
        num_bytes = row["allocated_bytes"] if "allocated_bytes" in row else row["saved_bytes_per_clip"]
        table.add_row(
            row["arm"],
            f"{row['ms']:.1f} [{row['ms_p20']:.1f}, {row['ms_p80']:.1f}]",
            f"{faster[row['arm']]:.2f}" if faster else "",
            f"{row['clips_per_s']:.2f}",
            f"{num_bytes / 1e6:.1f}",
            str(row["reads"]),
            str(row["waits"]),
            str(row["launches"]),
        )
    for name, reason in skipped.items():
        table.add_row(name, escape(reason))
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    console.print("MB: allocated peak on a GPU, kept for the backward a clip on a CPU", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; return command.REFUSED if an arm failed its parity."""
    parser = command.parser("step", __doc__)
    parser.add_argument("--task", choices=TASKS, default="pretrain", help="what is trained (default: pretrain)")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        help="clips of a step (default: 2 on a CPU; 16 and 32 on a GPU; of finetune 1, and 16)",
    )
    parser.add_argument("--arm", nargs="+", metavar="NAME", help="only these arms")
    parser.add_argument("--rounds", type=int, help="rounds in which every arm takes its turn")
    options = parser.parse_args(arguments)
    checkout = command.checkout_of(options)
    first = command.setting_of(options)
    device = first.device
    taken = conditions.collect(device)
    timing = QUICK if options.quick else PLANS[device.type]
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds}: choose at least 1 round")
    if options.rounds:
        timing = Plan(warm_up=timing.warm_up, rounds=options.rounds, block=timing.block)
    if options.quick and device.type == "cpu":
        arms.COMPILE_BACKEND = "aot_eager"  # the same graphs, without a minute of building
    task = TASKS[options.task]
    batches = options.batch or ([2] if options.quick else task.batches[device.type])
    rows: list[Row] = []
    skipped: Skipped = {}
    with command.progress(len(batches)) as (say, advance):
        for batch in batches:
            setting = command.setting_of(options, batch)

            def say_batch(what: str, batch: int = batch) -> None:
                say(f"batch {batch}: {what}")

            measured, refused = measure(task, setting, arms.plan_for(device, checkout), timing, say_batch, options.arm)
            rows += measured
            skipped |= refused
            advance()
    for batch in batches:
        print_table([row for row in rows if row["batch"] == batch], skipped)
    result = {
        "conditions": taken,
        "published_checkout": checkout.commit if checkout else None,
        "model": task.describe(first),
        "gflop_per_clip": round(task.flops(first) / 1e9, 1),
        "rows": rows,
        "skipped": skipped,
    }
    command.finish(task.name, with_other_batches(result, options), options)
    harmless = ("not measured", "this version has no option")
    return command.REFUSED if any(not reason.startswith(harmless) for reason in skipped.values()) else 0


if __name__ == "__main__":
    command.run(main)
