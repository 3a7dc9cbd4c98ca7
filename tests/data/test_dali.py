"""DALI's CPU decoders for real: VP8, VP9 and MJPEG. What needs a GPU is marked so."""

from __future__ import annotations

import ctypes
import itertools
import logging
import multiprocessing
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from adamae_fast.config import CropKind, DataConfig, ModelConfig, PretrainConfig, TrainConfig
from adamae_fast.data import dali, nvdec
from adamae_fast.data.batch import Batch
from adamae_fast.data.check import check_manifest
from adamae_fast.data.clips import View, apply_view, center_box, epoch_order, plan_clip
from adamae_fast.data.dali import DaliError, DaliPipeline, Suitability
from adamae_fast.data.dataset import EncodedClip, NoReadableVideoError, VideoKind
from adamae_fast.data.decode import open_video
from adamae_fast.data.loader import clip_batches
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.packets import Packet, find_dali_trap, shows_old_vp9
from adamae_fast.data.prepare import prepare
from adamae_fast.data.synthetic import render
from adamae_fast.train.stalls import LoadFigures

pytest.importorskip("nvidia.dali")

SIDE, NUM_FRAMES, SEED = 48, 4, 5
VP9, VP8 = ("libvpx-vp9", {"g": "8", "cpu-used": "8"}), ("libvpx", {"g": "8", "cpu-used": "8"})


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> dict[str, Path]:
    """Numbered frames in every codec that DALI decodes without a GPU."""
    folder = tmp_path_factory.mktemp("dali")

    def write(name: str, codec: str, options: dict[str, str], pix_fmt: str = "yuv420p") -> Path:
        return write_video(folder / name, 60, codec=codec, options=options, height=SIDE, width=SIDE, pix_fmt=pix_fmt)

    hidden = {"g": "60", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}
    return {
        "vp9.webm": write("vp9.webm", *VP9),
        "vp9.mp4": write("vp9.mp4", *VP9),
        "vp9 with hidden pictures": write("hidden.webm", "libvpx-vp9", hidden),
        "vp8.webm": write("vp8.webm", *VP8),
        "mjpeg.mp4": write("mjpeg.mp4", "mjpeg", {}, pix_fmt="yuvj420p"),
    }


def _entries(*paths: Path) -> list[Entry]:
    return [Entry(str(path), None) for path in paths]


def _config(decoder: str = "dali", batch_size: int = 4, frame_size: int = 16, **data: Any) -> PretrainConfig:
    options: dict[str, Any] = {"stride": 2, "num_workers": 0, "max_bad_share": 1.0, **data}
    return PretrainConfig(
        model=ModelConfig(num_frames=NUM_FRAMES, frame_size=frame_size, patch_size=8),
        data=DataConfig(decoder=decoder, **options),  # type: ignore[arg-type]
        train=TrainConfig(batch_size=batch_size),
        seed=SEED,
    )


def _batches(entries: list[Entry], num_batches: int, first: int = 0, **options: Any) -> list[Batch]:
    return list(clip_batches(_config(**options), entries, first, num_batches))


def _assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.video, b.video)
        assert (a.bad, a.fell_back) == (b.bad, b.fell_back)


def _assert_close(by_dali: list[Batch], by_cpu: list[Batch]) -> None:
    """Grey videos: 2 levels at most within, and the same videos in the same places.

    In a crop's outermost pixels the filter reaches beyond the crop: DALI repeats the last pixel, the CPU path weighs
    those that are there. That is 22 levels at most where the crop is shrunk to a third.
    """
    assert len(by_dali) == len(by_cpu)
    for a, b in zip(by_dali, by_cpu, strict=True):
        assert a.bad == b.bad
        assert (a.video.shape, a.video.dtype) == (b.video.shape, torch.uint8)
        difference = (a.video.int() - b.video.int()).abs()
        assert difference[..., 1:-1, 1:-1].max() <= 2
        assert difference.max() <= 24


