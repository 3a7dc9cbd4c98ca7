from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adamae_fast.config import DataConfig, DecoderName
from adamae_fast.data import dataset as dataset_module
from adamae_fast.data.clips import ClipPlan, View, apply_view, center_box, plan_clip
from adamae_fast.data.dataset import NOTHING, ClipSample, EncodedSample, NoReadableVideoError, PretrainClips
from adamae_fast.data.decode import VideoError, VideoFile, decord_is_installed, open_entry, open_video
from adamae_fast.data.manifest import Entry
from adamae_fast.data.quarantine import BadVideo
from adamae_fast.errors import RunStoppedError

NUM_VIDEOS = 5
NUM_FRAMES, FRAME_SIZE = 4, 16


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> list[Entry]:
    """Videos of 12, 16, 20, 24 and 28 frames, labelled 0 to 4."""
    folder = tmp_path_factory.mktemp("videos")
    return [Entry(str(write_video(folder / f"{i}.mp4", 12 + 4 * i)), i) for i in range(NUM_VIDEOS)]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Labels of the videos that were opened without an error, in this order."""
    labels: list[int | None] = []

    def keep(entry: Entry, decoder: DecoderName) -> VideoFile:
        video = open_entry(entry, decoder)
        labels.append(entry.label)
        return video

    monkeypatch.setattr(dataset_module, "open_entry", keep)
    return labels


@pytest.fixture
def empty_cache() -> Iterator[None]:
    dataset_module.decoded_videos.cache_clear()
    yield
    dataset_module.decoded_videos.cache_clear()


def _clips(entries: Sequence[Entry], seed: int = 0, num_frames: int = NUM_FRAMES, **config: object) -> PretrainClips:
    return PretrainClips(entries, DataConfig(**config), num_frames, FRAME_SIZE, seed)  # type: ignore[arg-type]


def test_a_sample(entries: list[Entry]) -> None:
    sample = _clips(entries, repeat=3)[0]
    assert (sample.video.shape, sample.video.dtype) == ((3, 3, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE), torch.uint8)
    assert sample.bad == ()


def test_every_epoch_shows_every_video_once_in_another_order(entries: list[Entry], shown: list[int]) -> None:
    for clips in (_clips(entries), _clips(entries, seed=1)):
        for position in range(4 * NUM_VIDEOS):
            clips[position]
    epochs = [shown[i : i + NUM_VIDEOS] for i in range(0, 8 * NUM_VIDEOS, NUM_VIDEOS)]
    assert all(sorted(labels) == list(range(NUM_VIDEOS)) for labels in epochs)
    assert len(set(map(tuple, epochs[:4]))) > 1
    assert epochs[0] != epochs[4]


def test_a_position_shows_the_same_whatever_was_shown_before(entries: list[Entry]) -> None:
    config = {"repeat": 2, "flip": True, "crop": "random_resized"}
    forwards, backwards = _clips(entries, **config), _clips(entries, **config)
    first = [forwards[p] for p in range(12)]
    second = [backwards[p] for p in reversed(range(12))][::-1]
    assert all(torch.equal(a.video, b.video) for a, b in zip(first, second, strict=True))


def test_epochs_and_seeds_differ_in_start_and_crop(entries: list[Entry]) -> None:
    one_video = entries[-1:]
    for other in (_clips(one_video)[1], _clips(one_video, seed=1)[0]):
        assert not torch.equal(other.video, _clips(one_video)[0].video)


def test_repeats_share_their_frames_and_differ_in_crop(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch, numbers: Callable[[np.ndarray], list[int]]
) -> None:
    opened = []
    monkeypatch.setattr(
        dataset_module, "open_entry", lambda entry, decoder: opened.append(entry) or open_video(entry.path, decoder)
    )
    # Centre crops of one range are equal, down to the byte.
    video = _clips(entries, repeat=4, stride=2, crop="center")[2].video
    assert len(opened) == 1
    assert all(torch.equal(crop, video[0]) for crop in video)
    crops = _clips(entries, repeat=4, stride=2, crop="random_resized")[2].video
    assert len({crop.numpy().tobytes() for crop in crops}) == 4
    # The first crop is what a run without repeats sees.
    assert torch.equal(crops[:1], _clips(entries, stride=2, crop="random_resized")[2].video)


def test_decoders_carry_out_the_same_plan(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[ClipPlan] = []

    def keep(*args: Any, **sizes: Any) -> ClipPlan:
        plans.append(plan_clip(*args, **sizes))
        return plans[-1]

    monkeypatch.setattr(PretrainClips, "plan", staticmethod(keep))
    seen = {}
    for decoder in ("auto", "decord", "pyav") if decord_is_installed() else ("auto", "pyav"):
        clips = _clips(entries, decoder=decoder, repeat=2, flip=True, stride=2)
        seen[decoder] = torch.stack([clips[position].video for position in range(2 * NUM_VIDEOS)])
    assert len(set(plans)) == 2 * NUM_VIDEOS < len(plans)
    assert all(torch.equal(video, seen["pyav"]) for video in seen.values())


def test_frames_are_a_stride_apart_and_starts_vary(
    entries: list[Entry], numbers: Callable[[np.ndarray], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def keep(frames: np.ndarray, view: View, frame_size: int) -> torch.Tensor:
        seen.append(numbers(frames))
        return apply_view(frames, view, frame_size)

    monkeypatch.setattr(dataset_module, "apply_view", keep)
    clips = _clips(entries[:1], stride=2)  # 12 frames, a clip takes 8 of them
    for position in range(40):
        clips[position]
    assert {start for start, *_ in seen} == {0, 1, 2, 3, 4}
    assert all(ids == [ids[0] + 2 * i for i in range(NUM_FRAMES)] for ids in seen)
    seen.clear()
    _clips(entries[:1], stride=4)[0]  # 16 frames asked of 12
    assert seen == [[0, 4, 8, 11]]


def test_crop_and_flip_reach_the_pixels(entries: list[Entry]) -> None:
    frames = open_video(entries[0].path).read([0, 4, 8, 11])
    plain = apply_view(frames, View(center_box(*frames.shape[1:3])), FRAME_SIZE)
    flipped = Counter()
    for position in range(20):
        clip = _clips(entries[:1], stride=4, crop="center", flip=True)[position].video[0]
        flipped[torch.equal(clip, plain.flip(-1))] += 1
        assert torch.equal(clip, plain) or torch.equal(clip, plain.flip(-1))
    assert min(flipped.values()) >= 4
    assert torch.equal(_clips(entries[:1], stride=4, crop="center")[3].video[0], plain)


def test_a_bad_video_is_replaced_and_reported(
    entries: list[Entry], tmp_path: Path, write_unknown_codec: Callable[[Path], Path]
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    missing = str(tmp_path / "missing.mp4")
    unknown = str(write_unknown_codec(tmp_path / "unknown.mp4"))
    mixed = [Entry(str(broken), 90), *entries, Entry(missing, 91), Entry(unknown, 92)]
    clips = _clips(mixed)
    reported: Counter[str] = Counter()
    for position in range(3 * len(mixed)):
        sample = clips[position]
        assert sample.video.float().mean() > 20  # frames of 30 and 220
        reported.update(Path(bad.path).name for bad in sample.bad)
        assert torch.equal(_clips(mixed)[position].video, sample.video)
    assert set(reported) == {"broken.mp4", "missing.mp4", "unknown.mp4"}
    assert min(reported.values()) >= 3  # at least once an epoch; more where one replaces the other
    reasons = {Path(b.path).name: b.reason for p in range(len(mixed)) for b in clips[p].bad}
    assert reasons["missing.mp4"] == "no such file or directory"
    assert reasons["broken.mp4"].startswith("no video, cut short or damaged")
    assert reasons["unknown.mp4"].startswith("no decoder for codec")


def test_a_known_crasher_is_never_opened(entries: list[Entry], shown: list[int]) -> None:
    crashers = {entries[1].path: "crashed the decoder (SIGSEGV)"}
    clips = PretrainClips(entries, DataConfig(), NUM_FRAMES, FRAME_SIZE, 0, crashers)
    bad = [bad for position in range(3 * NUM_VIDEOS) for bad in clips[position].bad]
    assert set(shown) == {0, 2, 3, 4}
    assert set(bad) == {BadVideo(entries[1].path, "crashed the decoder (SIGSEGV)", crashed=True)}
    assert len(bad) == 3
    # What is seen in its place is what a video that cannot be read is replaced with.
    missing = [Entry("missing.mp4", None) if entry == entries[1] else entry for entry in entries]
    for position in range(NUM_VIDEOS):
        assert torch.equal(clips[position].video, _clips(missing)[position].video)


def test_what_is_being_decoded_is_on_record(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail_first(entry: Entry, decoder: DecoderName) -> VideoFile:
        seen.append(entries[int(clips.decoding[0])] is entry)
        if len(seen) == 1:
            raise VideoError(entry.path, "damaged")
        return open_entry(entry, decoder)

    def check_nothing(*args: Any) -> torch.Tensor:
        assert clips.decoding.tolist() == [NOTHING, 2]
        return apply_view(*args)

    monkeypatch.setattr(dataset_module, "open_entry", fail_first)
    monkeypatch.setattr(dataset_module, "apply_view", check_nothing)
    clips = _clips(entries)
    assert len(clips[0].bad) == 1
    assert seen == [True, True]


def test_replacements_differ_from_place_to_place(entries: list[Entry], tmp_path: Path, shown: list[int]) -> None:
    mixed = [Entry(str(tmp_path / f"{i}.mp4"), None) for i in range(6)] + entries
    clips = _clips(mixed)
    assert len({shown[-1] for position in range(len(mixed)) if clips[position].bad}) > 1


@pytest.mark.parametrize(("num_bad", "tried"), [(1, 1), (3, 3), (30, 10)])
def test_only_bad_videos_end_the_run(tmp_path: Path, num_bad: int, tried: int) -> None:
    bad = [Entry(str(tmp_path / f"{i}.mp4"), None) for i in range(num_bad)]
    with pytest.raises(NoReadableVideoError, match=f"all {tried} videos tried") as caught:
        _clips(bad)[0]
    reasons = str(caught.value).splitlines()[1:]
    assert len(set(reasons)) == len(reasons) == tried
    assert all("no such file" in reason for reason in reasons)
    assert isinstance(caught.value, RunStoppedError)
    assert len(set(caught.value.bad)) == tried
    assert {bad.path for bad in caught.value.bad} <= {entry.path for entry in bad}
    copy = pickle.loads(pickle.dumps(caught.value))  # as it comes from a worker
    assert (copy.bad, str(copy)) == (caught.value.bad, str(caught.value))


def test_one_readable_video_is_found_among_nine_bad_ones(
    entries: list[Entry], tmp_path: Path, shown: list[int]
) -> None:
    mixed = [Entry(str(tmp_path / f"{i}.mp4"), None) for i in range(9)] + entries[:1]
    for position in range(10):
        _clips(mixed)[position]
    assert shown == [0] * 10


def test_only_video_errors_are_caught(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(entry: Entry, decoder: str) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(dataset_module, "open_entry", fail)
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        _clips(entries)[0]


def test_files_are_closed(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Unreadable:
        num_frames, height, width = 9, 48, 64

        def read(self, ids: object) -> None:
            raise VideoError("x.mp4", "damaged")

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(dataset_module, "open_entry", lambda entry, decoder: Unreadable())
    with pytest.raises(NoReadableVideoError, match="damaged"):
        _clips(entries)[0]
    assert len(closed) == NUM_VIDEOS


@pytest.mark.usefixtures("empty_cache")
def test_a_cache_decodes_what_fits_once_and_changes_nothing(entries: list[Entry], shown: list[int]) -> None:
    config = {"repeat": 2, "flip": True, "crop": "random_resized"}
    expected = [_clips(entries, **config)[p].video for p in range(3 * NUM_VIDEOS)]
    first = open_entry(entries[0])
    sizes = [open_entry(entry).num_frames * first.height * first.width * 3 for entry in entries]
    for room, kept in ((sum(sizes), NUM_VIDEOS), (sum(sizes) - 1, NUM_VIDEOS - 1), (min(sizes) - 1, 0)):
        shown.clear()
        clips = _clips(entries, **config, cache_gib=room / 2**30)
        samples = [clips[p] for p in range(3 * NUM_VIDEOS)]
        assert all(torch.equal(a.video, b) for a, b in zip(samples, expected, strict=True))
        assert len(shown) == 3 * NUM_VIDEOS - 2 * kept
        assert sum(sample.decode.frames == 0 for sample in samples) == 2 * kept


@pytest.mark.usefixtures("empty_cache")
def test_a_cache_takes_the_readable_part_of_a_damaged_video(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def damaged_at_its_end(entry: Entry, decoder: DecoderName) -> VideoFile:
        video = open_entry(entry, decoder)
        read = video.read

        def read_beginning(ids: Sequence[int]) -> Any:
            asked.append(len(ids))
            if max(ids) > 3:
                raise VideoError(entry.path, "damaged")
            return read(ids)

        video.read = read_beginning  # type: ignore[method-assign]
        return video

    monkeypatch.setattr(dataset_module, "open_entry", damaged_at_its_end)
    monkeypatch.setattr(PretrainClips, "plan", staticmethod(lambda *a, **k: plan_clip(*a, **{**k, "total_frames": 4})))
    for cache_gib in (0.0, 1.0):
        asked.clear()
        clips = _clips(entries[:1], stride=1, cache_gib=cache_gib)
        samples = [clips[position] for position in range(3)]
        assert [(sample.bad, sample.decode.frames) for sample in samples] == [((), 4)] * 3
        assert asked == [12, 4, 4, 4] if cache_gib else [4, 4, 4]  # whole, once


@pytest.mark.usefixtures("empty_cache")
def test_a_cache_keeps_nothing_of_what_dali_decodes(entries: list[Entry]) -> None:
    clips = _clips(entries, cache_gib=1.0)
    assert isinstance(clips.read_encoded(lambda video: None, 0), EncodedSample)
    assert isinstance(clips.read_encoded(lambda video: "this one not", 1), ClipSample)
    assert not dataset_module.decoded_videos("auto", 2**30).videos


def test_folders_of_images(tmp_path: Path, write_images: Callable[..., Path]) -> None:
    folder = str(write_images(tmp_path / "x", range(1, 9)))
    sample = _clips([Entry(folder, 3, start=1, num_frames=8, kind="frames")], stride=1)[0]
    assert sample.video.shape == (1, 3, NUM_FRAMES, FRAME_SIZE, FRAME_SIZE)


def test_no_entries_and_no_decord(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least one video"):
        _clips([])
    monkeypatch.setattr("adamae_fast.data.decode.decord_is_installed", lambda: False)
    with pytest.raises(ValueError, match="decord is not installed"):
        _clips(entries, decoder="decord")
