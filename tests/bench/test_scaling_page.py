"""What plans start from is what the result files hold, and a result from a GPU is taken up."""

import dataclasses
import json

from adamae_fast.plan.calibration import PATH, Calibration
from bench import report, scaling_page
from tests.bench.test_report import a_step


def test_the_calibration_is_that_of_the_committed_results() -> None:
    """``python -m bench.scaling_page`` writes it again."""
    found = report.read(report.RESULTS)
    assert PATH.read_text() == scaling_page.as_json(scaling_page.calibrate(found))


def test_the_table_is_what_plans_say_now() -> None:
    text = scaling_page.PAGE.read_text()
    found = scaling_page.calibrate(report.read(report.RESULTS))
    assert text == scaling_page.page(text, found)
    modelled = scaling_page.plans(dataclasses.replace(found, steps=()))
    assert "**" not in modelled
    assert modelled.startswith("No figure of these plans was measured: all are modelled.\n")
    assert "| 64 × H100 | 1 | 6.96 | 474 | 20.5 – 27.6 |" in modelled
    assert modelled.count(" × ") == 3 * 3


def test_steps_of_known_gpus_are_taken_up() -> None:
    of_data = report.read(report.RESULTS)["data"]
    on_gpu = a_step("NVIDIA H200", "570", allocated_bytes=5_600_000_000, reserved_bytes=6_000_000_000)
    steps = [
        {**on_gpu, "rows": [{**row, "batch": 32} for row in on_gpu["rows"]]},
        a_step("Intel(R) Xeon(R) Processor", "", saved_bytes_per_clip=1, peak_extra_bytes=1),
        {**a_step("NVIDIA H200", "570", allocated_bytes=1), "quick": True},
    ]
    found = scaling_page.calibrate({"step": steps, "data": of_data})
    (row,) = found.steps
    assert (row.gpu, row.arm, row.batch, row.seconds) == ("h200", "ours-none", 32, 0.045)
    assert (row.allocated_bytes, row.source) == (5_600_000_000, "bench/results/step_x.json")
    lines = scaling_page.plans(found).splitlines()
    assert lines[0] == "**Bold** was measured. All else is modelled."
    assert all(("**" in line) == ("H200" in line) for line in lines if line.startswith(("| 8 ×", "| 32 ×", "| 64 ×")))
    assert "bench/results/step_x.json (ours-none, batch 32)" in lines[-1]
    assert Calibration.from_json(json.loads(scaling_page.as_json(found))) == found