@pytest.mark.parametrize("crop", ["multi_scale", "random_resized"])
def test_same_clips_as_on_the_cpu(videos: dict[str, Path], crop: CropKind) -> None:
    entries = _entries(*videos.values())
    options = {"batch_size": 6, "repeat": 3, "flip": True, "crop": crop, "random_resized_scale": (0.1, 1.0)}
    for stride in (1, 3, 14):
        by_dali = _batches(entries, 6, stride=stride, **options)
        _assert_close(by_dali, _batches(entries, 6, decoder="pyav", stride=stride, **options))
        assert all(batch.num_by_dali == 2 and not batch.fell_back for batch in by_dali)


@pytest.mark.parametrize("stride", [1, 2, 7, 25])
def test_every_frame_is_the_one_asked_for(
    videos: dict[str, Path], numbers: Callable[[np.ndarray], list[int]], stride: int
) -> None:
    """Stride 25: from a certain frame on, the last one again."""
    entries = _entries(*videos.values())
    config = _config(batch_size=1, frame_size=SIDE, crop="center", stride=stride)
    batches = clip_batches(config, entries, 0, 4 * len(entries))
    for position, batch in enumerate(batches):
        epoch, place = divmod(position, len(entries))
        sample = int(epoch_order(SEED, epoch, len(entries))[place])
        size = {"num_frames": NUM_FRAMES, "frame_size": SIDE, "total_frames": 60, "height": SIDE, "width": SIDE}
        plan = plan_clip(config.data, SEED, epoch, sample, **size)
        assert batch.num_by_dali == 1
        assert numbers(batch.video[0].permute(1, 2, 3, 0).numpy()) == list(plan.frame_ids)


def test_short_videos_repeat_their_last_frame(
    tmp_path: Path, write_video: Callable[..., Path], numbers: Callable[[np.ndarray], list[int]]
) -> None:
    seen = []
    for num_frames in (1, 2, 6):
        path = write_video(tmp_path / f"{num_frames}.webm", num_frames, codec="libvpx", height=SIDE, width=SIDE)
        (batch,) = _batches(_entries(path), 1, batch_size=1, frame_size=SIDE, crop="center")
        assert batch.num_by_dali == 1
        seen.append(numbers(batch.video[0].permute(1, 2, 3, 0).numpy()))
    assert seen == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 2, 4, 5]]


def test_colours_are_no_further_from_the_truth_than_on_the_cpu(tmp_path: Path) -> None:
    """DALI interpolates the chroma samples, FFmpeg repeats them: neither is the other's truth."""
    frames_THWC, _ = render("rotate", np.random.default_rng(1), num_frames=NUM_FRAMES, width=128, height=96)
    path = tmp_path / "colours.webm"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.options = {"crf": "10", "b": "0", "cpu-used": "8"}
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    truth = apply_view(frames_THWC, View(center_box(96, 128)), SIDE).float()
    error = {}
    for decoder in ("dali", "pyav"):
        options = {"batch_size": 1, "frame_size": SIDE, "crop": "center", "stride": 1}
        (batch,) = _batches(_entries(path), 1, decoder=decoder, **options)
        error[decoder] = float((batch.video[0].float() - truth).abs().mean())
    assert error["dali"] <= 1.1 * error["pyav"] < 4


def test_what_dali_cannot_do_is_read_on_the_cpu(
    videos: dict[str, Path],
    tmp_path: Path,
    write_video: Callable[..., Path],
    write_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dali, "MAX_BYTES", max(path.stat().st_size for path in videos.values()))
    marked = tmp_path / "bt709.webm"
    with av.open(str(marked), "w") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.colorspace = 64, 48, "yuv420p", 1
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    large = tmp_path / "large.webm"
    large.write_bytes(videos["vp9.webm"].read_bytes() + bytes(2 * dali.MAX_BYTES))
    reasons = {
        write_video(tmp_path / "h264.mp4"): "h264 needs a GPU",
        write_video(
            tmp_path / "mjpeg.avi", codec="mjpeg", pix_fmt="yuvj420p"
        ): "a container other than MP4 and Matroska",
        write_video(tmp_path / "444.mp4", codec="mjpeg", pix_fmt="yuvj444p"): "pixels stored as yuvj444p",
        write_video(tmp_path / "turned.mp4", codec="libvpx-vp9", rotation=90): "a rotation in the metadata",
        marked: "colours marked as other than BT.601",
        large: f"files above {dali.MAX_BYTES >> 20} MiB",
    }
    folder = write_images(tmp_path / "images", range(1, 20))
    entries = _entries(*videos.values(), *reasons)
    entries.append(Entry(str(folder), None, start=1, num_frames=19, kind="frames"))
    by_dali = _batches(entries, 6, repeat=2)
    by_cpu = _batches(entries, 6, repeat=2, decoder="auto")
    _assert_close(by_dali, by_cpu)
    fell_back = [reason for batch in by_dali for reason in batch.fell_back]
    assert sorted(fell_back) == sorted([*reasons.values(), "folders of images"])
    for a, b in zip(by_dali, by_cpu, strict=True):
        same = [
            torch.equal(x, y) for x, y in zip(a.video.unflatten(0, (-1, 2)), b.video.unflatten(0, (-1, 2)), strict=True)
        ]
        assert sum(same) >= len(a.fell_back) == len(same) - a.num_by_dali


