"""The plan of a GPU machine: the whole of it rehearsed on the CPU, and going on where it was cut off."""

import json
import time
from pathlib import Path

import pytest
import torch

from adamae_fast.ops import triton_kernels
from bench import arms, command, conditions, gpu


def result(out: Path, name: str) -> dict:
    (path,) = out.glob(f"{name}_*.json")
    return json.loads(path.read_text())


def test_a_rehearsal_runs_the_whole_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, so that parallel processes rehearse once. The build is left out: others are using the library."""
    plan = gpu.steps
    monkeypatch.setattr(gpu, "steps", lambda *a, **k: [step for step in plan(*a, **k) if step.name != "build"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the rehearsal sets, and this takes back
    assert gpu.main(["--rehearsal", "--out", str(tmp_path)]) == 0
    state = json.loads((tmp_path / gpu.STATE).read_text())
    assert state["failed"] == {}
    assert ["build", *state["done"]] == [step.name for step in plan(tmp_path, rehearsal=False, published=None)]
    assert {each["status"] for each in state["done"].values()} == {0}
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) <= gpu.MAX_FILES
    check_step(result(tmp_path, "step"))
    check_finetune(result(tmp_path, "finetune_step"))
    check_the_rest(tmp_path)
    check_report(tmp_path)


def check_step(line: dict) -> None:
    """Both batch sizes are in one file."""
    rows = {(row["arm"], row["batch"]): row for row in line["rows"]}
    assert len(rows) == len(line["rows"]) == 9
    assert ("tuned+compile", 2) in rows
    for batch in (1, 2):
        base, ours = rows["published-like-fp32", batch], rows["ours-none", batch]
        assert line["speedup"][str(batch)]["ours-none"] == pytest.approx(base["ms"] / ours["ms"], rel=1e-2)
        assert ours["saved_bytes_per_clip"] < base["saved_bytes_per_clip"]
        assert ours["reads"] == 0
        assert ours["cpu_ms"] > 0
        assert base["attention_ran"] == {}
        blocks = sum(rows["tuned", batch]["attention_ran"].values())
        assert sum(ours["attention_ran"].values()) == blocks > 0


def check_finetune(line: dict) -> None:
    """A file of its own."""
    rows = {row["arm"]: row for row in line["rows"]}
    assert set(rows) == {"published-like-fp32", "tuned", "ours-none", "ours-fc1"}
    assert rows["ours-fc1"]["saved_bytes_per_clip"] < rows["ours-none"]["saved_bytes_per_clip"]
    assert rows["ours-none"]["saved_bytes_per_clip"] < rows["published-like-fp32"]["saved_bytes_per_clip"]
    assert rows["ours-none"]["reads"] == 0
    assert line["model"].startswith("classifier nano")


def check_the_rest(out: Path) -> None:
    """Memory, throughput, profile, kernels."""
    memory = result(out, "memory")
    for row in memory["rows"]:
        assert row["ours-none"] == row["predicted-none"] < row["published"]
    assert memory["largest_batch"]["ours-fc1"] > memory["largest_batch"]["ours-none"] > 0
    assert {row["strategy"] for row in result(out, "throughput")["rows"]} == {"adaptive", "tube", "random", "frame"}
    assert result(out, "profile")["rows"][0]["reads"] == 0
    (kernels,) = out.glob("kernels_*.csv")
    operations = [line.partition(",")[0] for line in kernels.read_text().splitlines()[1:]]
    assert set(operations) == {"sample_visible", "gather_tokens"}


def check_report(out: Path) -> None:
    """Figures and pictures of all of it."""
    text = (out / "page" / "results.md").read_text()
    assert all(f"{row['ms']:.1f} [" in text for row in result(out, "step")["rows"])
    assert "| (c) decoder | 8 blocks | 21.3 | published-like-fp32 |" in text
    assert text.count("A quick run at tiny sizes") == 7
    assert "| gather_tokens | full | cpp |" in text
    pictures = sorted((out / "page" / "results").iterdir())
    assert [path.name.partition("_")[0] for path in pictures] == ["finetune", "memory", "step", "throughput"]
    assert all(f"(results/{path.name})" in text for path in pictures)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_the_plan_fits_its_minutes() -> None:
    for published in (None, "checkout"):
        todo = gpu.steps(Path("out"), rehearsal=False, published=published)
        assert sum(step.share for step in todo) <= gpu.BUDGET == 540
        assert sum(step.share for step in todo if step.name in ("kernels", "tests")) < 300
        assert len({step.name for step in todo}) == len(todo)  # a name tells what is done


def writes(out: Path, name: str, status: int = 0) -> gpu.Step:
    log = f"import pathlib, sys; pathlib.Path({str(out)!r}, 'log').open('a').write({name!r}); sys.exit({status})"
    return gpu.Step(name, ("-c", log), 10)


def test_measurements_go_on_where_they_were_cut_off(tmp_path: Path) -> None:
    todo = [writes(tmp_path, "a"), writes(tmp_path, "b", status=3), writes(tmp_path, "c")]
    state = gpu.run_all(todo, tmp_path, 60, "commit-1")
    assert set(state["done"]) == {"a", "c"}
    assert state["failed"] == {"b": "exit status 3"}
    todo[1] = writes(tmp_path, "b")
    state = gpu.run_all(todo, tmp_path, 60, "commit-1")
    assert state["failed"] == {}
    assert (tmp_path / "log").read_text() == "abcb"
    gpu.run_all(todo, tmp_path, 60, "commit-2")
    assert (tmp_path / "log").read_text() == "abcbabc"


def test_a_step_is_not_begun_without_time_and_cut_off_after_it(tmp_path: Path) -> None:
    slow = gpu.Step("slow", ("-c", "import time; time.sleep(60)"), 1)
    state = gpu.run_all([slow, writes(tmp_path, "late")], tmp_path, 2, "commit")
    assert state["failed"]["slow"].startswith("cut off after")
    assert state["failed"]["late"].startswith("not begun")
    assert not (tmp_path / "log").exists()


def test_a_step_that_was_cut_off_gets_all_that_is_left_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one that is slower than expected would be cut off for ever. What comes after it keeps its share."""
    limits: list[float] = []

    def run(command: list[str], environment: dict[str, str], limit: float) -> int | None:
        limits.append(limit)
        return None if len(limits) == 1 else 0

    monkeypatch.setattr(gpu, "run", run)
    todo = [writes(tmp_path, "slow"), gpu.Step("next", ("-c", ""), 100)]
    assert gpu.run_all(todo[:1], tmp_path, 1000, "commit")["failed"] == {"slow": "cut off after 20 s"}
    state = gpu.run_all(todo, tmp_path, 1000, "commit")
    assert (set(state["done"]), state["failed"]) == ({"slow", "next"}, {})
    assert limits == [20, pytest.approx(900, abs=10), 200]


