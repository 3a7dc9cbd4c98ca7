"""Pre-training against scratch: every arm with its best rate, every part once, and the page says what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adamae_fast.config import PretrainConfig
from adamae_fast.config_finetune import FinetuneConfig
from adamae_fast.errors import RunStoppedError
from adamae_fast.run_folder import RunFolder
from bench import command, plots, report, transfer
from bench.results import permutation_p
from bench.trainings import is_done, seconds_of, train_once


class Trainings:
    """Stand-ins that write what the bench reads; ``top1`` follows from the configuration."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.stop_at = ""
        self.top1_of_rate = 0.05

    def pretrain(self, config: PretrainConfig, console: object) -> dict[str, Any]:
        return self._end(config.output_dir)

    def finetune(self, config: FinetuneConfig, console: object) -> dict[str, Any]:
        top1 = {None: 0.1, "demo": 0.3}.get(config.init and Path(config.init).name, 0.5)
        top1 += self.top1_of_rate * (config.optim.base_lr == transfer.RATES[config.init is None]) + 0.01 * config.seed
        Path(config.output_dir).mkdir(parents=True)
        lines = [{"step": step, "top1": value, "top5": 0.9} for step, value in ((1, 0.99), (2, top1))]
        RunFolder(config.output_dir).validation.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self._end(config.output_dir)

    def _end(self, folder: str) -> dict[str, Any]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name, _, _ = Path(folder).name.rpartition("-")  # without what tells its settings
        stopped_by = "SIGTERM" if name == self.stop_at else None
        summary = {"stopped_by": stopped_by, "steps": 2}
        RunFolder(folder).summary.write_text(json.dumps(summary))
        (Path(folder) / "model.safetensors").touch()
        (Path(folder) / "config.yaml").touch()
        self.done.append(name)
        return summary


def lists(out: str, preset: str, num_videos: int, *, val_share: float, **rest: object) -> None:
    """What the bench reads of a rendered set."""
    num_val = round(num_videos * val_share)  # "video.mp4 0" is one of the classes, "video.mp4 13" is not
    Path(out).mkdir(parents=True)
    for name, count in (("train", num_videos - num_val), ("val", num_val)):
        (Path(out) / f"{name}.txt").write_text("video.mp4 0\nvideo.mp4 13\n" * (count // 2))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    fakes = Trainings()
    monkeypatch.setattr(transfer, "pretrain", fakes.pretrain)
    monkeypatch.setattr(transfer, "finetune", fakes.finetune)
    monkeypatch.setattr("bench.trainings.synthesize", lists)
    return fakes


def options(tmp_path: Path) -> list[str]:
    demo = tmp_path / "demo"
    demo.mkdir(exist_ok=True)
    for name, text in (("model.safetensors", ""), ("config.yaml", ""), ("summary.json", '{"steps": 300}')):
        (demo / name).write_text(text)
    return ["--quick", f"--pretrained={demo}", f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'out'}"]


def result_of(tmp_path: Path) -> report.Result:
    (path,) = (tmp_path / "out").glob("transfer_*.json")
    return json.loads(path.read_text())


def test_every_arm_has_its_best_rate_and_every_part_is_done_once(tmp_path: Path, trainings: Trainings) -> None:
    assert transfer.main(options(tmp_path)) == 0
    first = result_of(tmp_path)
    num_runs = 1 + 2 * (len(transfer.RATES) + 2) + 2 * len(transfer.RATES)
    assert len(trainings.done) == len(set(trainings.done)) == num_runs
    rows = {row["arm"]: row for row in first["rows"]}
    assert [rows[arm]["rate"] for arm in transfer.ARMS] == [transfer.RATES[1], *[transfer.RATES[0]] * 2]
    assert rows["scratch"]["rates"] == pytest.approx({"0.008": 0.105, "0.016": 0.155})
    assert rows["demo"]["rates"] == pytest.approx({"0.008": 0.355})
    # The last validation, not the best one.
    assert rows["scratch"]["top1"] == pytest.approx([0.15, 0.16])
    assert rows["pretrained"]["top1_mean"] == pytest.approx(0.555)
    assert rows["demo"]["top1_std"] == pytest.approx(0.01 / 2**0.5)
    # Of two seeds, all above: one of the six ways to deal four figures out.
    assert first["p_against_scratch"] == pytest.approx({"demo": 1 / 6, "pretrained": 1 / 6})
    assert first["videos"] == {"train": 7, "val": 7, "tuning": 7}
    assert transfer.main(options(tmp_path)) == 0
    assert len(trainings.done) == num_runs
    again = result_of(tmp_path)
    assert (again["rows"], again["grid"]) == (first["rows"], first["grid"])


def test_a_stopped_study_goes_on_with_what_was_stopped(tmp_path: Path, trainings: Trainings) -> None:
    trainings.stop_at = "pretrained"
    with pytest.raises(RunStoppedError, match="the same command goes on"):
        transfer.main(options(tmp_path))
    assert trainings.done == ["pretrained"]
    trainings.stop_at = ""
    assert transfer.main(options(tmp_path)) == 0
    assert trainings.done.count("pretrained") == 2


def test_another_length_and_other_weights_are_other_runs(tmp_path: Path, trainings: Trainings) -> None:
    transfer.main(options(tmp_path))
    trainings.done.clear()
    transfer.main([*options(tmp_path), "--steps=3"])
    assert len(trainings.done) == len(set(trainings.done)) > 0
    assert "pretrained" not in trainings.done
    trainings.done.clear()
    arguments = options(tmp_path)
    (tmp_path / "demo" / "model.safetensors").write_text("others")
    transfer.main(arguments)
    assert trainings.done
    assert all("demo" in name for name in trainings.done)


def test_p_is_that_of_the_permutation_test() -> None:
    def count(ours: list[float], theirs: list[float]) -> float:
        """By another library's random permutations."""
        generator = np.random.default_rng(0)
        dealt = generator.permuted(np.tile([*ours, *theirs], (20000, 1)), axis=1)[:, : len(ours)].sum(1)
        return float((dealt >= sum(ours) - 1e-9).mean())

    for ours, theirs in (([0.3, 0.5, 0.4, 0.9], [0.2, 0.45, 0.3, 0.3]), ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1, 0.2])):
        assert permutation_p(ours, theirs) == pytest.approx(count(ours, theirs), abs=0.02)
    assert permutation_p([0.5] * 3, [0.5] * 3) == 1.0
    assert permutation_p([0.6] * 8, [0.5] * 8) == pytest.approx(1 / 12870)


