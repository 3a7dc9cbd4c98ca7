from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import dataloader

from adamae_fast.config import DecoderName
from adamae_fast.config_finetune import LabelledDataConfig, ViewsConfig
from adamae_fast.data import dataset as dataset_module
from adamae_fast.data.clips import View, apply_view
from adamae_fast.data.dataset import PretrainClips
from adamae_fast.data.decode import VideoFile, open_entry, open_video
from adamae_fast.data.labelled import (
    EvaluationViews,
    LabelledBatch,
    ViewBatch,
    labelled_batches,
    read_labels,
    view_batches,
)
from adamae_fast.data.manifest import Entry, ManifestError, read_manifest
from adamae_fast.data.quarantine import BadVideo
from adamae_fast.data.views import spatial_box

NUM_FRAMES, FRAME_SIZE = 4, 16
BROKEN = 2


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> list[Entry]:
    """Seven videos of 16 to 22 frames with labels 10 to 16, the third of them broken, the last one upright."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [write_video(folder / f"{i}.mp4", 16 + i) for i in range(6)]
    paths.append(write_video(folder / "6.mp4", 22, height=64, width=48))
    paths[BROKEN].write_text("no video")
    return [Entry(str(path), 10 + i) for i, path in enumerate(paths)]


def _labelled(
    entries: Sequence[Entry], num_batches: int, start_batch: int = 0, batch_size: int = 4, **config: object
) -> list[LabelledBatch]:
    data = LabelledDataConfig(**{"num_workers": 0, "stride": 2, **config})  # type: ignore[arg-type]
    batches = labelled_batches(
        entries,
        [entry.label for entry in entries],  # type: ignore[misc]
        data,
        num_frames=NUM_FRAMES,
        frame_size=FRAME_SIZE,
        seed=5,
        batch_size=batch_size,
        start_batch=start_batch,
        num_batches=num_batches,
    )
    return list(batches)


def _views(
    entries: Sequence[Entry],
    views: ViewsConfig,
    batch_size: int = 12,
    rank: int = 0,
    world_size: int = 1,
    **config: object,
) -> list[ViewBatch]:
    data = LabelledDataConfig(**{"num_workers": 0, "stride": 2, "max_bad_share": 1.0, **config})  # type: ignore[arg-type]
    sizes = {"num_frames": NUM_FRAMES, "frame_size": FRAME_SIZE, "batch_size": batch_size}
    return list(view_batches(entries, data, views, rank=rank, world_size=world_size, **sizes))


def test_defaults_are_the_recipe_of_k400() -> None:
    data, views = LabelledDataConfig(), ViewsConfig()
    assert (data.sampling, data.stride, data.crop, data.random_resized_scale) == (
        "dense",
        4,
        "random_resized",
        (0.08, 1),
    )
    assert (views.temporal, views.spatial) == (5, 3)
    with pytest.raises(ValueError, match=r"data\.repeat=0: choose at least 1"):
        LabelledDataConfig(repeat=0)


def test_labels_follow_the_video_that_is_shown(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int | None] = []

    def keep(entry: Entry, decoder: DecoderName) -> VideoFile:
        video = open_entry(entry, decoder)
        opened.append(entry.label)
        return video

    monkeypatch.setattr(dataset_module, "open_entry", keep)
    batches = _labelled(entries, 7, repeat=2)  # 14 videos, two epochs
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [label for label in opened for _ in range(2)]
    assert 10 + BROKEN not in opened
    bad = [video for batch in batches for video in batch.bad]
    assert [video.path for video in bad] == [entries[BROKEN].path] * 2
    assert all(batch.video.shape == (4, 3, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE) for batch in batches)
    seen = Counter(labels.tolist())
    assert sum(seen.values()) == 28
    assert all(seen[entry.label] >= 4 for i, entry in enumerate(entries) if i != BROKEN)


def test_crops_are_those_of_pre_training(entries: list[Entry]) -> None:
    config = {"repeat": 2, "flip": True, "crop": "multi_scale", "stride": 3}
    clips = PretrainClips(entries, LabelledDataConfig(**config), NUM_FRAMES, FRAME_SIZE, 5)  # type: ignore[arg-type]
    for i, batch in enumerate(_labelled(entries, 3, **config)):
        assert torch.equal(batch.video, torch.cat([clips[p].video for p in range(2 * i, 2 * i + 2)]))


def test_repeats_share_their_frames(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch, numbers: Callable[[np.ndarray], list[int]]
) -> None:
    seen: list[tuple[list[int], View]] = []

    def keep(frames: np.ndarray, view: View, frame_size: int) -> torch.Tensor:
        seen.append((numbers(frames), view))
        return apply_view(frames, view, frame_size)

    monkeypatch.setattr(dataset_module, "apply_view", keep)
    _labelled(entries[:1], 5, batch_size=3, repeat=3, sampling="segments")
    for i in range(0, 15, 3):
        ids, views = zip(*seen[i : i + 3], strict=True)
        assert ids[0] == ids[1] == ids[2]
        assert all(4 * segment <= frame < 4 * segment + 4 for segment, frame in enumerate(ids[0]))  # 16 frames
        assert len(set(views)) == 3
    assert len({tuple(ids) for ids, _ in seen}) > 1


def test_workers_and_resuming_do_not_change_labelled_batches(entries: list[Entry]) -> None:
    alone = _labelled(entries, 5, sampling="segments")
    for others in (
        _labelled(entries, 5, sampling="segments", num_workers=2),
        alone[:2] + _labelled(entries, 5, 2, sampling="segments"),
    ):
        for a, b in zip(alone, others, strict=True):
            assert torch.equal(a.video, b.video)
            assert torch.equal(a.labels, b.labels)
            assert a.bad == b.bad


def test_labels_of_a_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = tmp_path / "train.csv"
    (tmp_path / "a.mp4").touch()
    manifest.write_text("a.mp4 0\nb.mp4 2\nc.mp4 1\n")
    entries = read_manifest(str(manifest))
    assert read_labels(entries, str(manifest)) == ([0, 2, 1], 3)
    assert read_labels(entries, str(manifest), 5) == ([0, 2, 1], 5)
    assert not caplog.records
    with pytest.raises(ManifestError, match=r"train\.csv: .*b\.mp4 has label 2, but there are 2 classes, 0 to 1"):
        read_labels(entries, str(manifest), 2)
    assert read_labels([entries[1]], str(manifest)) == ([2], 3)
    assert "of 3 classes, 2 have no video: 0, 1 (the largest label, 2, is that of" in caplog.text
    assert "b.mp4)" in caplog.text
    for line in ("d.mp4", "d.mp4 -1", "d.mp4 0 -1"):
        manifest.write_text(f"a.mp4 0\n{line}\n")
        with pytest.raises(ManifestError, match=r"train\.csv: .*d\.mp4 has no label"):
            read_labels(read_manifest(str(manifest)), str(manifest))
    manifest.write_text("a.mp4 0\nb.mp4 100000000000000000\n")
    with pytest.raises(ManifestError, match=r"b\.mp4 has label 100000000000000000, but labels below 1,000,000"):
        read_labels(read_manifest(str(manifest)), str(manifest))


@pytest.mark.parametrize("sampling", ["dense", "segments"])
def test_views_show_the_frames_and_squares_that_they_name(entries: list[Entry], sampling: str) -> None:
    views = ViewsConfig(temporal=2, spatial=3)
    (batch,) = _views(entries[4:5], views, sampling=sampling)
    assert batch.ids.tolist() == [0] * 6
    ids = {"dense": [[0, 2, 4, 6], [12, 14, 16, 18]], "segments": [[0, 5, 10, 15], [2, 7, 12, 17]]}[sampling]
    with closing(open_video(entries[4].path)) as video:  # 20 frames
        expected = [
            apply_view(video.read(ids[k]), View(spatial_box(s, 3, 48, 64)), FRAME_SIZE)
            for k in (0, 1)
            for s in range(3)
        ]
    assert torch.equal(batch.video, torch.stack(expected))


def test_one_view_is_the_centre_clip(entries: list[Entry]) -> None:
    centre = LabelledDataConfig(num_workers=0, stride=2, crop="center")
    for index, (start, stride) in ((0, (4, 2)), (6, (7, 2))):
        (batch,) = _views(entries[index : index + 1], ViewsConfig(temporal=1, spatial=1), stride=centre.stride)
        with closing(open_video(entries[index].path)) as video:
            frames = video.read([start + stride * i for i in range(4)])
        height, width = frames.shape[1:3]
        assert torch.equal(batch.video[0], apply_view(frames, View(spatial_box(0, 1, height, width)), FRAME_SIZE))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 13), (2, 12), (3, 6), (9, 100)])
def test_every_view_of_every_video_once_on_any_number_of_ranks(
    entries: list[Entry], world_size: int, batch_size: int
) -> None:
    twice = [*entries, entries[0]]  # the same path in two lines is two videos
    views = ViewsConfig(temporal=2, spatial=3)
    seen: Counter[int] = Counter()
    bad: list[BadVideo] = []
    pixels: dict[int, torch.Tensor] = {}
    for rank in range(world_size):
        for batch in _views(twice, views, batch_size, rank, world_size):
            assert batch.video.dtype == torch.uint8
            assert batch.video.shape == (len(batch.ids), 3, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE)
            assert len(batch.ids) <= max(6, batch_size)
            seen.update(batch.ids.tolist())
            bad += batch.bad
            pixels.update({int(i): batch.video[batch.ids == i] for i in batch.ids.unique()})
    assert seen == {i: 6 for i in range(8) if i != BROKEN}
    assert [video.path for video in bad] == [entries[BROKEN].path]
    (alone,) = _views([twice[5]], views)
    assert torch.equal(pixels[5], alone.video)
    assert torch.equal(pixels[0], pixels[7])


def test_a_batch_without_a_readable_video(entries: list[Entry]) -> None:
    batches = _views(entries[BROKEN : BROKEN + 1], ViewsConfig(), num_workers=1)
    assert [(batch.video.shape[0], batch.ids.tolist(), len(batch.bad)) for batch in batches] == [(0, [], 1)]


def test_a_video_that_crashes_its_worker_is_listed_once(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    def open_or_die(entry: Entry, decoder: DecoderName) -> VideoFile:
        if entry.label == 13:
            assert multiprocessing.parent_process() is not None
            faulthandler.disable()  # pytest's; it would print a traceback
            os.kill(os.getpid(), signal.SIGABRT)
        return open_entry(entry, decoder)

    monkeypatch.setattr(dataset_module, "open_entry", open_or_die)
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))
    batches = _views(entries, ViewsConfig(temporal=1, spatial=1), 2, num_workers=1)
    assert [i for batch in batches for i in batch.ids.tolist()] == [0, 1, 4, 5, 6]
    bad = [video for batch in batches for video in batch.bad]
    assert [(video.path, video.crashed) for video in bad] == [(entries[2].path, False), (entries[3].path, True)]
    assert bad[1].reason == "crashed the decoder (SIGABRT)"


def test_a_known_crasher_is_not_opened(entries: list[Entry]) -> None:
    data = LabelledDataConfig(num_workers=0)
    known = {entries[1].path: "crashed the decoder (SIGSEGV)"}
    sample = EvaluationViews(entries, data, ViewsConfig(), NUM_FRAMES, FRAME_SIZE, known)[1]
    assert sample.bad == (BadVideo(entries[1].path, "crashed the decoder (SIGSEGV)", crashed=True),)
    assert sample.video.shape[0] == 0


def test_a_missing_decoder_is_reported_at_once(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamae_fast.data.decode.decord_is_installed", lambda: False)
    sizes = {"num_frames": NUM_FRAMES, "frame_size": FRAME_SIZE, "batch_size": 6}
    with pytest.raises(ValueError, match="decord is not installed"):
        view_batches(entries, LabelledDataConfig(decoder="decord"), ViewsConfig(), **sizes)


def test_dali_finds_the_same_frames_and_labels(
    entries: list[Entry], tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    pytest.importorskip("nvidia.dali")
    paths = [write_video(tmp_path / f"{i}.webm", 60, codec="libvpx-vp9", options={"g": "8"}) for i in range(2)]
    mixed = [*entries[:3], *(Entry(str(path), 20 + i) for i, path in enumerate(paths))]
    config = {"sampling": "segments", "crop": "center", "repeat": 2}
    by_dali, by_cpu = (_labelled(mixed, 5, decoder=decoder, **config) for decoder in ("dali", "pyav"))
    for a, b in zip(by_dali, by_cpu, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert a.bad == b.bad
        assert (a.video.int() - b.video.int()).abs()[..., 1:-1, 1:-1].float().mean() < 2
    shown = Counter(label for batch in by_dali for label in batch.labels.tolist())
    assert set(shown) == {10, 11, 20, 21}