def test_what_a_step_has_started_ends_with_it(tmp_path: Path) -> None:
    """Or it would go on beside the next one, whose figures it would disturb."""
    child = f"import pathlib, time; time.sleep(3); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    state = gpu.run_all([gpu.Step("parent", ("-c", parent), 1)], tmp_path, 1.5, "commit")
    assert state["failed"]["parent"].startswith("cut off")
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_a_crash_is_not_an_arm_that_was_refused(tmp_path: Path) -> None:
    crash = gpu.Step("crash", ("-c", "raise RuntimeError"), 10, gpu.REFUSED)
    refused = gpu.Step("refused", ("-c", f"raise SystemExit({command.REFUSED})"), 10, gpu.REFUSED)
    state = gpu.run_all([crash, refused], tmp_path, 60, "commit")
    assert set(state["done"]) == {"refused"}
    assert state["failed"] == {"crash": "exit status 1"}


def test_steps_find_the_kernels_where_nothing_is_installed(tmp_path: Path) -> None:
    kernels = str(conditions.ROOT / "kernels")
    asks = f"import os; assert {kernels!r} in os.environ['PYTHONPATH'].split(os.pathsep)"
    assert gpu.run_all([gpu.Step("asks", ("-c", asks), 10)], tmp_path, 60, "commit")["failed"] == {}


def test_a_gpu_without_our_kernels_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run the references, and call them ours."""
    monkeypatch.setattr(triton_kernels, "reason_missing", lambda: "no Triton")
    command.require_kernels(torch.device("cpu"))
    with pytest.raises(ValueError, match="--device cuda:0: no Triton; in a checkout that is not installed"):
        command.require_kernels(torch.device("cuda:0"))


def test_arms_of_the_plan_exist() -> None:
    cuda = torch.device("cuda")
    for published, prefix in ((None, "published-like"), ("checkout", "published")):
        baselines = {f"{prefix}-{precision}" for precision in arms.plan_for(cuda, None).precisions}
        known = baselines | {"tuned", "tuned+compile", *arms.our_options(cuda)}
        named = [step.command for step in gpu.steps(Path("out"), rehearsal=False, published=published)]
        for words in named:
            if "--arm" in words:
                assert set(words[words.index("--arm") + 1 :]) <= known
        assert baselines <= set().union(*named)


def test_files_of_the_plan_exist() -> None:
    for rehearsal in (True, False):
        for each in gpu.steps(Path("out"), rehearsal=rehearsal, published=None):
            files = [word for word in each.command if word.startswith("tests/")]
            assert all((conditions.ROOT / file).exists() for file in files)
