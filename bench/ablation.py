"""The paper's Table 1 in miniature: ``python -m bench.ablation --preset cpu``.

Videos are those of the rendered action set (``adamae_fast/data/actions.py``), whose classes differ in motion alone, or
of the preset's choice of its classes. Every row of the table (``bench/table1.py``) is pre-trained with the same budget
but for (e), then fine-tuned and probed by one recipe each, with each of the seeds. One more row, "scratch", says what
the recipes reach without pre-training, and part (g) what else might make the sampler learn from little data.

Figures of a run, all of the validation videos, whose looks no training video has:

* **fine-tuned**: top-1 after the last step, on the centre clip of each video;
* **probe**: top-1 of a linear head on frozen, pooled features, the best of its learning rates;
* **adaptivity**: how much more often visible tokens lie on what moves than tokens do (``report/adaptivity.py``);
* **adaptivity of the error**: how much more of the masked tokens' error lies on what moves than of these tokens do,
  which is what p would have at rest, proportional to the error (paper, Eq. 5);
* **entropy** of the sampler's p over ln N: 1 is uniform.

Runs share the cores of a CPU, one thread each, so that their figures do not depend on how many run at once: the same
command gives the same CSV. Every training is done once: stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from adamae_fast.config import (
    load_config,
)
from adamae_fast.data.manifest import read_manifest
from adamae_fast.errors import RunStoppedError
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.pictures import Panel, draw_strip, strip_columns
from adamae_fast.report.visualize import picture_clip, read_center_clip
from adamae_fast.run_folder import RunFolder
from bench import command, conditions, table1
from bench.ablation_runs import (
    PRESETS,
    ROWS,
    Job,
    Preset,
    pretraining_recipe,
    run,
)
from bench.results import Row
from bench.trainings import action_videos

SEEDS = (0, 1, 2)
PARTS = tuple(dict.fromkeys(case.part[1] for case in ROWS if case.part.startswith("(")))
"""Their letters."""

COLUMNS = (
    "part", "case", "seed", "visible", "tokens", "top1", "probe", "adaptivity", "untrained", "error_adaptivity",
    "entropy", "clamped", "error", "kept_bytes", "kept_bytes_vitb", "settings",
)  # fmt: skip
"""Of the CSV: what the seed decides, and nothing that a clock does."""


def prepare(preset: Preset, folder: Path) -> Path:
    """Render the videos, and list those that each part reads; return where they are in ``folder``."""
    share = preset.num_val / preset.num_videos
    videos = action_videos(
        folder, preset.num_videos, pretraining_recipe(), 0, share, classes=list(preset.classes), detail=preset.detail
    )
    lines = (videos / "train.txt").read_text().splitlines(keepends=True)
    (videos / "train-passes.txt").write_text("".join(lines) * preset.passes)
    (videos / "probe.txt").write_text("".join(lines[: preset.probe_videos]))
    return videos


PICTURED = ("adaptive 95 %", "random 90 %", "tube 90 %", "frame 87.5 %")
"""Rows of part (a) whose masks are drawn, with the first seed."""


def mask_picture(jobs: Sequence[Job]) -> Image.Image:
    """The masks of ``jobs`` on the first video for validation, below it and what a sampler of the first one says."""
    panels: list[Panel] = []
    for job in jobs:
        folder = job.folder / "pretrain"
        config, model = load_config(RunFolder(folder).config), AdaMAE.from_pretrained(folder)
        entry = read_manifest(str(job.videos / "val.txt"))[0]
        clip = read_center_clip(entry, config)
        drawn = {panel.name: panel for panel in picture_clip(model, clip.video_CTHW, mask_seed=0)}
        if not panels:
            panels = [drawn[name] for name in ("Input", "Probability") if name in drawn]
        panels.append(replace(drawn["Mask"], name=job.case.mask.strategy))
    return draw_strip(panels, strip_columns(model.grid), frame_ids=clip.frame_ids.tolist())


def cases_of(options: argparse.Namespace) -> list[table1.Case]:
    """The rows that were asked for. Raises ValueError for one that is not there."""
    cases = list(ROWS)
    if options.part is not None:
        cases = [case for case in cases if case.part[:3] == f"({options.part.strip('()')})"]
        if not cases:
            raise ValueError(f"--part {options.part}: choose one of {', '.join(PARTS)}")
    if options.only:
        known = dict.fromkeys(case.name for case in cases)
        if missing := set(options.only) - set(known):
            asked, there = (", ".join(f'"{name}"' for name in names) for names in (sorted(missing), known))
            raise ValueError(f"--only {asked}: no row of the table or of this part of it; choose from {there}")
        cases = [case for case in cases if case.name in options.only]
    return cases


Outcome = dict[str, Any] | Exception
"""What :func:`run` found, or why it could not."""


def carry_out(jobs: Sequence[Job], processes: int, budget: float | None) -> Iterator[tuple[Job, Outcome]]:
    """Yield each job with its outcome, those done before first, the others as they end.

    After ``budget`` seconds, no other one is begun. What ends one job with an error, such as a loss that is no
    number any more, keeps none of the others from being carried out. Raises RunStoppedError where a process was killed.
    """
    end = time.monotonic() + (math.inf if budget is None else budget)
    waiting = []
    for job in {job.folder: job for job in jobs}.values():
        if job.row.is_file():
            yield job, run(job)
        else:
            waiting.append(job)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent) as pool:
        running: dict[Future[dict[str, Any]], Job] = {}
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < processes and time.monotonic() < end:
                job = waiting.pop(0)
                running[pool.submit(run, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                outcome: Outcome
                try:
                    outcome = future.result()
                except BrokenProcessPool as error:
                    raise RunStoppedError(
                        f"a process was killed, for want of memory perhaps: lower --processes {processes}; the same "
                        "command goes on"
                    ) from error
                except Exception as error:  # whatever it is, the other runs have nothing to do with it
                    outcome = error
                yield job, outcome


def _end_with_parent() -> None:
    """Let this process of the pool save what it does and end soon after the command itself was killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        while True:  # the first signal ends a training, which saves; another one the process, which would wait for work
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    threading.Thread(target=watch, daemon=True).start()


