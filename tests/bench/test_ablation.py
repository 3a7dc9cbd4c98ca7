"""The table in miniature: a row is what its configuration says, done once, and the page says what came out."""

from __future__ import annotations

import csv
import json
import math
import pickle
from pathlib import Path

import pytest

from adamae_fast.config import load_config
from adamae_fast.run_folder import RunFolder
from bench import ablation, ablation_page, table1
from bench.ablation import COLUMNS, PRESETS, ROWS, SEEDS, SMALL_DATA, Job
from bench.ablation_page import Spread, Study
from bench.report import RESULTS

QUICK = PRESETS["quick"]


def case(part: str, name: str) -> table1.Case:
    return next(x for x in ROWS if (x.part[:3], x.name) == (part, name))


def job(of: table1.Case, seed: int = 0, work: Path = Path("work"), preset: ablation.Preset = QUICK) -> Job:
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
    load_config(ablation.PRETRAINING, overrides)


def test_a_job_is_the_same_in_another_process() -> None:
    for each in (job(x) for x in ROWS):
        copy = pickle.loads(pickle.dumps(each))
        assert (copy.folder, copy.overrides(), copy.is_scratch) == (each.folder, each.overrides(), each.is_scratch)
    assert [x.name for x in ROWS if job(x).is_scratch] == ["scratch"]


def test_shares_of_the_length() -> None:
    preset = PRESETS["cpu"]
    steps = [job(x, preset=preset).overrides()["train.steps"] for x in table1.CASES if x.part[:3] == "(e)"]
    assert steps == [round(preset.pretrain_steps * share) for share in (1 / 4, 5 / 8, 3 / 4, 1)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One row, really trained; the command then finds it done."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out")
    ablation.prepare(QUICK, work)
    ablation.run(job(case("(a)", "frame 87.5 %"), work=work))
    folders = ["--work", str(work), "--out", str(out)]
    assert ablation.main(["--quick", "--seeds", "0", *folders, "--processes", "1", "--only", "frame 87.5 %"]) == 0
    return work, out


