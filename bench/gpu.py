"""What counts most of one machine in one go, resumed where it was cut off: ``make gpu``, ``make gpu-rehearsal``.

An ordered list of steps, each a command of its own. A step that ended well for this commit is not run again, so the
same call goes on where it was cut off. It needs torch, Triton, pytest and what this package imports without the command
line's library; no package registry, no installation beyond ``setup.py build_ext --inplace``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import command, conditions

STATE = "gpu.json"

BUDGET = 540
"""Seconds; the steps' shares add up to no more."""

CUT_OFF = "cut off"

MAX_FILES = 8
"""Of the output folder, the state among them."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    command: tuple[str, ...]
    """After the interpreter."""
    share: int
    """Seconds it is expected to take; where less than half is left, it is not begun, and after twice it is cut off. The
    next call gives a step that was cut off all that the others leave."""
    allowed: tuple[int, ...] = (0,)
    """Exit statuses after which the step counts as done."""


REFUSED = (0, command.REFUSED)
"""Statuses of a step of which some arms may be refused: it says which, and why."""


def step_arms(published: str, precisions: tuple[str, ...], *, graph: bool) -> list[str]:
    """The arms of bench.step that the goals speak of; all of them would take twice as long."""
    ours = ["ours-none", "ours-fc1", *(["ours-none+graph", "ours-fc1+graph"] if graph else [])]
    return [*(f"{published}-{precision}" for precision in precisions), "tuned", *ours]


def steps(out: Path, *, rehearsal: bool, published: str | None) -> list[Step]:
    """What is run, the figures that matter most first. The seconds are estimates: none of it has run on a GPU yet."""
    common = ["--out", str(out), "--device", "cpu" if rehearsal else "cuda", *(["--quick"] if rehearsal else [])]
    baseline = ["--published", published] if published else []
    name, precisions = "published" if published else "published-like", ("fp32",) if rehearsal else ("fp16", "bf16")
    few = step_arms(name, precisions, graph=not rehearsal)
    # Those of the operations are the gates of the kernels' bench, which runs them itself; those of apex, DALI and the
    # training loop need more than is there.
    tests = ["tests/train/test_step.py", "tests/train/test_step_graph.py", "tests/ops/test_attention.py"]
    tests += ["tests/model/test_recompute.py", "tests/convergence/test_mini.py", "tests/test_device.py"]
    kernels = ["--operation", "sample_visible", "gather_tokens"] if rehearsal else []
    tuning = [f"{name}-{precisions[0]}", "tuned", "ours-none" if rehearsal else "ours-none+graph", "ours-fc1"]
    batches = ("2", "1") if rehearsal else ("32", "16")
    few_rounds = ("--rounds", "2" if rehearsal else "10")
    tune = ("--task", "finetune", *baseline, *few_rounds, "--arm", *tuning)
    profiled = "ours-none" if rehearsal else "ours-none+graph"

    def bench(name: str, *arguments: str) -> tuple[str, ...]:
        return ("-m", f"bench.{name}", *common, *arguments)

    report = ("--results", str(out), *(["--page", str(out / "page" / "results.md")] if rehearsal else []))
    plan = [
        Step("build", ("setup.py", "--quiet", "build_ext", "--inplace"), 30),
        Step(
            "step",
            bench("step", *baseline, "--batch", batches[0], *few_rounds, "--arm", *few, "tuned+compile"),
            160,
            REFUSED,
        ),
        Step(
            "step of half the batch",
            bench("step", *baseline, "--batch", batches[1], *few_rounds, "--arm", *few),
            45,
            REFUSED,
        ),
        Step("memory", bench("memory", *baseline), 90),
        Step("kernels", bench("run", "--missing", *kernels), 100, REFUSED),
        # In a rehearsal without a GPU they are collected and skipped.
        Step("tests", ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *tests), 30),
        Step("finetune", bench("step", *tune), 30, REFUSED),
        Step("throughput", bench("throughput", "--batch", batches[0]), 20, REFUSED),
        Step("profile", bench("profile", "--arm", profiled), 10),
        Step("real_decode", bench("real_decode"), 20, (0, 2)),
        Step("report", ("-m", "bench.report", *report), 5),
    ]
    # A rehearsal is about what runs, not how fast: a busy machine cuts nothing off.
    return [replace(step, share=BUDGET) for step in plan] if rehearsal else plan


def read_state(path: Path, commit: str) -> dict[str, Any]:
    """What is done for this commit; nothing where the file is of another one."""
    if path.is_file():
        state = json.loads(path.read_text())
        if state.get("commit") == commit:
            return dict(state)
    return {"command": "gpu", "commit": commit, "nvdec": conditions.nvdec(), "done": {}, "failed": {}}


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: a machine can be taken away in any line."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1) + "\n")
    part.replace(path)


def run(arguments: list[str], environment: dict[str, str], limit: float) -> int | None:
    """The exit status; None where it took longer, and then nothing that it had started goes on beside the next."""
    with subprocess.Popen(arguments, cwd=conditions.ROOT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def run_all(todo: list[Step], out: Path, budget: float, commit: str) -> dict[str, Any]:
    """Run what is not done yet, within ``budget`` seconds; return the state, which is also on disk after each step."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / STATE
    state = read_state(kept, commit)
    write_state(kept, state)
    start = time.monotonic()
    # Nothing is installed where this runs: the kernels lie in a folder of their own.
    path = os.pathsep.join([str(conditions.ROOT), str(conditions.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    for number, step in enumerate(todo):
        left = budget - (time.monotonic() - start)
        # A report costs nothing and is wanted anew whenever a figure was added.
        if step.name in state["done"] and step.name != "report":
            print(f"-- {step.name}: done before", flush=True)
            continue
        if left < step.share / 2:
            state["failed"][step.name] = f"not begun: {left:.0f} s were left"
            print(f"-- {step.name}: {state['failed'][step.name]}; call again to go on", flush=True)
            continue
        print(f"-- {step.name}: {left:.0f} s are left", flush=True)
        begun = time.monotonic()
        # Twice the share, so that one step that hangs leaves time for the others; it may just be slow.
        limit = min(left, 2 * step.share)
        if state["failed"].get(step.name, "").startswith(CUT_OFF):
            others = sum(each.share for each in todo[number + 1 :] if each.name not in state["done"])
            limit = max(limit, left - others)
        status = run([sys.executable, *step.command], environment, limit)
        problem = None if status in step.allowed else f"exit status {status}"
        if status is None:
            problem = f"{CUT_OFF} after {limit:.0f} s"
        seconds = round(time.monotonic() - begun, 1)
        if problem is None:
            state["done"][step.name] = {"seconds": seconds, "status": status}
            state["failed"].pop(step.name, None)
        else:
            state["failed"][step.name] = problem
            print(f"-- {step.name}: {problem}", flush=True)
        write_state(kept, state)
    return state


def main(arguments: list[str] | None = None) -> int:
    """Run the list; return 1 while something is left or failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--rehearsal", "--quick", action="store_true", help="the same on the CPU with tiny shapes")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
    parser.add_argument("--published", metavar="PATH", help="a checkout of the published code")
    parser.add_argument("--budget", type=float, help=f"seconds (default: {BUDGET}; of a rehearsal, an hour)")
    parser.add_argument("--commit", help="where there is no git: what is being measured")
    options = parser.parse_args(arguments)
    default = conditions.ROOT / ("build/rehearsal" if options.rehearsal else "bench/results")
    out = (options.out or default).resolve()
    if options.commit:
        os.environ["ADAMAE_COMMIT"] = options.commit
    if options.rehearsal:
        os.environ["OMP_NUM_THREADS"] = "1"  # tiny shapes gain nothing from threads, which wait for each other
    elif architecture := conditions.architecture():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architecture)  # for others the build would take its time, too
    commit = conditions.version()["commit"]
    published = str(Path(options.published).resolve()) if options.published else None
    todo = steps(out, rehearsal=options.rehearsal, published=published)
    state = run_all(todo, out, options.budget or (3600 if options.rehearsal else BUDGET), commit)
    if options.out:
        for page in out.glob("kernels_*.md"):
            page.unlink()  # the CSV says the same, and from a rented machine few files come back
    files = sorted(path.name for path in out.iterdir() if path.is_file())
    if len(files) > MAX_FILES and not options.rehearsal and options.out:
        print(f"warning: {len(files)} files in {out}; more than {MAX_FILES} may not come back from a rented machine")
    print(json.dumps({**state, "files": files}, separators=(",", ":")))
    return 1 if state["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