def rows_of(jobs: Sequence[Job], found: dict[Path, dict[str, Any]]) -> list[Row]:
    """Lines of the CSV."""
    rows = []
    for job in jobs:
        if (figures := found.get(job.folder)) is None:
            continue
        row = {"part": job.case.part, "case": job.case.name, "seed": str(job.seed), "settings": job.settings}
        for key in COLUMNS:
            if key not in row:
                value = figures[key]
                row[key] = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
        rows.append({key: row[key] for key in COLUMNS})
    return rows


RowT = TypeVar("RowT", bound=Mapping[str, Any])


def merged(before: Sequence[RowT], rows: Sequence[RowT], settings: Mapping[tuple[str, str], str]) -> list[RowT]:
    """The rows, beside those from ``before`` that were not measured now, in the table's order.

    ``settings``: those of each row of the table as it is; what was measured with others is dropped.
    """

    def name(row: RowT) -> tuple[str, str]:
        return row["part"], row["case"]

    measured = {(*name(row), int(row["seed"])) for row in rows}
    kept = [row for row in before if settings.get(name(row)) == row["settings"]]
    kept = [row for row in kept if (*name(row), int(row["seed"])) not in measured]
    order = list(settings)
    return sorted([*kept, *rows], key=lambda row: (order.index(name(row)), int(row["seed"])))


