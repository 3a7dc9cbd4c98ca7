"""Where a training step spends its time: ``python -m bench.profile``.

Launches, waits of the host, calls that read a tensor's value, top operators; ``--trace FILE`` writes what
chrome://tracing and Perfetto show.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from bench import arms, command, conditions

READS = ("aten::item", "aten::nonzero", "aten::is_nonzero", "aten::_local_scalar_dense")
"""Operators that need a tensor's value on the host: on a GPU each is a wait."""

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")

STEP = "the profiled step"
"""Name of the range around it: what the profiler itself does before and after, waits among it, is not the step's."""

BACKWARD = re.compile("backward|[bB]wd|bprop|cutlassB")
"""In the names of attention's backward: PyTorch's operators, flash, FlashAttention-3, cuDNN, efficient."""

OPTIMIZER = "Optimizer.step"
"""Begins the name of the range that torch puts around an optimizer's step."""


@dataclass(frozen=True)
class Counts:
    """What happened in one step."""

    reads: int
    """Calls of :data:`READS`, those inside the optimizer's step left out."""
    reads_by_optimizer: int
    """torch's fused AdamW on the CPU reads its found_inf and its step counters, once for each tensor: host memory, no
    wait. On a GPU it reads nothing."""
    waits: int
    """Calls of the CUDA runtime in which the host waits."""
    launches: int
    """Kernels and graphs that the host launched."""
    operators: int
    """Calls of PyTorch operators."""


def profiled(step: Callable[[], object], device: torch.device) -> torch.profiler.profile:
    """The profile of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function(STEP):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    return profile


def _in_optimizer(event: FunctionEvent) -> bool:
    parent: FunctionEvent | None = event
    while parent is not None:
        if parent.name.startswith(OPTIMIZER):
            return True
        parent = parent.cpu_parent
    return False


def count(profile: torch.profiler.profile) -> Counts:
    """Count what :class:`Counts` says, in all threads, from the start of the step to its end."""
    on_host = [event for event in profile.events() or [] if event.device_type == DeviceType.CPU]
    (whole,) = (event.time_range for event in on_host if event.name == STEP)
    events = [event for event in on_host if whole.start <= event.time_range.start <= whole.end]
    names: Counter[str] = Counter(event.name for event in events)
    reads = [_in_optimizer(event) for event in events if event.name in READS]
    return Counts(
        reads=reads.count(False),
        reads_by_optimizer=reads.count(True),
        waits=sum(names[name] for name in WAITS),
        launches=sum(names[name] for name in LAUNCHES),
        operators=sum(number for name, number in names.items() if name.startswith(("aten::", "adamae_fast::"))),
    )


def attention_that_ran(profile: torch.profiler.profile, device: torch.device) -> dict[str, int]:
    """Calls of fused attention's forward by name: kernels on a GPU, whoever launched them; operators on a CPU."""
    where = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    pattern = re.compile(r"flash|fmha|sdpa|attn" if device.type == "cuda" else r"^aten::_scaled_dot_product_")
    names = [event.name for event in profile.events() or [] if event.device_type == where]
    forward = [name for name in names if pattern.search(name) and not BACKWARD.search(name)]
    return dict(Counter(re.split(r"[<(]", name.removeprefix("void "))[0] for name in forward))


def top_operators(profile: torch.profiler.profile, device: torch.device, number: int = 15) -> list[dict[str, Any]]:
    """What took longest itself, operators on a CPU, kernels and copies on a GPU: name, milliseconds, calls, share."""
    on_gpu = device.type == "cuda"
    averages = [average for average in profile.key_averages() if average.key != STEP]
    if on_gpu:  # where the time of kernels is told again of the operators that launched them, and of ranges around them
        averages = [x for x in averages if x.device_type == DeviceType.CUDA and not x.is_user_annotation]
    rows = [(x.self_device_time_total if on_gpu else x.self_cpu_time_total, x.key, x.count) for x in averages]
    total = sum(micro for micro, _, _ in rows) or 1
    return [
        {"operator": key, "ms": round(micro / 1000, 3), "calls": calls, "share": round(micro / total, 4)}
        for micro, key, calls in sorted(rows, reverse=True)[:number]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Profile arms, print, write."""
    parser = command.parser("profile", __doc__)
    parser.add_argument("--arm", nargs="+", metavar="NAME", help="arms of bench.step (default: ours-none)")
    parser.add_argument("--batch", type=int, help="clips of a step")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the trace of the last arm as JSON")
    options = parser.parse_args(arguments)
    setting = command.setting_of(options, options.batch)
    taken = conditions.collect(setting.device)
    build, skipped = arms.builders(setting, arms.plan_for(setting.device, command.checkout_of(options)))
    names = options.arm or ["ours-none"]
    if unknown := [name for name in names if name not in build]:
        reasons = "; ".join(f"{name}: {skipped.get(name, 'no such arm')}" for name in unknown)
        raise ValueError(f"--arm: {reasons}; choose from {', '.join(build)}")
    console = Console()
    rows = []
    with command.progress(len(names)) as (say, advance):
        for name in names:
            say(f"{name}: profile")
            arm = build[name]()
            for _ in range(arms.WARM_UP if setting.device.type == "cuda" else 1):
                arm.step()
            profile = profiled(arm.step, setting.device)
            top = top_operators(profile, setting.device)
            rows.append({"arm": name, **asdict(count(profile)), "top": top})
            if options.trace:
                profile.export_chrome_trace(str(options.trace))
            table = Table("operator", "ms", "calls", "share", title=name)
            for row in top:
                table.add_row(escape(row["operator"]), f"{row['ms']:.2f}", str(row["calls"]), f"{row['share']:.1%}")
            console.print(table)
            advance()
    command.finish("profile", {"conditions": taken, "batch": setting.batch_size, "rows": rows}, options)
    return 0


if __name__ == "__main__":
    command.run(main)
