"""The main job on files as they come: several codecs and sizes, and every kind of broken one."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from rich.console import Console

from adamae_fast.config import (
    DataConfig,
    LogConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
)
from adamae_fast.data.quarantine import DataStoppedError, TooManyBadVideosError
from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train.pretrain import pretrain


def config(output_dir, manifest, *, steps, batch_size=4, **data):
    return PretrainConfig(
        output_dir=str(output_dir),
        model=ModelConfig(size="nano", num_frames=4, frame_size=32, patch_size=8),
        mask=MaskConfig(ratio=0.75),
        data=DataConfig(**{"manifest": str(manifest), "num_workers": 0, **data}),
        optim=OptimConfig(base_lr=0.1, min_lr=0.01, warmup_epochs=80),
        train=TrainConfig(steps=steps, batch_size=batch_size, precision="fp32", device="cpu"),
        log=LogConfig(every=1, tensorboard=False),
    )


def test_twenty_steps_on_real_clips(shared_clips, tmp_path):
    summary = pretrain(config(tmp_path, shared_clips / "good", steps=20), Console(quiet=True))
    metrics = read_json_lines(RunFolder(tmp_path).metrics)
    losses = [line["loss"] for line in metrics]
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert summary["quarantined"] == 0


@pytest.fixture
def broken_files(tmp_path, tiny_videos):
    """A folder of files that are no videos; all of them have a video's name."""
    import av
    import numpy as np

    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("these are words\n" * 100)
    (folder / "half.mp4").write_bytes(tiny_videos[0].read_bytes()[:300])
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return folder


def test_broken_files_are_quarantined_and_replaced(broken_files, tiny_videos, tmp_path):
    manifest = tmp_path / "manifest.txt"
    broken = [*sorted(broken_files.iterdir()), broken_files / "missing.mp4"]
    manifest.write_text("".join(f"{path} 0\n" for path in (*broken, *tiny_videos)))
    output_dir = tmp_path / "run"
    summary = pretrain(config(output_dir, manifest, steps=5, max_bad_share=0.6), Console(quiet=True))
    run = RunFolder(output_dir)
    lines = [json.loads(line) for line in run.quarantine.read_text().splitlines()]
    assert Counter(line["path"] for line in lines) == Counter(map(str, broken))
    assert all(line["reason"] for line in lines)
    assert summary["quarantined"] == read_json_lines(run.metrics)[-1]["quarantined"] == 5
    assert "missing.mp4" in run.report.read_text()


def test_too_many_broken_files_stop_the_run(broken_files, tiny_videos, tmp_path):
    manifest = tmp_path / "manifest.txt"
    manifest.write_text("".join(f"{path} 0\n" for path in (*sorted(broken_files.iterdir()), *tiny_videos)))
    with pytest.raises(TooManyBadVideosError, match=r"of 9 videos .*data\.max_bad_share=0\.05"):
        pretrain(config(tmp_path / "run", manifest, steps=5), Console(quiet=True))


def test_a_run_that_its_data_stops_keeps_what_it_did(broken_files, tiny_videos, tmp_path):
    good, all_bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("".join(f"{path}\n" for path in tiny_videos))
    all_bad.write_text("".join(f"{path}\n" for path in sorted(broken_files.iterdir())))
    run = RunFolder(tmp_path / "run")
    pretrain(config(run.path, good, steps=2), Console(quiet=True))
    with pytest.raises(DataStoppedError, match="unreadable"):
        pretrain(config(run.path, all_bad, steps=5, max_bad_share=1.0), Console(quiet=True))
    assert run.list_checkpoints()[-1] == run.checkpoint(2)
    quarantined = {json.loads(line)["path"] for line in run.quarantine.read_text().splitlines()}
    assert quarantined == set(map(str, broken_files.iterdir()))


def test_awkward_real_files_never_end_a_run(shared_clips, tmp_path):
    summary = pretrain(config(tmp_path, shared_clips / "bad", steps=4, max_bad_share=1.0), Console(quiet=True))
    assert summary["step"] == 4
    quarantined = RunFolder(tmp_path).quarantine
    lines = quarantined.read_text().splitlines() if quarantined.exists() else []
    assert len(lines) == summary["quarantined"]