def read_csv(path: Path) -> list[Row]:
    """What is committed; nothing where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write the file as it is committed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation",
        description="The paper's Table 1 in miniature: pre-train, fine-tune and probe every row with every seed, on "
        "rendered videos. Stopped at any moment, the same command goes on. docs/ablation.md shows what came out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    presets = [name for name in PRESETS if name != "quick"]
    parser.add_argument("--preset", choices=presets, default="cpu", help="how much is spent on a run, and where")
    parser.add_argument(
        "--quick", action="store_true", help="28 videos, 2 steps a run, for tests; writes results only with --out"
    )
    parser.add_argument("--part", metavar="a", help="only rows of this part of the table, a to g")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only rows of these names")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of all draws of a run")
    parser.add_argument("--work", type=Path, help="folder of videos and runs (default: runs/ablation-PRESET)")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
    parser.add_argument("--processes", type=int, help="runs at once (default: one for each core; 4 on a GPU)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no run after so long; call again")
    options = parser.parse_args(arguments)
    if options.quick:
        options.preset = "quick"
    options.work = options.work or Path(f"runs/ablation-{options.preset}")
    cores = len(os.sched_getaffinity(0))
    if options.processes is None:
        options.processes = 4 if PRESETS[options.preset].device == "cuda" else cores
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes}: choose at least 1")
    if min(options.seeds) < 0:
        raise ValueError(f"--seeds {min(options.seeds)}: choose 0 or more")
    for key in ("work", "out"):
        command.make_folder(f"--{key}", getattr(options, key))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Render, train, measure, write; return 1 while rows are missing."""
    options = options_of(arguments)
    preset = PRESETS[options.preset]
    taken = conditions.collect(torch.device(preset.device)) | {"cores": str(len(os.sched_getaffinity(0)))}
    cases = cases_of(options)
    found: dict[Path, dict[str, Any]] = {}
    failed: list[str] = []
    videos = prepare(preset, options.work)
    # The rows of a seed before those of the next.
    jobs = [Job(case, seed, preset, options.work, videos) for seed in options.seeds for case in cases]
    num_runs = len({job.folder for job in jobs})
    with command.progress(num_runs) as (say, advance):
        say(f"{num_runs} runs, {options.processes} at once")
        try:
            for job, outcome in carry_out(jobs, options.processes, options.budget):
                what = f"{job.case.part} {job.case.name}, seed {job.seed}"
                if isinstance(outcome, Exception):
                    failed.append(f"{what}: {type(outcome).__name__}: {outcome}")
                else:
                    found[job.folder] = outcome
                    say(f"{what}: top-1 {outcome['top1']:.1%}")
                advance()
        except RunStoppedError as error:
            failed.append(str(error))
    for message in failed:
        print(f"failed: {message}", file=sys.stderr)
    if not found:
        raise RunStoppedError("no run is done, so nothing was written; the same command goes on")
    result = {
        "conditions": taken,
        "preset": options.preset,
        "budget": asdict(preset),
        "num_frames": pretraining_recipe().model.num_frames,
        "processes": options.processes,
        "rows": [
            {
                "part": job.case.part,
                "case": job.case.name,
                "seed": job.seed,
                "settings": job.settings,
                "run": job.folder.parent.name,
                "commit": found[job.folder]["commit"],
                **found[job.folder]["seconds"],
                "curves": found[job.folder]["curves"],
            }
            for job in jobs
            if job.folder in found
        ],
    }
    name = "ablation-quick" if options.quick else "ablation"
    json_path = command.result_path(name, result, options)
    if json_path is not None:
        settings = {(case.part, case.name): Job(case, 0, preset, options.work, videos).settings for case in ROWS}
        path = json_path.with_suffix(".csv")
        before, rows = read_csv(path), rows_of(jobs, found)
        if dropped := [row for row in before if settings.get((row["part"], row["case"])) != row["settings"]]:
            print(f"note: {len(dropped)} rows of other settings leave {path}")
        write_csv(path, merged(before, rows, settings))
        print(f"written: {path}")
        if json_path.is_file():
            result["rows"] = merged(json.loads(json_path.read_text())["rows"], result["rows"], settings)
        pictured = [job for name in PICTURED for job in jobs if job.case.name == name and job.folder in found]
        firsts = [job for job in pictured if job.seed == pictured[0].seed]
        if len(firsts) == len(PICTURED):
            mask_picture(firsts).save(path.with_suffix(".png"))
            print(f"written: {path.with_suffix('.png')}")
    command.finish(name, result, options, unprinted="curves")
    return 0 if len(found) == num_runs else 1


if __name__ == "__main__":
    command.run(main)
