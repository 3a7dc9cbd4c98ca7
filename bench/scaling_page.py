"""``python -m bench.scaling_page``: write what plans start from, ``adamae_fast/plan/calibration.json``.

It is taken from the files of bench/results. Nothing of it is typed by hand.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from adamae_fast.plan.calibration import PATH, Calibration, MeasuredDecode, MeasuredStep
from adamae_fast.plan.hardware import gpu_named
from bench.conditions import ROOT
from bench.report import RESULTS, Result, read

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


def as_json(calibration: Calibration) -> str:
    """The text of the file."""
    return json.dumps(asdict(calibration), indent=1) + "\n"


def _source(result: dict[str, Any]) -> str:
    return f"bench/results/{result['file']}.json"


if __name__ == "__main__":
    PATH.write_text(as_json(calibrate(read(RESULTS))))
    print(f"written: {PATH.relative_to(ROOT)}")
