from __future__ import annotations

import errno
import gc
import os
import pickle
import subprocess
import sys
import wave
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
from PIL import Image

from adamae_fast.config import DecoderName
from adamae_fast.data import decode
from adamae_fast.data.decode import EncodedVideo, VideoError, decord_is_installed, open_entry, open_video
from adamae_fast.data.manifest import Entry
from adamae_fast.data.packets import h264_slice_kind, is_h264_disposable, presentation_times

WriteVideo = Callable[..., Path]
Numbers = Callable[[Any], list[int]]

needs_decord = pytest.mark.skipif(not decord_is_installed(), reason="decord is not installed")
DECODERS = (
    tuple(name for name in get_args(DecoderName) if name != "dali") if decord_is_installed() else ("auto", "pyav")
)

GOOD = {  # frames, height, width, and whether decord reads the right frames
    "arm_wrestling.mp4": (280, 256, 340, True),
    "bigbuckbunny.mp4": (132, 720, 1280, True),
    "bikes.mp4": (250, 272, 640, True),
    "dog.mp4": (150, 256, 256, True),
    "flipping_a_pancake.mkv": (310, 240, 426, True),
    "goat.mp4": (150, 256, 256, True),
    "mm_test.avi": (164, 240, 320, False),  # AVI, whose time stamps are guesses
    "nasa_13013.mp4": (390, 270, 480, True),  # the second video stream: larger, with more frames
    "testsrc2_vp8.webm": (30, 720, 1280, True),
    "testsrc2_vp9.webm": (30, 720, 1280, True),
}
BAD = {
    "discard_first_keyframe.mp4": (25, 64, 64, False),  # an edit list hides 5 of 30: decord returns wrong frames
    "nasa_13013_rotated.mp4": (17, 480, 270, True),  # stored lying
    "non_zero_start.mp4": (12, 112, 200, True),  # the first frame is at 8.3 s
    "odd_size_444_10bit.mp4": (25, 241, 321, True),
    "rotated_90.mov": (3, 568, 320, True),  # stored lying
    "unordered.mov": (4, 50, 50, True),
    "corrupted.mp4": VideoError,  # 28 of 50 frames decode
}


def _in_order(path: Path) -> list[np.ndarray[Any, Any]]:
    """All frames of a complete decode, without seeking, turned upright."""
    with av.open(str(path)) as container:
        stream: Any = container.streams.best("video")
        return [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in container.decode(stream)]


def _clip(clips: Path, name: str) -> Path:
    path = clips / ("good" if name in GOOD else "bad") / name
    assert path.is_file()
    return path


def test_the_tables_name_every_shared_clip(shared_clips: Path) -> None:
    assert {p.name for p in (shared_clips / "good").iterdir()} == set(GOOD)
    assert {p.name for p in (shared_clips / "bad").iterdir()} == set(BAD)


@pytest.mark.parametrize("name", [n for n, facts in {**GOOD, **BAD}.items() if facts is not VideoError])
def test_shared_clips(shared_clips: Path, name: str) -> None:
    path = _clip(shared_clips, name)
    num_frames, height, width, by_decord = {**GOOD, **BAD}[name]  # type: ignore[misc]
    truth = _in_order(path)
    middle = num_frames // 2
    ids = [0, middle, min(middle + 5, num_frames - 1), middle, num_frames - 1]
    for decoder in DECODERS:
        with closing(open_video(str(path), decoder)) as video:
            assert video.num_frames == num_frames == len(truth)
            if decoder == "decord" and not by_decord:
                with pytest.raises(VideoError, match="decord would return wrong frames"):
                    video.read(ids)
                continue
            frames = video.read(ids)
            assert video.decoder == ("decord" if decoder == "decord" else "pyav")
        assert frames.shape == (5, video.height, video.width, 3) == (5, height, width, 3)
        assert frames.dtype == np.uint8
        for place, frame in zip(ids, frames, strict=True):
            assert np.abs(frame.astype(int) - truth[place]).mean() <= 3
            neighbours = range(max(0, place - 2), min(num_frames, place + 3))
            distances = {n: np.abs(frame.astype(int) - truth[n]).mean() for n in neighbours}
            assert distances[place] == min(distances.values())


