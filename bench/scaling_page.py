"""``python -m bench.scaling_page``: what plans start from, and the table of plans in docs/scaling.md, written anew.

The first, ``adamae_fast/plan/calibration.json``, is taken from the files of bench/results; the second is what
``adamae-fast plan`` says. Nothing of both is typed by hand.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from adamae_fast.config import PretrainConfig, load_config
from adamae_fast.plan.calibration import PATH, Calibration, MeasuredDecode, MeasuredStep
from adamae_fast.plan.estimate import Basis
from adamae_fast.plan.hardware import GPUS, gpu_named
from adamae_fast.plan.options import PlanOptions
from adamae_fast.plan.planner import Plan, make_plan, shown
from bench.conditions import ROOT
from bench.report import RESULTS, Result, read, table

PAGE = ROOT / "docs" / "scaling.md"

MARKS = ("<!-- plans, written by python -m bench.scaling_page -->\n", "<!-- end of plans -->\n")
"""Around the table in the page."""

RECIPE = "configs/pretrain_k400_vitb.yaml"

NUM_GPUS = (8, 32, 64)

BATCH, TOTAL_BATCH = 32, 2048
"""Clips of a pass on a GPU, and of a step on all: those of the published run."""

COLUMNS = {
    "memory_bytes": "memory, GB",
    "largest_batch": "largest batch",
    "step": "step, ms",
    "exposed": "of it network, ms",
    "clips_per_s": "clips/s of a GPU",
    "decode_rate": "frames/s to decode for a GPU",
    "cores": "CPU cores for a GPU",
    "read": "read by a node, GB/s",
    "hours_alone": "hours, steps alone",
    "hours": "hours, 8 workers a GPU",
    "gpu_hours_per_epoch": "GPU hours of an epoch",
}
"""Figures of a plan that the page shows."""

DECODERS = {"ours-pyav": "pyav", "ours-decord": "decord"}
"""Arms of ``bench.data`` that are decoders of ours."""


def measured_steps(found: dict[str, list[Result]]) -> list[MeasuredStep]:
    """Ours on known GPUs."""
    return [
        MeasuredStep(
            gpu=gpu,
            arm=row["arm"],
            batch=row["batch"],
            seconds=row["ms"] / 1e3,
            allocated_bytes=row["allocated_bytes"],
            source=_source(result),
        )
        for result in found.get("step", [])
        if not result["quick"] and (gpu := gpu_named(result["conditions"]["device"])) is not None
        for row in result["rows"]
        if row["arm"].startswith("ours-")
    ]


def measured_decodes(found: dict[str, list[Result]]) -> list[MeasuredDecode]:
    """One process, every decoder; the fastest machine, where there are several."""
    best: dict[tuple[str, str, str, int], MeasuredDecode] = {}
    for result in found.get("data", []):
        for row in result["rows"]:
            if result["quick"] or row["arm"] not in DECODERS or row["workers"]:
                continue
            cost = MeasuredDecode(
                dataset=row["data"],
                files=row["files"],
                decoder=DECODERS[row["arm"]],
                repeat=row["repeat"],
                seconds=round(row["cpu_s_per_clip"], 6),
                frames=round(row["decoded_frames_per_s"] / row["clips_per_s"], 3),
                source=_source(result),
            )
            key = (cost.dataset, cost.files, cost.decoder, cost.repeat)
            if key not in best or cost.seconds < best[key].seconds:
                best[key] = cost
    return list(best.values())


def calibrate(found: dict[str, list[Result]]) -> Calibration:
    """Everything that plans take from the results."""
    of_data = next(result for result in found["data"] if not result["quick"])
    video_bytes = {
        name: {"original": row["original_bytes_per_video"], "prepared": row["prepared_bytes_per_video"]}
        for name, row in of_data["prepared"].items()
    }
    return Calibration(
        steps=tuple(measured_steps(found)),
        decodes=tuple(measured_decodes(found)),
        video_bytes=video_bytes,
        video_bytes_source=_source(of_data),
    )


def plan_of(recipe: PretrainConfig, gpu: str, num_gpus: int, calibration: Calibration) -> Plan:
    """``adamae-fast plan --gpu … --num-gpus … --dataset k400 --config … --batch 32 --total-batch 2048``."""
    train = replace(recipe.train, batch_size=BATCH, accumulate=TOTAL_BATCH // BATCH // num_gpus)
    options = PlanOptions(gpu=gpu, num_gpus=num_gpus, dataset="k400")  # type: ignore[arg-type]
    return make_plan(replace(recipe, train=train), options, calibration)


def plans(calibration: Calibration) -> str:
    """The table, bold where a figure was measured, and what its figures rest on."""
    rows, bases = [], set[Basis]()
    recipe = load_config(ROOT / RECIPE)
    for gpu in GPUS:
        for num_gpus in NUM_GPUS:
            plan = plan_of(recipe, gpu, num_gpus, calibration)
            figures = [plan.figures[key] for key in COLUMNS]
            bases |= {figure.basis for figure in figures}
            units = [figure.unit for figure in figures]
            cells = [shown(x).removesuffix(f" {unit}") for x, unit in zip(figures, units, strict=True)]
            marked = [f"**{cell}**" if x.basis == "measured" else cell for x, cell in zip(figures, cells, strict=True)]
            rows.append((f"{num_gpus} × {gpu.upper()}", f"{TOTAL_BATCH // BATCH // num_gpus}", *marked))
    lines = [basis_words(bases), "", *table(("GPUs", "passes of a step", *COLUMNS.values()), rows)]
    measured = sorted({f"{row.source} ({row.arm}, batch {row.batch})" for row in calibration.steps})
    on_gpu = f"Steps that were measured: {', '.join(measured)}." if measured else "No step was measured on a GPU yet."
    decoded = sorted({row.source for row in calibration.decodes})
    lines += [f"{on_gpu} CPU time and decoded frames of a clip were measured: {', '.join(decoded)}."]
    return "\n".join(lines) + "\n"


def basis_words(bases: set[Basis]) -> str:
    """What the figures of a table with these bases rest on: nothing is said of a mark that it does not have."""
    others = " or ".join(sorted(bases - {"measured"}))
    if "measured" not in bases:
        return f"No figure of these plans was measured: all are {others}."
    return "**Bold** was measured." + f" All else is {others}." * bool(others)


def page(text: str, calibration: Calibration) -> str:
    """The page with what is between its marks written anew."""
    assert all(mark in text for mark in MARKS)
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n{plans(calibration)}\n{MARKS[1]}{after}"


def as_json(calibration: Calibration) -> str:
    """The text of the file."""
    return json.dumps(asdict(calibration), indent=1) + "\n"


def _source(result: dict[str, Any]) -> str:
    return f"bench/results/{result['file']}.json"


if __name__ == "__main__":
    taken = calibrate(read(RESULTS))
    PATH.write_text(as_json(taken))
    PAGE.write_text(page(PAGE.read_text(), taken))
    print(f"written: {PATH.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")