def test_bad_files_are_replaced_and_reported(videos: dict[str, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(videos["vp9.mp4"].read_bytes()[:-3000])
    entries = _entries(*videos.values(), cut, tmp_path / "missing.webm")
    by_dali = _batches(entries, 8, num_workers=2)
    assert {Path(bad.path).name for batch in by_dali for bad in batch.bad} == {"cut.mp4", "missing.webm"}
    _assert_close(by_dali, _batches(entries, 8, decoder="auto"))
    with pytest.raises(NoReadableVideoError) as caught:
        _batches(entries[-2:], 1)
    assert {Path(bad.path).name for bad in caught.value.bad} == {"cut.mp4", "missing.webm"}


def test_a_resumed_stream_goes_on_where_it_was(videos: dict[str, Path], tmp_path: Path) -> None:
    entries = _entries(*videos.values(), tmp_path / "missing.webm")
    whole = _batches(entries, 6, repeat=2, flip=True)
    _assert_same(whole[4:], _batches(entries, 6, first=4, repeat=2, flip=True, num_workers=2))
    _assert_same(whole[:2], list(itertools.islice(clip_batches(_config(repeat=2, flip=True), entries, 0, 6), 2)))


def test_prepared_shards(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    """Their videos need no look at their packets; a member whose bytes have changed is replaced."""
    manifest, out = tmp_path / "list.txt", tmp_path / "prepared"
    paths = [write_video(tmp_path / f"{i}.mp4", 20, height=96, width=128) for i in range(3)]
    manifest.write_text("".join(f"{path}\n" for path in paths))
    assert prepare(str(manifest), str(out), codec="vp9", short_side=SIDE, num_workers=1) == 0
    entries = read_manifest(str(out))
    by_dali = _batches(entries, 3, repeat=2)
    assert sum(batch.num_by_dali for batch in by_dali) == 6
    _assert_close(by_dali, _batches(entries, 3, repeat=2, decoder="auto"))
    assert entries[1].prepared is not None
    with (out / "shard-00000.tar").open("r+b") as shard:
        shard.seek(entries[1].prepared.offset + 99)
        shard.write(b"changed")
    by_dali = _batches(entries, 3, repeat=2)
    assert {bad.path for batch in by_dali for bad in batch.bad} == {entries[1].path}
    _assert_close(by_dali, _batches(entries, 3, repeat=2, decoder="auto"))


def test_batches_before_an_error_are_delivered(
    videos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers are a batch ahead: what they meet there ends the run one batch later."""
    monkeypatch.setattr("adamae_fast.data.dataset.MAX_ATTEMPTS", 1)
    entries = _entries(*videos.values(), tmp_path / "missing.webm")
    missing = epoch_order(SEED, 0, len(entries)).tolist().index(len(entries) - 1)
    assert missing > 0
    batches = clip_batches(_config(batch_size=1), entries, 0, 6)
    expected = _batches(entries, missing, batch_size=1)
    _assert_same(list(itertools.islice(batches, missing)), expected)
    with pytest.raises(NoReadableVideoError):
        next(batches)


def test_closing_ends_the_workers(videos: dict[str, Path]) -> None:
    others = set(multiprocessing.active_children())
    with closing(clip_batches(_config(num_workers=2), _entries(*videos.values()), 0, 10**6)) as batches:
        next(batches)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        assert len(workers) == 2
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def _damage(source: Path, path: Path, frame: int) -> Path:
    """Overwrite one packet, but for its first bytes: opening the file does not show it."""
    with av.open(str(source)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][frame]
        content = bytearray(source.read_bytes())
        assert packet.pos is not None
        begin = bytes(content).index(bytes(packet))
        content[begin : begin + packet.size] = bytes(packet)[:1] + b"\xff" * (packet.size - 1)
    path.write_bytes(content)
    return path


def test_a_file_that_fails_in_dali_spoils_no_batch(
    videos: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worker sees nothing wrong; DALI fails; so does the CPU path, which replaces it."""
    built = []
    build = DaliPipeline._build
    monkeypatch.setattr(DaliPipeline, "_build", lambda pipeline: built.append(pipeline) or build(pipeline))
    damaged = _damage(videos["vp9.mp4"], tmp_path / "damaged.mp4", 32)
    with closing(open_video(str(damaged))) as video:
        assert (video.num_frames, Suitability(torch.device("cpu")).reason_against(video)) == (60, None)
    entries = _entries(*videos.values(), damaged)
    options = {"stride": 15, "batch_size": 3}  # any start needs frame 32's group of pictures
    by_dali = _batches(entries, 6, **options)
    assert {bad.path for batch in by_dali for bad in batch.bad} == {str(damaged)}
    assert {reason.split(":")[0] for batch in by_dali for reason in batch.fell_back} == {"DALI failed"}
    assert sum(batch.num_by_dali for batch in by_dali) == 15
    _assert_close(by_dali, _batches(entries, 6, decoder="auto", **options))
    assert len(built) == 3  # at first, after the batch, after the file by itself; DALI does not meet it again
    assert not caplog.records


def test_kinds_that_dali_does_not_decode_are_left_to_the_workers(
    videos: dict[str, Path],
    tmp_path: Path,
    write_video: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a GPU that promises more than it keeps: here DALI is asked for H.264 without one."""
    monkeypatch.setattr(dali, "CPU_CODECS", ("vp9", "h264"))
    paths = [write_video(tmp_path / f"{i}.mp4", height=SIDE, width=SIDE) for i in range(5)]
    entries = _entries(videos["vp9.webm"], *paths)
    by_dali = _batches(entries, 6, batch_size=3, num_workers=1)
    _assert_close(by_dali, _batches(entries, 6, decoder="auto", batch_size=3))
    assert sum(batch.num_by_dali for batch in by_dali) == 3
    reasons = [reason for batch in by_dali for reason in batch.fell_back]
    assert {reason.split(":")[0] for reason in reasons} == {
        "DALI failed",
        f"h264 of {SIDE}×{SIDE}, on which DALI failed",
    }
    assert reasons[-1].endswith("on which DALI failed")
    assert caplog.text.count("start again") == 1
    assert 3 <= caplog.text.count("it is decoded on the CPU") <= 5


def test_a_run_without_dali_says_so_once(
    tmp_path: Path, write_video: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    entries = _entries(write_video(tmp_path / "h264.mp4"))
    batches = _batches(entries, 12)
    assert all(len(batch.fell_back) == 4 for batch in batches)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines == [
        "data.decoder=dali has decoded none of 32 videos: h264 needs a GPU (32). The CPU decodes them, as with auto"
    ]


def test_one_batch_is_enough_for_the_warning_at_the_end(
    videos: dict[str, Path], tmp_path: Path, write_video: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    _batches(_entries(write_video(tmp_path / "h264.mp4")), 1)
    assert "has decoded none of 4 videos" in caplog.text
    caplog.clear()
    _batches(_entries(*videos.values()), 1)
    assert not caplog.records


def test_batches_keep_their_memory(videos: dict[str, Path]) -> None:
    """They are DALI's own buffers, which must not be written to while they are held."""
    batches = clip_batches(_config(), _entries(*videos.values()), 0, 6)
    held = [(batch.video, batch.video.clone()) for batch in batches]
    assert all(torch.equal(video, copy) for video, copy in held)
    assert len({video.data_ptr() for video, _ in held}) == 6


def test_the_pipeline_is_built_again_after_an_error(videos: dict[str, Path]) -> None:
    pipeline = DaliPipeline(torch.device("cpu"), max_videos=2, repeat=1, frame_size=16)
    content = np.fromfile(videos["vp9.webm"], np.uint8)
    config = _config().data
    size = {"num_frames": NUM_FRAMES, "frame_size": 16, "total_frames": 60, "height": SIDE, "width": SIDE}
    clip = EncodedClip("x", b"", plan_clip(config, 0, 0, 0, **size), VideoKind("vp9", SIDE, SIDE))
    size["total_frames"] = 1000
    beyond = clip._replace(plan=plan_clip(config, 0, 0, 3, **size))
    pipeline.start([(content, clip)])
    first = pipeline.finish()
    pipeline.start([(content, clip), (content, beyond)])
    with pytest.raises(DaliError, match=r"^Unexpected out-of-bounds frame index \d+"):
        pipeline.finish()
    pipeline.start([(content[:400], clip)])
    with pytest.raises(DaliError):
        pipeline.finish()
    pipeline.start([(content, clip), (content, clip)])
    assert torch.equal(pipeline.finish(), first.expand(2, -1, -1, -1, -1, -1))


def test_missing_packages_are_named(videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec, "LIBRARY", "libnosuchlibrary.so.1")
    with pytest.raises(ValueError, match=r"data\.decoder='dali'.*cuda.*libnosuchlibrary.*video.*choose auto"):
        dali.require_dali(torch.device("cuda"))
    monkeypatch.setattr(dali, "dali_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"data\.decoder='dali'.*install nvidia-dali-cuda130.*cuda120.*choose auto"):
        clip_batches(_config(), _entries(*videos.values()), 0, 1)
    # Pictures of a finished run do not need it.
    with closing(open_video(str(videos["vp9.webm"]), "dali")) as video:
        assert video.read([3]).shape == (1, SIDE, SIDE, 3)


def test_check_says_what_dali_would_decode(
    videos: dict[str, Path], tmp_path: Path, write_video: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    h264 = write_video(tmp_path / "h264.mp4")
    manifest = tmp_path / "manifest.txt"
    manifest.write_text(f"{videos['vp9.webm']}\n{h264}\n")
    assert check_manifest(str(manifest), decoder="dali", json=True) == 0
    told = capsys.readouterr().out
    assert '"decoder": "dali"' in told
    assert "not dali: h264 needs a GPU" in told


def test_the_share_of_dali_is_a_figure() -> None:
    figures, video = LoadFigures(), torch.zeros(4, 3, 2, 8, 8, dtype=torch.uint8)
    figures.add(Batch(video, [], num_by_dali=3, fell_back=("h264 needs a GPU",)))
    figures.add(Batch(video, [], num_by_dali=4))
    assert figures.lap()["dali_share"] == 7 / 8
    figures.add(Batch(video, []))
    assert "dali_share" not in figures.lap()


def test_packets_that_mislead_dali() -> None:
    plain = [Packet(10 * t, is_key=t % 4 == 0, restarts=t % 4 == 0, is_discard=False) for t in range(8)]
    times = [10 * t for t in range(8)]
    assert find_dali_trap(plain, times, "mov,mp4,m4a", 0) is None
    assert find_dali_trap(plain, times, "matroska,webm", 0) is None
    assert find_dali_trap(plain, times, "avi", 0) is not None
    assert find_dali_trap(plain, times, "mov,mp4,m4a", 1) == "a rotation in the metadata"
    early = [packet._replace(pts=10 * t - 10) for t, packet in enumerate(plain)]
    assert find_dali_trap(early, [t - 10 for t in times], "mov,mp4,m4a", 0) == "frames before time 0"
    assert find_dali_trap(plain, None, "matroska,webm", 0) is not None
    assert find_dali_trap(plain, times[1:], "matroska,webm", 0) is not None
    swapped = [*plain[:3], plain[4], plain[3], *plain[5:]]
    assert "open groups" in (find_dali_trap(swapped, times, "matroska,webm", 0) or "")


def test_vp9_packets_that_show_an_old_picture() -> None:
    """Frame marker 10, two bits of the profile (low one first), a zero for profile 3, then the flag."""
    shows = {f"10{low}{high}1000" for low in "01" for high in "01"} - {"10111000"} | {"10110100"}
    for rest in range(16):
        for low, high in itertools.product("01", repeat=2):
            bits = f"10{low}{high}{rest:04b}"
            flag = bits[5] if (low, high) == ("1", "1") else bits[4]
            assert shows_old_vp9(int(bits, 2)) == (flag == "1")
    assert all(shows_old_vp9(int(bits, 2)) for bits in shows)


def test_the_driver_is_asked_what_it_decodes() -> None:
    asked = []

    class Library:
        def cuvidGetDecoderCaps(self, reference: Any) -> int:
            capabilities = reference._obj
            asked.append((capabilities.codec, capabilities.chroma_format, capabilities.bit_depth_minus_8))
            if capabilities.codec == 11:
                return 0  # known, but not supported
            capabilities.is_supported = 1
            capabilities.min_width, capabilities.min_height = 48, 16
            capabilities.max_width, capabilities.max_height, capabilities.max_macroblocks = 4096, 2048, 32768
            return 801 if capabilities.codec == 2 else 0

    assert ctypes.sizeof(nvdec._Capabilities) == 88
    found = nvdec._ask(Library())
    assert set(asked) == {(codec, 1, 0) for codec in (2, 4, 8, 9, 10, 11)}
    assert set(found) == {"h264", "hevc", "vp8", "vp9"}
    limits = found["h264"]
    assert limits.admit(48, 16)
    assert limits.admit(4096, 2048)
    for size in ((47, 16), (48, 15), (4097, 16), (48, 2049)):
        assert not limits.admit(*size)
    assert not limits._replace(max_macroblocks=100).admit(320, 240)


@pytest.mark.gpu
def test_the_gpu_decodes_the_same_frames(
    tmp_path: Path, write_video: Callable[..., Path], numbers: Callable[[np.ndarray], list[int]]
) -> None:
    """H.264 and HEVC with B-frames, VP9 with hidden pictures, odd sizes; never on the host."""
    hidden = {"g": "60", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}
    closed = {"g": "16", "bf": "2", "x265-params": "open-gop=0:log-level=none"}
    even, odd = {"height": 256, "width": 256}, {"height": 240, "width": 427}
    paths = [
        write_video(tmp_path / "h264.mp4", 60, options={"g": "16", "bf": "2"}, **even),
        write_video(tmp_path / "long.mp4", 60, options={"g": "250", "bf": "3"}, **even),
        write_video(tmp_path / "hevc.mp4", 60, codec="libx265", options=closed, **even),
        write_video(tmp_path / "vp9.webm", 60, codec="libvpx-vp9", options=hidden, **even),
        write_video(tmp_path / "odd.webm", 60, codec="libvpx-vp9", options=hidden, **odd),
        write_video(tmp_path / "vp8.webm", 60, codec="libvpx", options={"g": "16"}, **even),
        write_video(tmp_path / "short.mp4", 5, options={"g": "16", "bf": "2"}, **even),
    ]
    entries = _entries(*paths)
    for stride in (1, 4, 25):
        options = {"repeat": 2, "flip": True, "stride": stride, "frame_size": 112, "batch_size": 6}
        by_cpu = clip_batches(_config("pyav", **options), entries, 0, 14)
        for a, b in zip(clip_batches(_config(**options), entries, 0, 14, "cuda"), by_cpu, strict=True):
            assert a.video.device.type == "cuda" or a.num_by_dali == 0
            assert not a.bad
            difference = (a.video.cpu().float() - b.video.float()).abs()
            assert difference[..., 1:-1, 1:-1].mean() <= 3, a.fell_back
    options = {"crop": "center", "frame_size": 256, "batch_size": 1, "stride": 3}
    decoded = 0
    for batch in clip_batches(_config(**options), entries[:4], 0, 16, "cuda"):
        shown = numbers(batch.video[0].cpu().permute(1, 2, 3, 0).numpy())
        assert shown == list(range(shown[0], shown[0] + 10, 3)), batch.fell_back
        decoded += batch.num_by_dali
    assert decoded >= 8