@pytest.mark.parametrize("decoder", DECODERS)
def test_shared_clip_that_is_corrupted(shared_clips: Path, decoder: DecoderName) -> None:
    path = str(_clip(shared_clips, "corrupted.mp4"))
    # decord reads ahead, over the damage; PyAV decodes what these frames need.
    for ids in ([49], [40, 3], *([[0, 27, 28]] if decoder == "decord" else [])):
        with closing(open_video(path, decoder)) as video:
            assert video.num_frames == 50
            with pytest.raises(VideoError, match=r"damaged, these frames do not decode|decord: .*Error sending packet"):
                video.read(ids)
    truth = []
    with av.open(path) as container, pytest.raises(av.error.InvalidDataError):
        truth.extend(frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.video[0]))
    with closing(open_video(path, decoder)) as video:
        # How far decord's thread has read ahead when these frames are there is chance: it may be over the damage.
        may_fail = suppress(VideoError) if decoder == "decord" else nullcontext()
        with may_fail:
            assert np.array_equal(video.read([0, 10, 27]), [truth[i] for i in (0, 10, 27)])


@needs_decord
def test_decoders_return_the_same_bytes(shared_clips: Path) -> None:
    for name in ("nasa_13013.mp4", "dog.mp4", "testsrc2_vp9.webm", "odd_size_444_10bit.mp4", "rotated_90.mov"):
        path = str(_clip(shared_clips, name))
        with closing(open_video(path, "decord")) as one, closing(open_video(path, "pyav")) as other:
            ids = [0, other.num_frames // 3, other.num_frames - 1]
            assert np.array_equal(one.read(ids), other.read(ids))


TRAPS = {  # kinds of files with which decord returned other frames than those asked for
    "open.mp4": {"options": {"g": "8", "x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}},
    "refresh.mkv": {"options": {"g": "8", "bf": "0", "x264-params": "intra-refresh=1:ref=1:scenecut=0"}},
    "refresh.ts": {"options": {"g": "8", "bf": "0", "x264-params": "intra-refresh=1:ref=1:scenecut=0"}},
    "guessed.avi": {"codec": "mpeg4", "options": {"g": "8", "bf": "2", "b": "2M"}},
    "untimed.avi": {"options": {"g": "8"}},
    "stream.ts": {"options": {"g": "8"}},
    "program.mpg": {"codec": "mpeg1video", "options": {"g": "8", "bf": "2", "b": "2M"}},
    "raw.h264": {"options": {"g": "8"}},
}
PLAIN = {
    "closed.mp4": {"options": {"g": "8"}},
    "closed.mkv": {"options": {"g": "8", "bf": "0"}},
    "one_group.mp4": {"options": {"g": "250"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "8", "deadline": "realtime", "cpu-used": "8"}},
    "still.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "odd.mkv": {"codec": "ffv1", "pix_fmt": "bgr0", "height": 49, "width": 67},
}


@pytest.mark.parametrize("name", [*TRAPS, *PLAIN])
def test_ids_name_the_same_pictures_in_every_container(
    tmp_path: Path, write_video: WriteVideo, numbers: Numbers, name: str
) -> None:
    path = str(write_video(tmp_path / name, 40, **{**TRAPS, **PLAIN}[name]))
    rng = np.random.default_rng(0)
    for decoder in DECODERS:
        with closing(open_video(path, decoder)) as video:
            assert video.num_frames == 40
            if decoder == "decord" and name in TRAPS:
                with pytest.raises(VideoError, match="decord would return wrong frames"):
                    video.read([0])
                continue
            for _ in range(6):
                ids = rng.integers(40, size=5)
                assert numbers(video.read(ids)) == ids.tolist()
            assert numbers(video.read([39])) == [39]


def test_av1(tmp_path: Path, write_video: WriteVideo, numbers: Numbers) -> None:
    path = str(write_video(tmp_path / "a.mp4", 12, codec="libsvtav1", options={"preset": "12", "crf": "20"}))
    with closing(open_video(path)) as video:
        assert numbers(video.read([3, 11])) == [3, 11]
        assert (video.decoder, video.num_frames) == ("pyav", 12)
    if decord_is_installed():
        with closing(open_video(path, "decord")) as video, pytest.raises(VideoError, match=r"a\.mp4: decord: "):
            video.read([3])


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
@pytest.mark.parametrize("rotation", [90, 180, -90, 45])
def test_rotation(tmp_path: Path, write_video: WriteVideo, name: str, rotation: int) -> None:
    lying = open_video(str(write_video(tmp_path / f"plain_{name}", 20, height=80)), "pyav").read([19])[0]
    path = str(write_video(tmp_path / name, 20, height=80, rotation=rotation))
    for decoder in DECODERS:
        with closing(open_video(path, decoder)) as video:
            if decoder == "decord" and name == "a.mkv" and rotation != 45:
                with pytest.raises(VideoError, match="it ignores the rotation in matroska"):
                    video.read([19])
                continue
            upright = video.read([19])[0]
        # Quarter turns against the clock; others are ignored.
        assert np.array_equal(upright, np.rot90(lying, {90: 1, 180: 2, -90: 3, 45: 0}[rotation]))


def test_one_frame(tmp_path: Path, write_video: WriteVideo, numbers: Numbers) -> None:
    path = str(write_video(tmp_path / "one.mp4", 1))
    for decoder in DECODERS:
        with closing(open_video(path, decoder)) as video:
            assert video.num_frames == 1
            assert numbers(video.read([0, 0, 0])) == [0, 0, 0]


def test_ids_outside_the_video(tmp_path: Path, write_video: WriteVideo) -> None:
    with closing(open_video(str(write_video(tmp_path / "a.mp4", 5)))) as video:
        for ids in ([5], [-1], [], [0, 99]):
            with pytest.raises(IndexError, match="from 0 to 4"):
                video.read(ids)


def _write_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))


def _write_sound_with_cover(path: Path) -> None:
    with av.open(str(path), "w") as container:
        sound: Any = container.add_stream("libmp3lame", rate=44100)
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        container.mux(cover.encode())
        frame = av.AudioFrame(format="s16p", layout="stereo", samples=1152)
        for plane in frame.planes:  # silence: what memory happened to hold made FFmpeg give up, once in some hundred
            plane.update(bytes(plane.buffer_size))
        frame.rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.mp4": (lambda path: None, "no such file or directory"),
    "folder.mp4": (lambda path: path.mkdir(), "a folder, not a video"),
    "empty.mp4": (lambda path: path.touch(), "the file is empty"),
    "text.mp4": (lambda path: path.write_text("no video\n" * 50), "no video, cut short or damaged"),
    "text.txt": (lambda path: path.write_text("no video\n" * 50), "a text file"),
    "noise.webm": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(4000)),
        "no video, cut short or damaged",
    ),
    "sound.wav": (_write_sound, "no video stream, only sound"),
    "cover.mp3": (_write_sound_with_cover, "only a cover picture"),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path: Path, name: str, decoder: DecoderName, capfd: pytest.CaptureFixture[str]) -> None:
    make, reason = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(VideoError, match=reason) as caught:
        open_video(str(tmp_path / name), decoder)
    assert caught.value.path == str(tmp_path / name)
    assert "\n" not in caught.value.reason
    assert capfd.readouterr() == ("", "")


