from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adamae_fast.config import DataConfig
from adamae_fast.data.dataset import PretrainClips
from adamae_fast.data.decode import decord_is_installed
from adamae_fast.data.manifest import read_manifest
from bench import data, videos

pytestmark = pytest.mark.skipif(not decord_is_installed(), reason="decord is not installed")

FILM = replace(videos.K400, width=64, height=48, num_frames=40, keyint=40, stride=2)


def test_arms_show_the_same_frames_and_crops(tmp_path: Path) -> None:
    """PIL and fp32 against ours: one level for each of two roundings."""
    entries = read_manifest(str(videos.write(FILM, tmp_path, 2)))
    clips = PretrainClips(entries, DataConfig(stride=FILM.stride), data.NUM_FRAMES, data.FRAME_SIZE, data.SEED)
    for position in range(4):
        sample, epoch = clips[position], position // 2
        theirs = data.read_like_published(FILM, entries[sample.shown].path, epoch, sample.shown)
        pixels = (theirs.permute(1, 2, 3, 0) * data.STD + data.MEAN) * 255
        assert (pixels.permute(3, 0, 1, 2) - sample.video[0].float()).abs().max() <= 2


def test_every_arm_has_a_row(tmp_path: Path) -> None:
    entries = read_manifest(str(videos.write(FILM, tmp_path, 1)))
    rows = data.measure(FILM, {"original": entries, "prepared": entries}, ("pyav",), 2, lambda what: None)
    ours = [(files, "ours-pyav", repeat) for files in ("original", "prepared") for repeat in data.REPEATS]
    baselines = [("original", "plain", 1), ("original", "published-like", 1)]
    assert [(row["files"], row["arm"], row["repeat"]) for row in rows] == [*baselines, *ours]
    assert all(row["clips_per_s"] > 0 and row["cpu_s_per_clip"] > 0 for row in rows)


def test_goals_are_ratios_of_rows() -> None:
    keys = {(*arm, workers) for _, mine, theirs, workers, _ in data.GOALS for arm in (mine, theirs)}
    names = ("files", "arm", "repeat", "workers")
    rows = [{"data": "k400", **dict(zip(names, key, strict=True)), "clips_per_s": 10.0} for key in sorted(keys)]
    for row in rows:
        if row["files"] == "prepared":
            row["clips_per_s"] = 26.0
    judged = {goal["goal"]: (goal["measured"], goal["met"]) for goal in data.judge(rows)}
    assert judged.pop("prepared files over originals with a long GOP") == (2.6, True)
    assert judged.pop("ours with decord over a plain loop of decord") == (1.0, True)
    assert set(judged.values()) == {(1.0, False)}
    assert len(judged) == len(data.GOALS) - 2
