"""The plan of a GPU machine: the whole of it rehearsed on the CPU, and going on where it was cut off."""

import json
from pathlib import Path

import pytest
import torch

from bench import arms, conditions, gpu

# The library is built here already, and another test may be using it.
BUILT = ("build",)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a rehearsal fills; every command of the plan runs, but for the build."""
    out = tmp_path_factory.mktemp("rehearsal")
    steps = gpu.steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "steps", lambda *a, **k: [step for step in steps(*a, **k) if step.name not in BUILT])
        patch.setenv("OMP_NUM_THREADS", "1")  # which the rehearsal sets, and this takes back
        assert gpu.main(["--rehearsal", "--out", str(out)]) == 0
    return out


def result(out: Path, name: str) -> dict:
    (path,) = out.glob(f"{name}_*.json")
    return json.loads(path.read_text())


def test_every_step_of_a_rehearsal_ends_well(rehearsed: Path) -> None:
    state = json.loads((rehearsed / gpu.STATE).read_text())
    assert state["failed"] == {}
    names = [step.name for step in gpu.steps(rehearsed, rehearsal=False, published=None)]
    assert [*BUILT, *state["done"]] == names
    assert {each["status"] for each in state["done"].values()} == {0}
    assert len([path for path in rehearsed.iterdir() if path.is_file()]) <= gpu.MAX_FILES


def test_a_rehearsal_measures_steps_of_both_batch_sizes(rehearsed: Path) -> None:
    line = result(rehearsed, "step")
    rows = {(row["arm"], row["batch"]): row for row in line["rows"]}
    assert len(rows) == len(line["rows"]) == 9
    assert ("tuned+compile", 2) in rows
    for batch in (1, 2):
        base, ours = rows["published-like-fp32", batch], rows["ours-none", batch]
        assert line["speedup"][str(batch)]["ours-none"] == pytest.approx(base["ms"] / ours["ms"], rel=1e-2)
        assert ours["saved_bytes_per_clip"] < base["saved_bytes_per_clip"]
        assert ours["reads"] == 0
        assert ours["cpu_ms"] > 0
    # Nano has 2 blocks each in encoder and decoder and one in the sampler.
    assert rows["published-like-fp32", 2]["attention_ran"] == {}
    assert sum(rows["ours-none", 2]["attention_ran"].values()) == sum(rows["tuned", 2]["attention_ran"].values()) > 0


def test_a_rehearsal_measures_the_rest(rehearsed: Path) -> None:
    memory = result(rehearsed, "memory")
    for row in memory["rows"]:
        assert row["ours-none"] == row["predicted-none"] < row["published"]
    assert memory["largest_batch"]["ours-fc1"] > memory["largest_batch"]["ours-none"] > 0
    throughput = result(rehearsed, "throughput")
    assert {row["strategy"] for row in throughput["rows"]} == {"adaptive", "tube", "random", "frame"}
    assert result(rehearsed, "profile")["rows"][0]["reads"] == 0
    (kernels,) = rehearsed.glob("kernels_*.csv")
    operations = [line.partition(",")[0] for line in kernels.read_text().splitlines()[1:]]
    assert set(operations) == {"sample_visible", "gather_tokens"}


def test_a_rehearsals_report_shows_its_figures(rehearsed: Path) -> None:
    text = (rehearsed / "page" / "results.md").read_text()
    assert all(f"{row['ms']:.1f} [" in text for row in result(rehearsed, "step")["rows"])
    assert "| (c) decoder | 8 blocks | 21.3 | published-like-fp32 |" in text
    assert text.count("A quick run at tiny sizes") == 5
    assert "| gather_tokens | full | cpp |" in text
    pictures = sorted((rehearsed / "page" / "results").iterdir())
    assert [path.name.partition("_")[0] for path in pictures] == ["memory", "step", "throughput"]
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


def test_arms_of_the_plan_exist() -> None:
    cuda = torch.device("cuda")
    for published, prefix in ((None, "published-like"), ("checkout", "published")):
        baselines = {f"{prefix}-{precision}" for precision in arms.plan_for(cuda, None).precisions}
        known = baselines | {"tuned", "tuned+compile", *arms.our_options(cuda)}
        named = [step.command for step in gpu.steps(Path("out"), rehearsal=False, published=published)]
        for command in named:
            if "--arm" in command:
                assert set(command[command.index("--arm") + 1 :]) <= known
        assert baselines <= set().union(*named)


def test_files_of_the_plan_exist() -> None:
    for rehearsal in (True, False):
        for each in gpu.steps(Path("out"), rehearsal=rehearsal, published=None):
            files = [word for word in each.command if word.startswith("tests/")]
            assert all((conditions.ROOT / file).exists() for file in files)