def test_an_untold_choice_of_rates_favours_the_higher_one(tmp_path: Path, trainings: Trainings) -> None:
    trainings.top1_of_rate = 0.0
    assert transfer.main(options(tmp_path)) == 0
    assert {row["rate"] for row in result_of(tmp_path)["rows"]} == {max(transfer.RATES)}


def test_a_training_is_done_once_it_was_not_stopped(tmp_path: Path) -> None:
    ends = iter(["SIGTERM", None])

    def train() -> dict[str, Any]:
        summary = {"stopped_by": next(ends)}
        RunFolder(tmp_path).summary.write_text(json.dumps(summary))
        return summary

    with pytest.raises(RunStoppedError, match="stopped by SIGTERM"):
        train_once(tmp_path, train)
    assert not is_done(tmp_path)
    first = seconds_of(tmp_path)
    assert train_once(tmp_path, train) > first
    assert is_done(tmp_path)
    assert train_once(tmp_path, train) == seconds_of(tmp_path)  # a third call of train would have no end


def test_the_page_says_what_came_out(tmp_path: Path, trainings: Trainings) -> None:
    transfer.main(options(tmp_path))
    found = report.read(tmp_path / "out")
    text = report.page(found)
    assert f"| scratch | {transfer.RATES[1]:g} | 15.5% ± 0.7% | 15.0%, 16.0% |" in text
    assert "demo 300 steps on other videos" in text
    (picture,) = plots.draw(found, tmp_path / "pictures")
    assert picture.stat().st_size > 1000


def test_without_pretraining_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make demo makes runs/demo"):
        transfer.main(["--quick", f"--pretrained={tmp_path}"])
    with pytest.raises(ValueError, match="--steps 0: choose at least 1"):
        transfer.main(["--quick", "--steps=0"])
    assert command.RESULTS.is_dir()