def test_nothing_readable_is_no_matter_of_permission(monkeypatch: pytest.MonkeyPatch, tiny_videos: list[Path]) -> None:
    def found_nothing(*args: object, **options: object) -> None:
        raise av.error.PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(av, "open", found_nothing)
    with pytest.raises(VideoError, match=r"FFmpeg: finds no stream that it can read$"):
        open_video(str(tiny_videos[0]))


@pytest.mark.parametrize("decoder", DECODERS)
def test_unknown_codec(tmp_path: Path, write_unknown_codec: Callable[[Path], Path], decoder: DecoderName) -> None:
    path = str(write_unknown_codec(tmp_path / "a.mp4"))
    with pytest.raises(VideoError, match=r"a\.mp4: no decoder for codec"):
        open_video(path, decoder)


def _damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Other bytes anywhere or in the header, a part missing, or the end missing."""
    damaged = bytearray(content)
    kind = rng.integers(4)
    if kind < 2:
        header = max(0, content.find(b"moov"))  # at the end of an MP4 file; Matroska begins with its header
        places = rng.integers(header, header + 700, size=4) if kind else rng.integers(len(content), size=8)
        for place in places:
            damaged[place % len(content)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)))
    else:
        place = rng.integers(1, len(content))
        del damaged[place : place + 20 if kind == 2 else None]
    return bytes(damaged)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_damaged_files_raise_nothing_else(tmp_path: Path, write_video: WriteVideo, name: str) -> None:
    rng = np.random.default_rng(0)
    content = write_video(tmp_path / name, 6, height=32, width=32).read_bytes()
    outcomes = Counter[bool]()
    for _ in range(150):
        (tmp_path / name).write_bytes(_damaged(content, rng))
        try:
            with closing(open_video(str(tmp_path / name))) as video:
                ids = [0, video.num_frames // 2, video.num_frames - 1]
                assert len(video.read(ids)) == 3
        except VideoError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) >= 20


PYRAMIDS = {
    "none": "bframes=3:b-adapt=0:b-pyramid=none",  # every B picture is disposable
    "normal": "bframes=3:b-adapt=0:b-pyramid=normal",  # the middle one of three is a reference
    "fields": "bframes=2:b-adapt=0:b-pyramid=none:interlaced=1",
    "no B": "bframes=0",
}


@pytest.mark.parametrize("extension", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_pictures_that_nobody_needs_are_not_decoded(
    tmp_path: Path, write_video: WriteVideo, pyramid: str, extension: str
) -> None:
    options = {"g": "24", "x264-params": PYRAMIDS[pyramid]}
    path = write_video(tmp_path / f"a.{extension}", 40, options=options, height=96, width=64)
    with av.open(str(path)) as container:
        pictures = list(container.decode(video=0))
    whole = [picture.to_ndarray(format="rgb24") for picture in pictures]
    b_pictures = {picture.pts for picture in pictures if picture.pict_type == av.video.frame.PictureType.B}
    references = len(whole) - len(b_pictures) * {"none": 1, "fields": 1, "normal": 0.5, "no B": 0}[pyramid]
    with closing(open_video(str(path), "pyav")) as video:
        video.read([0, 39])
        # FFmpeg's own word for the kind of each picture: B pictures, but for those that the pyramid builds upon. A
        # transport stream with B pictures seeks badly, so that all of it is decoded.
        if extension != "ts":
            assert video.num_decoded <= references + 1
            assert (video.num_decoded < len(whole)) == (pyramid != "no B")
        for ids in ([5], [0, 39], [11, 15, 19, 23, 27], range(40), [21, 22, 30], [38]):
            frames = video.read(list(ids))
            assert all(np.array_equal(frame, whole[place]) for frame, place in zip(frames, ids, strict=True))


def test_header_too_short_to_tell_how_slices_are_stored() -> None:
    for extradata in (b"\x01", b"\x01\x42\xc0\x1e", b"", None):
        assert h264_slice_kind(b"\x00\x00\x00\x02\x65\x88", extradata) is None
        assert not is_h264_disposable(b"\x00\x00\x00\x02\x65\x88", extradata)
    assert presentation_times([], 0) == (None, [])


def test_not_a_file() -> None:
    with pytest.raises(VideoError, match="not a file"):
        open_video("/dev/zero")


def test_cut_short(tmp_path: Path, write_video: WriteVideo, numbers: Numbers) -> None:
    for name in ("a.mp4", "a.mkv"):
        path = write_video(tmp_path / name, 60, options={"g": "8", "qp": "1"})
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(VideoError, match="cut short"):  # this mp4 has its index at the end
        open_video(str(tmp_path / "a.mp4"))
    with closing(open_video(str(tmp_path / "a.mkv"))) as video:  # Matroska has none: what is there is read
        assert 20 < video.num_frames < 60
        assert numbers(video.read([0, 20])) == [0, 20]


def _destroy(path: Path, first: int, last: int, intact: int = 2) -> None:
    """Overwrite the packets ``first`` to ``last``, but for their first half, or a part of 1 / ``intact``."""
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[first : last + 1]:
        assert position is not None
        content[position + size // intact : position + size] = bytes(size - size // intact)
    path.write_bytes(content)


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "auto"])
def test_only_frames_on_the_way_are_decoded(
    tmp_path: Path, write_video: WriteVideo, numbers: Numbers, decoder: DecoderName
) -> None:
    """Damage before the key frame and behind the last frame asked for is not met."""
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "10", "bf": "0", "sc_threshold": "0"})
    behind = ((36, 39), (41, 49), (51, 59)) if decoder == "pyav" else ()  # decord sends packets ahead, by chance more
    for first, last in ((1, 9), (11, 19), (21, 29), *behind):
        _destroy(path, first, last, intact=10**6)
    for ids, num_decoded in (([32, 34], 5), ([30], 1), ([31, 33, 35], 6), ([35], 6)):
        with closing(open_video(str(path), decoder)) as video:
            assert numbers(video.read(ids)) == ids
            assert video.num_decoded == num_decoded
    for ids in ([28, 31], [29], *([33, 36] for _ in behind[:1])):
        with closing(open_video(str(path), decoder)) as video, pytest.raises(VideoError):
            video.read(ids)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "open.mp4"])
def test_frames_that_do_not_decode_are_an_error(
    tmp_path: Path, write_video: WriteVideo, numbers: Numbers, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_video(tmp_path / name, 40, **TRAPS.get(name, {"options": {"g": "8", "qp": "10"}}))
    _destroy(path, 16, 20)
    for decoder in set(DECODERS) - {"decord"}:
        with closing(open_video(str(path), decoder)) as video:
            assert numbers(video.read([2, 9])) == [2, 9]  # other groups of pictures are not concerned
            with pytest.raises(VideoError, match=r"damaged, these frames do not decode"):
                video.read([2, 19, 30])
            assert numbers(video.read([35, 39])) == [35, 39]
    if "decord" in DECODERS:  # reads ahead: it may refuse, but never returns another picture
        with closing(open_video(str(path), "decord")) as video, pytest.raises(VideoError, match="decord"):
            video.read([2, 19, 30])
    assert capfd.readouterr() == ("", "")


def test_lost_frames_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_video: WriteVideo) -> None:
    path = str(write_video(tmp_path / "a.mp4", 24, options={"g": "4", "bf": "0"}))
    with closing(EncodedVideo(path, "pyav")) as video:
        assert video._pts is not None
        needed_packets, time_without_picture = video._needed_packets, video._pts[10] - 1

        def one_more(needed: set[int]) -> tuple[list[Any], list[int]]:
            packets, times = needed_packets(needed)
            return packets, sorted([*times, time_without_picture])

        monkeypatch.setattr(video, "_needed_packets", one_more)
        video._pts.insert(10, time_without_picture)
        video.num_frames += 1
        with pytest.raises(VideoError, match="24 of 25 frames decode"):
            video.read([9, 12])
        assert video.num_decoded == 25  # all of it was tried
        assert video.read([3]).shape == (1, 48, 64, 3)
        assert video.num_decoded == 4


ENCODERS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "hevc.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=8:bframes=2"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "crf": "20", "g": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "16", "cpu-used": "8", "auto-alt-ref": "1"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "8", "cpu-used": "8"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "8", "bf": "2", "b": "2M"}},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_reading_again_and_backwards(tmp_path: Path, write_video: WriteVideo, numbers: Numbers, name: str) -> None:
    """After each read the decoder has been told that the file ends."""
    path = str(write_video(tmp_path / name, 40, **ENCODERS[name]))
    for decoder in DECODERS if name == "h264.mp4" else ("pyav",):
        with closing(open_video(path, decoder)) as video:
            for ids in ([30], [31, 3, 30], [39], [0], [39, 0]):
                assert numbers(video.read(ids)) == ids
                assert ids != [39] or video.num_decoded <= 24  # the way from a key frame


def test_without_decord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_video: WriteVideo) -> None:
    monkeypatch.setattr(decode, "decord_is_installed", lambda: False)
    path = str(write_video(tmp_path / "a.mp4", 5))
    with closing(open_video(path)) as video:
        video.read([0])
        assert video.decoder == "pyav"
    with pytest.raises(ValueError, match=r"data\.decoder='decord': decord is not installed"):
        open_video(path, "decord")


@needs_decord
def test_decord_may_be_imported_first(tmp_path: Path, write_video: WriteVideo) -> None:
    path = str(write_video(tmp_path / "a.mp4", 5))
    code = f"""
