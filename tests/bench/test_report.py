"""docs/results.md and the README's figures are what the result files say, and what no file holds is not measured."""

from pathlib import Path

from bench import report


def a_step(device: str, driver: str, **memory: int) -> report.Result:
    """A result of two arms, the second twice as fast."""
    machine = {"device": device, "cores": "2", "torch": "2.13", "driver": driver}
    counts = {"reads": 0, "reads_by_optimizer": 0, "waits": 0, "launches": 0, "mfu": 0.25, "clips_per_s": 8.0}
    times = {"ms_p20": 1.0, "ms_p80": 9.0, "cpu_ms": 3.0}
    attention = {"attention_ran": {"aten::_scaled_dot_product_flash_attention": 17}}
    rows = [
        {"arm": arm, "batch": 16, "ms": ms, **times, **counts, **memory, **attention}
        for arm, ms in (("published-fp16", 90.0), ("ours-none", 45.0))
    ]
    return {
        "conditions": {**machine, "commit": "abc", "date": "2026-01-02", "load": "0.1"},
        "command": "step",
        "file": "step_x",
        "quick": False,
        "model": "base",
        "gflop_per_clip": 254.4,
        "rows": rows,
        "skipped": {},
        "speedup_over": "published-fp16",
        "speedup": {"16": {"published-fp16": 1.0, "ours-none": 2.0}},
    }


def test_the_page_is_generated_from_the_committed_results() -> None:
    """``python -m bench.report`` writes it again."""
    found = report.read(report.RESULTS)
    assert found
    assert report.PAGE.read_text() == report.page(found)
    for pictures in report.pictures_of(found).values():
        assert all((report.PAGE.parent / picture).is_file() for picture in pictures)


def test_the_readmes_figures_are_those_of_the_committed_results() -> None:
    readme = report.README.read_text()
    assert readme == report.written_anew(readme, report.MARKS, report.headline(report.read(report.RESULTS)))


def test_other_results_are_another_headline() -> None:
    found = {"step": [a_step("H200", "570", allocated_bytes=5_600_000_000, reserved_bytes=6_000_000_000)]}
    readme = report.written_anew(report.README.read_text(), report.MARKS, report.headline(found))
    assert readme != report.README.read_text()
    assert "| published-fp16 | 16 | 90.0 | 1.00 | 5.60 |\n| ours-none | 16 | 45.0 | 2.00 | 5.60 |" in readme
    assert "device H200; cores 2; torch 2.13; driver 570; commit abc; date 2026-01-02; load 0.1." in readme
    assert "A whole training step is not measured on a CPU yet." in readme
    assert report.written_anew(readme, report.MARKS, report.headline(found)) == readme
    text = report.page(found)
    assert "* published-fp16, ours-none: `_scaled_dot_product_flash_attention` 17 times\n" in text
    assert "![A training step](results/step_x.png)" in text


def test_goals_of_a_gpu_are_judged() -> None:
    one = a_step("NVIDIA H200", "570", allocated_bytes=5_600_000_000, reserved_bytes=6_000_000_000)
    published, ours = ({**row, "batch": 32} for row in one["rows"])
    compiled, recorded = {**ours, "arm": "tuned+compile", "ms": 54.0}, {**ours, "arm": "ours-fc1+graph"}
    recorded |= {"ms": 30.0, "allocated_bytes": 1_400_000_000, "mfu": 0.3, "waits": 2}
    one["rows"] += [published, compiled, ours, recorded]

    def line(goal: str, first: str, last: str = "not measured") -> str:
        return f"| {goal} | {first} | not measured | not measured | {last} |"

    lines = [
        line("batch 16: at least 2.8 times as fast as published-fp16", "2.00, missed"),
        line("batch 16: at least 3.5 times less allocated than published-fp16", "1.00, missed"),
        line("batch 16: no wait of the host", "0, met"),
        line("batch 32: at least 3 times as fast as published-fp16", "2.00, missed", "3.00, met"),
        line("batch 32: at least 1.2 times as fast as tuned+compile", "1.20, met", "1.80, met"),
        line("batch 32: at least 4.5 times less allocated than published-fp16", "1.00, missed", "4.00, missed"),
        line("batch 32: at least 0.3 of the peak", "0.25, missed", "0.30, met"),
        line("batch 32: no wait of the host", "0, met", "2, missed"),
    ]
    assert "\n".join(lines) in report.page({"step": [one]})
    assert report.gpu_goals(a_step("another GPU", "570")) == []


def test_goals_of_a_cpu_are_those_of_its_batch() -> None:
    result = a_step("Xeon", "", saved_bytes_per_clip=310_000_000, peak_extra_bytes=1)
    (published, ours), other = result["rows"], {"saved_bytes_per_clip": 1, "reads": 1}
    rows = [{**published, "batch": 2}, {**ours, "batch": 2}, {**ours, **other, "batch": 4}]
    faster = {"1": {"ours-none": 1.0}, "2": {"published-fp16": 1.0, "ours-none": 1.5}}
    text = "\n".join(report.cpu_goals({**result, "rows": rows, "speedup": faster}))
    assert "at most 300 MB a clip | 310.0 | no |" in text
    assert "at most 130 MB a clip | not measured | – |" in text
    assert "our step: none | 0 | yes |" in text
    assert "at least 1.4 times as fast as published-fp16 | 1.50 | yes |" in text


def test_a_quick_run_is_no_headline() -> None:
    quick = {**a_step("Xeon", "", saved_bytes_per_clip=1, peak_extra_bytes=1), "quick": True}
    assert report.headline({"step": [quick]}) == report.headline({})
    assert "A quick run at tiny sizes" in report.page({"step": [quick]})


def test_a_report_without_results_says_so(tmp_path: Path) -> None:
    assert report.main(["--results", str(tmp_path), "--page", str(tmp_path / "results.md")]) == 0
    text = (tmp_path / "results.md").read_text()
    assert text.count("This is measured neither on a GPU nor on a CPU yet.") == len(report.SECTIONS)
