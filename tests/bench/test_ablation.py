"""The table in miniature: a row is what its configuration says, done once, and the page says what came out."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from adamae_fast.config import LossConfig, load_config
from adamae_fast.errors import RunStoppedError
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.run_folder import RunFolder
from bench import ablation, ablation_page, ablation_runs, command, table1
from bench.ablation import COLUMNS, SEEDS
from bench.ablation_page import Spread, Study
from bench.ablation_runs import PRESETS, ROWS, SMALL_DATA, Job
from bench.report import README, RESULTS

QUICK = PRESETS["quick"]


def case(part: str, name: str) -> table1.Case:
    return next(x for x in ROWS if (x.part[:3], x.name) == (part, name))


def job(of: table1.Case, seed: int = 0, work: Path = Path("work"), preset: ablation_runs.Preset = QUICK) -> Job:
    return Job(of, seed, preset, work, next(work.glob("videos-*"), work))


def test_rows_that_are_one_configuration_are_trained_once() -> None:
    names = {"(a)": "adaptive 95 %", "(b)": "0.95", "(c)": "4 blocks", "(d)": "MSE, normalised", "(f)": "1 × 768"}
    names["(g)"] = "defaults"
    assert len({job(case(part, name)).folder for part, name in names.items()}) == 1
    every = [job(x, preset=PRESETS["cpu"]).folder for x in ROWS]
    assert len(set(every)) == len(every) - 6  # the default stands in seven parts
    assert job(case("(a)", "tube 90 %"), 1).folder != job(case("(a)", "tube 90 %"), 2).folder


@pytest.mark.parametrize(
    ("part", "name", "expected"),
    [
        ("(a)", "frame 87.5 %", {"mask.strategy": "frame", "mask.ratio": 0.875, "model.decoder.depth": 4}),
        ("(c)", "1 block", {"model.decoder.depth": 1, "mask.ratio": 0.95}),
        ("(d)", "L1, raw pixels", {"loss.error": "l1", "loss.target": "raw"}),
        ("(f)", "1 × 384", {"model.sampler.width": 32}),  # half of pico's, as of ViT-B's
        ("(f)", "2 × 384", {"model.sampler.width": 32, "model.sampler.depth": 2}),
        ("(g)", "learning rate × 3", {"optim.sampler_lr_scale": 3.0, "loss.sampling_baseline": 0.0}),
        ("(g)", "baseline 0.9", {"optim.sampler_lr_scale": 1.0, "loss.sampling_baseline": 0.9, "mask.ratio": 0.95}),
        ("(f)", "MLP", {"model.sampler.kind": "mlp", "model.sampler.width": None}),
    ],
)
def test_a_row_is_what_the_paper_says(part: str, name: str, expected: dict[str, object]) -> None:
    overrides = job(case(part, name)).overrides()
    assert expected.items() <= overrides.items()
    load_config(ablation_runs.PRETRAINING, overrides)


def test_a_job_is_the_same_in_another_process() -> None:
    for each in (job(x) for x in ROWS):
        copy = pickle.loads(pickle.dumps(each))
        assert (copy.folder, copy.overrides(), copy.is_scratch) == (each.folder, each.overrides(), each.is_scratch)
    assert [x.name for x in ROWS if job(x).is_scratch] == ["scratch"]


def test_shares_of_the_length() -> None:
    preset = PRESETS["cpu"]
    steps = [job(x, preset=preset).overrides()["train.steps"] for x in table1.CASES if x.part[:3] == "(e)"]
    assert steps == [round(preset.pretrain_steps * share) for share in (1 / 4, 5 / 8, 3 / 4, 1)]


NAMES = ("adaptive 95 %", "scratch", "frame 87.5 %")


def arguments(work: Path, out: Path, *names: str, processes: int = 1) -> list[str]:
    options = ["--quick", "--seeds", "0", "--work", str(work), "--out", str(out), "--processes", str(processes)]
    return [*options, "--only", *names]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three rows, really trained, two at once."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    assert ablation.main(arguments(work, out, *NAMES, processes=2)) == 0
    return work, out


def read_rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    (path,) = out.glob("ablation-quick_*.csv")
    with path.open(newline="") as file:
        return {(row["part"][:3], row["case"]): row for row in csv.DictReader(file)}


def test_a_run_leaves_its_figures(done: tuple[Path, Path]) -> None:
    work, out = done
    rows = read_rows(out)
    assert list(rows) == [("(a)", "frame 87.5 %"), ("(a)", "adaptive 95 %"), ("no ", "scratch")]
    frame, adaptive, scratch = rows.values()
    assert tuple(frame) == COLUMNS
    assert (frame["visible"], frame["tokens"], adaptive["visible"]) == ("16", "64", "3")
    # Whole frames hold the moving boxes as often as all frames do, but for chance.
    assert 0.5 < float(frame["adaptivity"]) < 1.5
    assert frame["entropy"] == frame["untrained"] == frame["clamped"] == ""
    assert 0.9 < float(adaptive["entropy"]) < 1
    assert adaptive["adaptivity"] != adaptive["untrained"]  # two steps change something
    assert scratch["adaptivity"] == scratch["untrained"] == adaptive["untrained"]
    for row in rows.values():
        assert 0.5 < float(row["error_adaptivity"]) < 2
        for key in ("top1", "probe"):
            assert 14 * float(row[key]) == pytest.approx(round(14 * float(row[key])), abs=1e-4)  # of 14 videos
    (folder,) = (path for path in work.glob("frame-*/seed0") if path.is_dir())
    config = load_config(RunFolder(folder / "pretrain").config)
    assert (config.mask.strategy, config.seed, config.train.steps) == ("frame", 0, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["finetune", "log.txt", "pretrain", "probe", "row.json"]


def test_the_same_command_makes_the_same_csv(done: tuple[Path, Path], tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert ablation.main(arguments(work, tmp_path, "adaptive 95 %")) == 0
    assert read_rows(tmp_path).items() <= read_rows(done[1]).items()


def test_error_adaptivity_is_that_of_the_formula(done: tuple[Path, Path]) -> None:
    adaptive = job(case("(a)", "adaptive 95 %"), work=done[0])
    folder = adaptive.folder / "pretrain"
    config, model = load_config(RunFolder(folder).config), AdaMAE.from_pretrained(folder).eval()
    boxed = ablation_runs.read_boxed(adaptive.videos / "val.txt", config, model)
    seeds_B = ablation_runs.draw_seeds(14, config)[0]
    errors, covers = [], []
    for video_CTHW, cover_N, seed in zip(boxed.videos_BCTHW, boxed.coverage_BN, seeds_B, strict=True):
        output = model(video_CTHW[None], seeds=seed[None])
        for i, error in zip(output.masked_ids[0].tolist(), output.error[0].tolist(), strict=True):
            errors.append(error)
            covers.append(cover_N[i])
    share = sum(e * c for e, c in zip(errors, covers, strict=True)) / sum(errors)
    assert ablation_runs.error_adaptivity(model, config, boxed) == pytest.approx(share / (sum(covers) / len(covers)))


def test_masks_are_drawn(done: tuple[Path, Path]) -> None:
    frame = job(case("(a)", "frame 87.5 %"), work=done[0])
    one, three = ablation.mask_picture([frame]), ablation.mask_picture([frame] * 3)
    assert one.width == three.width
    assert one.height < three.height < 3 * one.height  # two rows, four rows


def test_one_failure_is_told_and_keeps_no_other_run(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = done
    tube = job(case("(a)", "tube 90 %"), work=work)
    tube.folder.mkdir(parents=True)
    (tube.folder / "pretrain").write_text("no folder")
    try:
        assert ablation.main(arguments(work, tmp_path, "tube 90 %", "frame 87.5 %")) == 1
    finally:
        shutil.rmtree(tube.folder)
    assert "failed: (a) masking tube 90 %, seed 0: " in capsys.readouterr().err
    frame = ("(a)", "frame 87.5 %")
    assert read_rows(tmp_path) == {frame: read_rows(out)[frame]}


def test_what_is_done_is_not_done_again(done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    work, _ = done
    frame = job(case("(a)", "frame 87.5 %"), work=work)
    monkeypatch.setattr(ablation_runs, "pretrain_once", None)
    assert ablation_runs.run(frame) == json.loads((frame.folder / "row.json").read_text())


def test_without_time_left_what_is_done_is_collected(
    done: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = done
    assert ablation.main([*arguments(work, tmp_path, *NAMES, "tube 90 %"), "--budget", "0"]) == 1
    assert read_rows(tmp_path) == read_rows(out)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    written = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert all(row.pop("curves") for row in written)
    assert printed == written  # curves fill screens


def test_where_nothing_is_done_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunStoppedError, match="no run is done, so nothing was written; the same command goes on"):
        ablation.main([*arguments(tmp_path / "work", tmp_path, "tube 90 %"), "--budget", "0"])
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_rows_of_other_settings_are_dropped(tmp_path: Path) -> None:
    def row(name: str, seed: int, settings: str, top1: str = "0.5") -> dict[str, str]:
        values = {"part": "(a) masking", "case": name, "seed": str(seed), "settings": settings, "top1": top1}
        return {key: values.get(key, "1") for key in COLUMNS}

    path = tmp_path / "ablation_x.csv"
    names = ("tube 90 %", "tube 75 %", "random 90 %")
    before = [
        row("tube 90 %", 1, "new"),
        row("tube 75 %", 0, "old"),
        row("random 90 %", 0, "new"),
        row("gone", 0, "new"),
    ]
    ablation.write_csv(path, before)
    now = [row("random 90 %", 0, "new", "0.7"), row("tube 90 %", 0, "new")]
    settings = {("(a) masking", name): "new" for name in names}
    rows = ablation.merged(ablation.read_csv(path), now, settings)
    assert [(r["case"], r["seed"], r["top1"]) for r in rows] == [
        ("tube 90 %", "0", "0.5"), ("tube 90 %", "1", "0.5"), ("random 90 %", "0", "0.7"),
    ]  # fmt: skip


def test_settings_are_all_that_decides_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    adaptive = case("(a)", "adaptive 95 %")
    before = job(adaptive).settings
    assert job(adaptive, seed=1, work=Path("elsewhere")).settings == before
    assert job(case("(b)", "0.95")).settings == before
    for changed in (replace(QUICK, probe_videos=13), replace(QUICK, finetune_lr=1.0)):
        assert job(adaptive, preset=changed).settings != before
    monkeypatch.setattr(ablation_runs, "REPEATS", 9)
    assert job(adaptive).settings != before
    # A key that a configuration gets, and that by default changes nothing, leaves them as they are.
    assert ablation_runs.changed(ablation_runs.ProbeConfig()) == {}
    assert ablation_runs.changed(LossConfig(error="l1")) == {"error": "l1"}
    recipe = ablation_runs.changed(ablation_runs.pretraining_recipe())
    assert recipe["model"]["size"] == "nano"
    assert recipe["optim"]["warmup_epochs"] == 1
    assert not {"output_dir", "seed", "loss"} & set(recipe)


def test_processes_save_and_end_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(
        "import time\n"
        "from adamae_fast.train.signals import stop_signals\n"
        "def train():\n"
        "    with stop_signals() as received:\n"
        "        print('training', flush=True)\n"
        "        while not received:\n"
        "            time.sleep(0.05)\n"
        "        print('saved after', *received, flush=True)\n"
    )
    (tmp_path / "study.py").write_text(
        "import concurrent.futures, multiprocessing\n"
        "from bench.ablation import _end_with_parent\n"
        "from training import train\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = concurrent.futures.ProcessPoolExecutor(1, context, _end_with_parent)\n"
        "    pool.submit(train).result()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "study.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as study:
        assert study.stdout is not None
        give_up = threading.Timer(120, os.killpg, (study.pid, signal.SIGKILL))
        give_up.start()
        study.stdout.readline()
        study.kill()
        assert study.stdout.readline() == "saved after SIGTERM\n"
        give_up.cancel()
        os.killpg(study.pid, signal.SIGKILL)  # it would be gone a minute later


def test_unknown_rows_are_named(tmp_path: Path) -> None:
    for arguments, message in (
        (
            ["--only", "tube 91 %"],
            '--only "tube 91 %": no row of the table .*; choose from "tube 75 %", "',
        ),
        (["--part", "b", "--only", "tube 75 %"], '--only "tube 75 %": no row .* choose from "0.98", "0.95"'),
        (["--part", "x"], "--part x: choose one of a, b, c, d, e, f, g"),
        (["--processes", "0"], "--processes 0: choose at least 1"),
        (["--seeds", "0", "-1"], "--seeds -1: choose 0 or more"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere: No such file or directory; choose a folder that can be"),
    ):
        with pytest.raises(ValueError, match=message):
            ablation.main(["--quick", "--work", str(tmp_path), *arguments])
    assert next(x.name for x in ablation.cases_of(argparse.Namespace(part="(b)", only=None))) == "0.98"


DID = {
    "pretrain": 10.0,
    "finetune": 5.0,
    "probe": 1.0,
    "commit": "abc",
    "curves": {key: [[1, 1.0], [2, 1.1], [3, 1.2]] for key in ("loss_reconstruction", "motion_lift", "finetune_loss")},
}


def study_of(**top1: list[float]) -> Study:
    """A study whose rows have these accuracies; "adaptive" and the like name rows of part (a)."""
    names = {"adaptive": "adaptive 95 %", "tube": "tube 90 %", "random": "random 90 %", "frame": "frame 87.5 %"}
    rows = []
    for key, values in top1.items():
        for seed, value in zip(SEEDS, values, strict=False):
            figures = {"top1": value, "probe": value / 2, "visible": 6, "tokens": 128, "kept_bytes": 4e6, "error": 0.5}
            figures |= {
                "clamped": 0.0,
                "adaptivity": 2.25 if key == "adaptive" else 1.1 if key == "baseline 0.9" else 1.0,
                "error_adaptivity": 1.5,
                "untrained": 1.1,
                "entropy": 0.9,
            }
            figures["kept_bytes_vitb"] = 290e6
            row = {"part": "(a) masking", "case": names.get(key, key), "seed": str(seed), "settings": key}
            if key not in names:
                row["part"] = SMALL_DATA[0].part
            rows.append({**row, **{name: str(int(x) if x > 1e3 else x) for name, x in figures.items()}})
    taken = {"device": "a CPU", "torch": "2", "commit": "abc", "date": "today", "load": "0"}
    budget = {"num_videos": 28, "num_val": 14, "pretrain_steps": 2, "finetune_steps": 2, "probe_videos": 14}
    budget |= {"batch_size": 4, "frame_size": 32, "size": "pico", "detail": 0.0, "classes": ["sway", "push"]}
    about = {
        "conditions": taken,
        "budget": budget,
        "num_frames": 8,
        "processes": 2,
        "rows": [
            {"part": row["part"], "case": row["case"], "seed": int(row["seed"]), "run": row["case"], **DID}
            for row in rows
        ],
    }
    return Study("ablation_x", rows, about)


def test_findings_follow_from_the_figures() -> None:
    adaptive, random, tube, frame = [0.5, 0.52, 0.54], [0.4, 0.41, 0.42], [0.5, 0.52, 0.51], [0.2, 0.2, 0.2]
    study = study_of(adaptive=adaptive, random=random, tube=tube, frame=frame)
    won = " ".join(ablation_page.findings(study))
    assert "adaptivity of 2.25 ± 0.00 (at least 2 is wanted: met)" in won
    assert "random 90 %, fine-tuned:** 52.0 ± 2.0 % is more than a standard deviation above 41.0 ± 1.0 %" in won
    assert "tube 90 %, fine-tuned:** 52.0 ± 2.0 % is within a standard deviation of 51.0 ± 1.0 %" in won
    assert "**Frame masking**, fine-tuned, has 20.0 ± 0.0 %; the worst of these four is this one." in won
    # Of fine-tuned accuracy, the deviations are 2, 1, 1 and 0 points.
    assert "is 0.0 to 2.0 points, that of the median row 1.0:" in won
    # By plan/work.py, which tests compare with what is counted: of ViT-B the encoder keeps half, the sampler more.
    assert "290 MB for the backward with adaptive masks at 95 %, 252 MB with random ones at 90 %: more" in won
    assert "47 MB in place of 93 MB, but the sampler, which sees all tokens, 84 MB; the decoder 159 MB in either" in won
    verdict = ablation_page.verdict(study)
    assert "more often than random ones, 2.25 times as often as tokens in general (1.10 before training)." in verdict
    assert "is more than a standard deviation above that after random 90 % ones." in verdict
    assert (
        "cannot be told from that after tube 90 % ones: the seeds of a row have a standard deviation of up to 2 p"
        in verdict
    )
    assert ablation_page.verdict(study_of(adaptive=[0.5], random=[0.5])) == ""
    lost = " ".join(ablation_page.findings(study_of(adaptive=[0.1, 0.1], random=random, frame=frame)))
    assert "10.0 ± 0.0 % is more than a standard deviation below 41.0" in lost
    assert "has 20.0 ± 0.0 %; the worst of these four is adaptive 95 %, 10.0 ± 0.0 %." in lost
    assert "10.0 (one seed) % and 41.0 ± 1.0 %, too few seeds to tell" in " ".join(
        ablation_page.findings(study_of(adaptive=[0.1], random=random))
    )


def test_reasons_follow_from_the_figures() -> None:
    def text_of(**top1: list[float]) -> str:
        return " ".join(ablation_page.reasons(study_of(adaptive=[0.5, 0.5], **top1)))

    text = text_of(**{"defaults": [0.5, 0.5], "no dropout": [0.4, 0.6], "baseline 0.9": [0.7, 0.7]})
    assert "own adaptivity is 1.50 ± 0.00, that of the masks 2.25 ± 0.00" in text
    assert "*no dropout* 1.00 ± 0.00; *baseline 0.9* 1.10 ± 0.00." in text
    assert "clamped p, at the end of any run, is 0." in text
    assert "by adaptivity: *baseline 0.9*, 1.10 ± 0.00 (at least 2: missed), the highest of 3 rows" in text
    assert "70.0 ± 0.0 % is more than a standard deviation above 50.0 ± 0.0 % of the defaults" in text
    # A row that lacks a seed competes with none.
    assert "Best setting" not in text_of(**{"defaults": [0.5, 0.5], "baseline 0.9": [0.9]})
    assert "Best setting" not in text_of(**{"no dropout": [0.5, 0.6]})
    assert ablation_page.reasons(study_of(random=[0.5, 0.5])) == []


def test_page_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(adaptive=[0.5, 0.52], random=[0.4, 0.41])
    text = ablation_page.page(study)
    assert "| **adaptive 95 %** | 95.3% | 51.0 ± 1.4 | 25.5 ± 0.7 | 2.25 ± 0.00 | 1.50 ± 0.00 |" in text
    assert "| tube 75 % | not measured |" in text
    assert text.count("\n## ") == 4  # findings, why, the table, again
    assert text.count("\n### ") == 8  # six parts of the paper, none, little data
    for number, figure in enumerate((ablation_page.picture(study), ablation_page.curves(study))):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    """And they are those of the preset as it is."""
    study = Study.read(sorted(RESULTS.glob("ablation_*.csv"))[0])
    assert ablation_page.PAGE.read_text() == ablation_page.page(study)
    assert f"\n{ablation_page.verdict(study)}\n" in README.read_text()
    settings = {(x.part, x.name): job(x, preset=PRESETS["cpu"]).settings for x in ROWS}
    assert [row["settings"] for row in study.rows] == [settings[row["part"], row["case"]] for row in study.rows]


def test_a_study_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such CSV with its JSON beside it"):
        ablation_page.main([str(tmp_path / "ablation_x.csv")])


def test_a_measurement_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error, status, line in (
        (ValueError("--steps 0"), 2, "error: --steps 0\n"),
        (RunStoppedError("a process was killed"), 1, "stopped: a process was killed\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
    ):

        def main(arguments: list[str] | None, error: BaseException = error) -> int:
            raise error

        with pytest.raises(SystemExit) as ended:
            command.run(main)
        assert (ended.value.code, capsys.readouterr().err) == (status, line)


def test_spread() -> None:
    assert Spread.of([1.0, 2.0, 4.0]).std == pytest.approx(math.sqrt(7 / 3))
    assert Spread.of([0.5]).shown(100) == "50.0 (one seed)"
