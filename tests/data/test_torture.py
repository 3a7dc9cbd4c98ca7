"""Every decoder, in the real loader, against files that are broken or strange."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
import torch

from adamae_fast.config import DataConfig, DecoderName, ModelConfig, PretrainConfig, TrainConfig
from adamae_fast.data import dataset as dataset_module
from adamae_fast.data.clips import View, apply_view, center_box, epoch_order
from adamae_fast.data.dali import dali_is_installed
from adamae_fast.data.decode import VideoError, decord_is_installed, open_video
from adamae_fast.data.loader import clip_batches
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import Quarantine
from adamae_fast.run_folder import read_json_lines
from tests.data.torture import NUM_FRAMES, TortureFile, write_torture_set

INSTALLED = {"auto": True, "pyav": True, "decord": decord_is_installed(), "dali": dali_is_installed()}
DECODERS = [name for name in get_args(DecoderName) if INSTALLED[name]]
FRAME_SIZE, SEED = 16, 3


@pytest.fixture(scope="module")
def torture_set(tmp_path_factory: pytest.TempPathFactory) -> list[TortureFile]:
    return write_torture_set(tmp_path_factory.mktemp("torture"))


@pytest.fixture(autouse=True)
def many_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of the files are bad, so that ten of them in a row are no rarity."""
    monkeypatch.setattr(dataset_module, "MAX_ATTEMPTS", 1000)


def _deliver(
    paths: list[Path], decoder: DecoderName, folder: Path, stride: int = 1
) -> tuple[dict[Path, torch.Tensor], dict[Path, str]]:
    """One epoch: the clip of each video that was read, and the reason of each that stands in quarantine."""
    config = PretrainConfig(
        model=ModelConfig(num_frames=NUM_FRAMES, frame_size=FRAME_SIZE, patch_size=8),
        data=DataConfig(stride=stride, crop="center", decoder=decoder, num_workers=2, max_bad_share=1.0, timeout=30),
        train=TrainConfig(batch_size=1),
        seed=SEED,
    )
    quarantine = Quarantine(folder / "quarantine.jsonl", len(paths), 1.0)
    clips = {}
    entries = [Entry(str(path), None) for path in paths]
    batches = clip_batches(config, entries, 0, len(entries))
    for sample, batch in zip(epoch_order(SEED, 0, len(paths)), batches, strict=True):
        quarantine.add(batch.bad)
        if str(paths[sample]) not in {bad.path for bad in batch.bad}:
            clips[paths[sample]] = batch.video[0]
    return clips, {Path(line["path"]): line["reason"] for line in read_json_lines(folder / "quarantine.jsonl")}


def _truth(path: Path) -> torch.Tensor | None:
    """The clip by a complete decode from the beginning; None for a file that does not decode to its end."""
    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                return None
            stream.thread_count = 1  # how damage is hidden depends on it
            # Pictures of one time count as one.
            first_of_time = {f.pts: f for f in reversed(list(container.decode(stream)))}
            frames = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in first_of_time.values()][::-1]
    except (av.error.FFmpegError, OSError):
        return None
    if not frames:
        return None
    shown_THWC = np.stack([frames[min(t, len(frames) - 1)] for t in range(NUM_FRAMES)])
    return apply_view(shown_THWC, View(center_box(*shown_THWC.shape[1:3])), FRAME_SIZE)


def test_what_the_set_says_of_its_files(torture_set: list[TortureFile]) -> None:
    assert len({file.path for file in torture_set}) == len(torture_set) >= 60
    for file in torture_set:
        assert file.verdict == "damaged" or (_truth(file.path) is not None) == (file.verdict == "good"), file.path
    damaged = [_truth(file.path) is not None for file in torture_set if file.verdict == "damaged"]
    assert min(sum(damaged), len(damaged) - sum(damaged)) >= 10


@pytest.mark.parametrize("decoder", DECODERS)
def test_torture(torture_set: list[TortureFile], decoder: DecoderName, tmp_path: Path) -> None:
    clips, reasons = _deliver([file.path for file in torture_set], decoder, tmp_path)
    for file in torture_set:
        truth = _truth(file.path)
        refused = decoder == "decord" and (
            file.refused_by_decord or (file.verdict == "damaged" and file.path in reasons)
        )
        if truth is None or refused:
            assert file.path not in clips, file.path
            assert reasons[file.path], file.path
        else:
            assert file.path in clips, f"{file.path}: {reasons.get(file.path)}"
            assert file.path not in reasons, file.path
            difference = clips[file.path].float() - truth
            if (
                decoder == "dali"
            ):  # it interpolates colours between chroma samples, FFmpeg repeats them: brightness alone
                difference = (difference * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(0)
            # One frame differs from the next by far more.
            assert difference.abs().mean() <= 3, file.path


def test_times_out_of_order_name_no_frames(torture_set: list[TortureFile]) -> None:
    (path,) = (str(file.path) for file in torture_set if file.path.name == "unordered_times.mov")
    with av.open(path) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for decoder in DECODERS:
        with closing(open_video(path, decoder)) as video:
            assert video.num_frames == len(truth) == NUM_FRAMES
            if decoder == "decord":
                with pytest.raises(VideoError, match="time stamps are missing or guessed"):
                    video.read([3])
            else:
                assert all(np.array_equal(video.read([i])[0], truth[i]) for i in range(NUM_FRAMES))


@pytest.mark.parametrize("decoder", DECODERS)
def test_awkward_real_files(shared_clips: Path, decoder: DecoderName, tmp_path: Path) -> None:
    """Of clips with a stride of 100, first and last frame are needed; one file does not decode to its end."""
    paths = sorted((shared_clips / "bad").iterdir())
    clips, reasons = _deliver(paths, decoder, tmp_path, stride=100)
    refused = {"corrupted.mp4"} | ({"discard_first_keyframe.mp4"} if decoder == "decord" else set())
    assert {path.name for path in reasons} == refused
    assert {path.name for path in clips} == {path.name for path in paths} - refused
    assert all(reasons.values())