import decord
from adamae_fast.data.decode import open_video
assert all(open_video({path!r}, d).read([4]).shape == (1, 48, 64, 3) for d in ("decord", "pyav"))
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


def test_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_video: WriteVideo) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "take:1 (größe).mp4", 5)
    for decoder in DECODERS:
        with closing(open_video("take:1 (größe).mp4", decoder)) as video:
            assert video.read([4]).shape == (1, 48, 64, 3)


def test_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is broken")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "is broken", "a.mp4: is broken")


def test_folder_of_images(tmp_path: Path, write_images: Callable[..., Path], numbers: Numbers) -> None:
    folder = str(write_images(tmp_path / "x", range(3, 15)))
    by_start = open_entry(Entry(folder, None, start=5, num_frames=6, kind="frames"))
    assert (by_start.num_frames, by_start.decoder, by_start.codec) == (6, "pillow", "png")
    assert numbers(by_start.read([0, 5, 0, 2])) == [5, 10, 5, 7]
    by_total = open_entry(Entry(folder, 4, start=0, num_frames=12, kind="frames"))
    assert numbers(by_total.read(range(12))) == list(range(3, 15))


def test_broken_folders_of_images(tmp_path: Path, write_images: Callable[..., Path]) -> None:
    def read(name: str, ids: list[int], num_frames: int | None = 4) -> None:
        open_entry(Entry(str(tmp_path / name), None, start=0, num_frames=num_frames, kind="frames")).read(ids)

    with pytest.raises(VideoError, match="no such file or directory"):
        read("missing", [0])
    (tmp_path / "none").mkdir()
    with pytest.raises(VideoError, match="holds 0 images numbered 0 or more"):
        read("none", [0], None)
    write_images(tmp_path / "few", range(3))
    with pytest.raises(VideoError, match="holds 3 images numbered 0 or more, not 4"):
        read("few", [0])
    folder = write_images(tmp_path / "broken", range(4))
    (folder / "img_00002.png").write_bytes((folder / "img_00001.png").read_bytes()[:60])
    read("broken", [0, 1, 3])
    with pytest.raises(VideoError, match=r"img_00002\.png"):
        read("broken", [2])
    write_images(tmp_path / "sizes", range(3))
    Image.new("RGB", (10, 20)).save(tmp_path / "sizes" / "img_00003.png")
    with pytest.raises(VideoError, match="images of different sizes"):
        read("sizes", [0, 3])
    Image.new("RGB", (10, 20)).save(tmp_path / "sizes" / "flow_00003.png")
    with pytest.raises(VideoError, match="have the same number"):
        read("sizes", [0])


@needs_decord
def test_decord_counts_other_frames_than_there_are(tmp_path: Path, write_video: WriteVideo) -> None:
    """Whatever decord does to a file, a count or a size that does not fit never reaches a clip."""
    path = write_video(tmp_path / "a.mp4", 12)
    others = {
        write_video(tmp_path / "short.mp4", 9): "decord: counts 9 frames, there are 12",
        write_video(tmp_path / "large.mp4", 12, height=96): r"decord: frames of \(96, 64\), expected \(48, 64\)",
    }
    for other, says in others.items():
        with closing(EncodedVideo(str(path), "decord")) as video:
            video._file = str(other)
            with pytest.raises(VideoError, match=says):
                video.read([3])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_file_that_cannot_be_opened_is_closed(tmp_path: Path) -> None:
    _write_sound(tmp_path / "sound.wav")
    gc.disable()  # it would find what refers to itself, some time
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(VideoError):
                open_video(str(tmp_path / "sound.wav"))
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