def read_rows(out: Path) -> list[dict[str, str]]:
    (path,) = out.glob("ablation_*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_figures(done: tuple[Path, Path]) -> None:
    work, out = done
    (frame,) = read_rows(out)
    assert tuple(frame) == COLUMNS
    assert (frame["case"], frame["visible"], frame["tokens"]) == ("frame 87.5 %", "16", "64")
    # Whole frames hold the moving boxes as often as all frames do, but for chance.
    assert 0.3 < float(frame["adaptivity"]) < 2
    assert frame["entropy"] == frame["untrained"] == ""
    for key in ("top1", "probe"):
        assert 14 * float(frame[key]) == pytest.approx(round(14 * float(frame[key])), abs=1e-4)  # of 14 videos
    (folder,) = (path for path in work.glob("*/frame-*/seed0") if path.is_dir())
    config = load_config(RunFolder(folder / "pretrain").config)
    assert (config.mask.strategy, config.seed, config.train.steps) == ("frame", 0, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["finetune", "log.txt", "pretrain", "probe", "row.json"]


def test_masks_are_drawn(done: tuple[Path, Path]) -> None:
    frame = job(case("(a)", "frame 87.5 %"), work=done[0])
    one, three = ablation.mask_picture([frame]), ablation.mask_picture([frame] * 3)
    assert one.width == three.width
    assert one.height < three.height < 3 * one.height  # two rows, four rows


def test_what_is_done_is_not_done_again(done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    work, _ = done
    frame = job(case("(a)", "frame 87.5 %"), work=work)
    monkeypatch.setattr(ablation, "pretrain_once", None)
    assert ablation.run(frame) == json.loads((frame.folder / "row.json").read_text())


def test_without_time_left_what_is_done_is_collected(done: tuple[Path, Path], tmp_path: Path) -> None:
    work, out = done
    arguments = ["--quick", "--seeds", "0", "1", "--work", str(work), "--out", str(tmp_path), "--processes", "1"]
    assert ablation.main([*arguments, "--only", "frame 87.5 %", "tube 90 %", "--budget", "0"]) == 1
    assert read_rows(tmp_path) == read_rows(out)


def test_rows_of_other_settings_are_dropped(tmp_path: Path) -> None:
    def row(name: str, seed: int, settings: str, top1: str = "0.5") -> dict[str, str]:
        values = {"part": "(a) masking", "case": name, "seed": str(seed), "settings": settings, "top1": top1}
        return {key: values.get(key, "1") for key in COLUMNS}

    path = tmp_path / "ablation_x.csv"
    ablation.write_csv(path, [row("tube 90 %", 1, "new"), row("tube 75 %", 0, "old"), row("random 90 %", 0, "new")])
    rows = ablation.merged(ablation.read_csv(path), [row("random 90 %", 0, "new", "0.7"), row("tube 90 %", 0, "new")])
    assert [(r["case"], r["seed"], r["top1"]) for r in rows] == [
        ("tube 90 %", "0", "0.5"), ("tube 90 %", "1", "0.5"), ("random 90 %", "0", "0.7"),
    ]  # fmt: skip


def test_unknown_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tube 91 % is no row of the table; choose from tube 75 %"):
        ablation.main(["--quick", "--only", "tube 91 %", "--work", str(tmp_path)])
    with pytest.raises(ValueError, match="--processes -1: choose at least 1"):
        ablation.main(["--processes", "-1"])


DID = {
    "pretrain": 10.0,
    "finetune": 5.0,
    "probe": 1.0,
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
                "adaptivity": 2.25 if key == "adaptive" else 1.0,
                "untrained": 1.1,
                "entropy": 0.9,
            }
            figures["kept_bytes_vitb"] = 290e6 if key == "adaptive" else 300e6
            row = {"part": "(a) masking", "case": names.get(key, key), "seed": str(seed), "settings": "x"}
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
    won = " ".join(ablation_page.findings(study_of(adaptive=adaptive, random=random, tube=tube, frame=frame)))
    assert "adaptivity of 2.25 ± 0.00 (at least 2 is wanted: met)" in won
    assert "against random 90 %, fine-tuned.** 52.0 ± 2.0 % against 41.0 ± 1.0 %: better by more" in won
    assert "against tube 90 %, fine-tuned.** 52.0 ± 2.0 % against 51.0 ± 1.0 %: equal within" in won
    assert "**Frame masking** is the worst" in won
    assert "290 MB for the backward with adaptive masks at 95 %, 300 MB with random ones at 90 %: less" in won
    lost = " ".join(ablation_page.findings(study_of(adaptive=[0.1, 0.1], random=random, frame=frame)))
    assert "worse by more than a standard deviation" in lost
    assert "not the worst, adaptive 95 % is" in lost
    assert "little data" not in lost


def test_findings_about_little_data_follow_from_the_figures() -> None:
    def text_of(**top1: list[float]) -> str:
        return " ".join(ablation_page.small_data_findings(study_of(**top1)))

    won = text_of(**{"defaults": [0.5, 0.5], "no dropout": [0.4, 0.6], "baseline 0.9": [0.7, 0.7]})
    assert "has the highest adaptivity, 1.00 ± 0.00 (at least 2: missed)" in won
    assert "*baseline 0.9*, 70.0 ± 0.0 % against 50.0 ± 0.0 %: better by more than" in won
    lost = text_of(**{"defaults": [0.7, 0.7], "no dropout": [0.5, 0.5]})
    assert "No other setting" in lost
    assert "Best setting" not in lost
    assert text_of(**{"no dropout": [0.5]}) == text_of(defaults=[0.5]) == ""


def test_page_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(adaptive=[0.5, 0.52], random=[0.4, 0.41])
    text = ablation_page.page(study)
    assert "| **adaptive 95 %** | 6 of 128 | 51.0 ± 1.4 | 25.5 ± 0.7 | 2.25 ± 0.00 |" in text
    assert "| tube 75 % | not measured |" in text
    assert text.count("\n## ") == 10  # findings, six parts of the paper, none, little data, again
    for number, figure in enumerate((ablation_page.picture(study), ablation_page.curves(study))):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    """And they are those of the preset as it is."""
    study = Study.read(sorted(RESULTS.glob("ablation_*.csv"))[0])
    assert ablation_page.PAGE.read_text() == ablation_page.page(study)
    assert {row["settings"] for row in study.rows} == {ablation.settings_of(PRESETS["cpu"])}


def test_spread() -> None:
    assert Spread.of([1.0, 2.0, 4.0]).std == pytest.approx(math.sqrt(7 / 3))
    assert Spread.of([0.5]).shown(100) == "50.0 (one seed)"
