"""Whole-step measurements at tiny sizes: arms agree, commands end with JSON, reports and resumption keep their word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamae_fast.cli import main as adamae_fast
from adamae_fast.config import ModelConfig
from bench import arms, checkout, command, conditions, gpu, memory, profile, report, step, throughput
from bench.timing import Plan

# torch's compiler looks at .grad of what crosses from one graph to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

CPU = torch.device("cpu")
ARGUMENTS = ["--quick", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "COMPILE_BACKEND", "eager")
    monkeypatch.setattr(step, "QUICK", Plan(warm_up=0, rounds=2, block=1))


def published_checkout() -> checkout.Checkout | None:
    folder = os.environ.get("ADAMAE_PUBLISHED")
    return checkout.Checkout.open(Path(folder)) if folder else None


@pytest.fixture(scope="module")
def built() -> tuple[dict[str, arms.Arm], arms.Skipped, arms.Parity]:
    model, mask = command.TINY
    setting = arms.Setting(model=model, mask=mask, batch_size=2, device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "COMPILE_BACKEND", "eager")
        build, skipped = arms.builders(setting, arms.plan_for(CPU, published_checkout()))
        return {name: make() for name, make in build.items()}, skipped, arms.Parity(setting)


def test_every_arm_gives_the_loss_and_the_gradients_of_the_reference(built) -> None:
    all_arms, skipped, parity = built
    assert {"published-like-fp32", "tuned", "tuned+compile", "ours-none", "ours-fc1"} <= set(all_arms)
    assert {name: parity.fault(arm) for name, arm in all_arms.items()} == dict.fromkeys(all_arms)
    if "ADAMAE_PUBLISHED" not in os.environ:
        assert skipped["published-fp32"].startswith("not measured")


def test_another_loss_or_gradient_is_found(built, monkeypatch: pytest.MonkeyPatch) -> None:
    all_arms, _, parity = built
    arm = all_arms["tuned"]
    loss, gradients = arm.loss_and_gradients(parity.visible_ids)
    monkeypatch.setattr(arm, "loss_and_gradients", lambda ids: (1.001 * loss, gradients))
    assert parity.fault(arm).startswith("the loss is off by 1.0e-03")
    gradients["sampler.head.weight"] = 2 * gradients["sampler.head.weight"]
    monkeypatch.setattr(arm, "loss_and_gradients", lambda ids: (loss, gradients))
    assert parity.fault(arm).startswith("the gradient of sampler. is off")


def test_our_step_reads_no_tensor_on_the_host(built) -> None:
    all_arms, _, _ = built
    for name in ("ours-none", "ours-fc1"):
        all_arms[name].step()
        assert profile.count(profile.profiled(all_arms[name].step, CPU), CPU).reads == 0
    published = profile.count(profile.profiled(all_arms["published-like-fp32"].step, CPU), CPU)
    assert published.reads > 10


def test_an_option_that_this_version_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "our_options", lambda device: {"ours-tomorrow": {"tomorrow": True}})
    model, mask = command.TINY
    setting = arms.Setting(model=model, mask=mask, batch_size=2, device=CPU)
    build, skipped = arms.builders(setting, arms.plan_for(CPU, None))
    assert "ours-tomorrow" not in build
    assert skipped["ours-tomorrow"] == "this version has no option train.tomorrow"


def test_rearrange_is_einops() -> None:
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    actual = checkout.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=3)
    assert actual.shape == (2, 4, 18)
    for b, h, w, p, q, c in ((0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 2, 2), (1, 0, 1, 1, 0, 2)):
        assert actual[b, h * 2 + w, (p * 3 + q) * 3 + c] == x[b, c, h * 2 + p, w * 3 + q]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--published=.*optim_factory.py not found"):
        checkout.Checkout.open(tmp_path)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_commands_end_with_json_and_write_what_the_report_shows(tmp_path: Path, capsys) -> None:
    arguments = [*ARGUMENTS, "--out", str(tmp_path)]
    assert step.main([*arguments, "--arm", "published-like-fp32", "ours-none"]) == 0
    line = last_line(capsys)
    (ours,) = [row for row in line["rows"] if row["arm"] == "ours-none"]
    (base,) = [row for row in line["rows"] if row["arm"] == "published-like-fp32"]
    assert line["speedup"]["2"]["ours-none"] == pytest.approx(base["ms"] / ours["ms"], rel=1e-2)
    assert ours["saved_bytes_per_clip"] < base["saved_bytes_per_clip"]
    assert memory.main(arguments) == 0
    line = last_line(capsys)
    for row in line["rows"]:
        assert row["ours-none"] == row["predicted-none"] < row["published"]
    assert line["largest_batch"]["ours-fc1"] > line["largest_batch"]["ours-none"] > 0
    assert throughput.main([*arguments, "--batch", "1"]) == 0
    assert {row["strategy"] for row in last_line(capsys)["rows"]} == {"adaptive", "tube", "random", "frame"}
    assert profile.main(arguments) == 0
    assert last_line(capsys)["rows"][0]["reads"] == 0

    page = tmp_path / "docs" / "results.md"
    assert report.main(["--results", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert f"{ours['ms']:.1f} [" in text
    assert "| (c) decoder | 8 blocks | 21.3 | published-like-fp32 |" in text
    pictures = sorted(path.name for path in (page.parent / "results").iterdir())
    assert [name.partition("_")[0] for name in pictures] == ["memory", "step", "throughput"]
    assert all(f"(results/{name})" in text for name in pictures)
    assert all((page.parent / "results" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_report_without_results_says_so(tmp_path: Path) -> None:
    assert report.main(["--results", str(tmp_path), "--page", str(tmp_path / "results.md")]) == 0
    text = (tmp_path / "results.md").read_text()
    assert text.count("On a GPU: not measured.") == text.count("On a CPU: not measured.") == len(report.SECTIONS)


def test_an_arm_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="--arm: none cannot be measured here; choose from"):
        step.main([*ARGUMENTS, "--arm", "none"])


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_round_at_all_is_refused(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"--rounds {rounds}: choose at least 1 round"):
        step.main([*ARGUMENTS, "--rounds", str(rounds)])


def test_bisection_finds_the_largest() -> None:
    for limit in (1, 5, 63, 100):
        found = memory.largest(lambda batch, limit=limit: batch <= limit, 64)
        assert 0 <= limit - found <= limit // 64
    assert memory.largest(lambda batch: False, 64) == 0


def test_quick_cases_are_among_the_papers() -> None:
    assert {case.part for case in memory.CASES} == {"(a) masking", "(b) ratio", "(c) decoder", "(f) sampler"}
    assert set(memory.QUICK_CASES) <= {case.name for case in memory.CASES}
    assert memory.CASES[0].model == ModelConfig()


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


def test_a_machine_without_the_command_lines_packages_can_measure() -> None:
    modules = [path.stem for path in (conditions.ROOT / "bench").glob("*.py") if path.stem != "__init__"]
    code = (
        "import sys\nmissing = ['jsonargparse', 'av', 'decord', 'transformers', 'tensorboard']\n"
        "sys.modules.update(dict.fromkeys(missing))\n"
        f"import importlib\nfor name in {modules!r}: importlib.import_module(f'bench.{{name}}')\n"
        "from bench import profile; profile.main(['--quick', '--device', 'cpu'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=conditions.ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_command_line_forwards(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adamae_fast(["bench", "report", "--help"]) == 0
    assert "usage: python -m bench.report" in capfd.readouterr().out
    assert adamae_fast(["bench", "nothing"]) == 2
    assert "there is no measurement 'nothing'" in capfd.readouterr().err


def test_all_steps_of_a_gpu_machine_exist() -> None:
    for rehearsal in (True, False):
        todo = gpu.steps(Path("out"), rehearsal=rehearsal, published=None)
        assert sum(each.share for each in todo) <= 1.6 * 540
        for each in todo:
            if each.command[0] == "-m" and each.command[1].startswith("bench."):
                assert (conditions.ROOT / each.command[1].replace(".", "/")).with_suffix(".py").is_file()
            files = [word for word in each.command if word.startswith("tests/")]
            assert all((conditions.ROOT / file).exists() for file in files)
