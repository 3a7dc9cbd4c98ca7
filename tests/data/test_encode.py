"""What ``data prepare`` makes of one video's pictures; tests/data/test_prepare.py has the rest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from adamae_fast.data.decode import EncodedVideo, VideoError, fitted_size, open_entry, open_video
from adamae_fast.data.encode import Settings, encode
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.prepare import prepare
from adamae_fast.data.synthetic import render

WriteVideo = Callable[..., Path]


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_content_is_the_source_resized(tmp_path: Path, codec: Any) -> None:
    """Against Pillow's resize of the frames before the source was ever encoded; a neighbour frame is farther off."""
    frames, _ = render("move-left", np.random.default_rng(0), num_frames=10, width=192, height=144)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "8"})
        stream.width, stream.height, stream.pix_fmt = 192, 144, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "list.txt").write_text("a.mp4\n")
    assert prepare(str(tmp_path / "list.txt"), str(tmp_path / "out"), codec=codec, short_side=96, num_workers=1) == 0
    with closing(open_entry(read_manifest(str(tmp_path / "out"))[0])) as video:
        read = video.read(np.arange(10)).astype(float)
    with closing(open_video(str(tmp_path / "a.mp4"), "pyav")) as video:
        resized = np.stack(list(video.in_order(96))).astype(float)
    assert read.shape == resized.shape == (10, 96, 128, 3)
    bicubic = Image.Resampling.BICUBIC
    truth = np.stack([np.asarray(Image.fromarray(frame).resize((128, 96), bicubic)) for frame in frames]).astype(float)
    assert _psnr(resized, truth) > 44
    # Colour is stored at half the resolution: brightness is what an encoder is to keep.
    assert _psnr(read, truth) > 29
    assert _psnr(read.mean(axis=-1), truth.mean(axis=-1)) > 35
    errors = ((read[:, None] - truth[None]) ** 2).mean(axis=(2, 3, 4))
    assert (errors.argmin(axis=1) == np.arange(10)).all()


def _psnr(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(10 * np.log10(255**2 / ((one - other) ** 2).mean()))


@pytest.mark.parametrize(
    ("height", "width", "short_side", "expected"),
    [
        (256, 340, 320, (256, 340)),
        (720, 1280, 320, (320, 568)),
        (1280, 720, 320, (568, 320)),
        (241, 321, 320, (240, 320)),
        (321, 321, 320, (320, 320)),
        (343, 323, 320, (340, 320)),
        (1, 1, 320, (2, 2)),
        (16, 8192, 320, (16, 8192)),
        (3, 5, 320, (2, 4)),
    ],
)
def test_sizes(height: int, width: int, short_side: int, expected: tuple[int, int]) -> None:
    assert fitted_size(height, width, short_side) == expected


def test_an_encoder_that_refuses_a_video(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "wide.mkv", 2, codec="ffv1", pix_fmt="bgr0", height=16, width=17000)
    settings = Settings(short_side=320, codec="h264", keyint=16, max_seconds=0.0)
    with pytest.raises(VideoError, match=r"wide\.mkv: cannot be encoded"):
        encode(Entry(str(path), None), tmp_path / "a", settings)


def test_shared_clips_keep_their_frames(shared_clips: Path, tmp_path: Path) -> None:
    """Rotated, without a first key frame, of variable rate, 4:4:4, two streams: each frame is nearest to its own."""
    settings = Settings(short_side=64, codec="h264", keyint=16, max_seconds=0.0)
    for name in ("discard_first_keyframe.mp4", "nasa_13013_rotated.mp4", "odd_size_444_10bit.mp4", "unordered.mov"):
        source = Entry(str(shared_clips / "bad" / name), None)
        facts = encode(source, tmp_path / name, settings)
        with closing(open_entry(source, "pyav")) as original:
            frames = list(original.in_order(64))
        assert facts["frames"] == len(frames) == original.num_frames
        with closing(EncodedVideo(str(tmp_path / name), "pyav")) as video:
            read = video.read(range(facts["frames"])).astype(float)
        errors = ((read[:, None] - np.stack(frames)[None]) ** 2).mean(axis=(2, 3, 4))
        assert (np.diag(errors) <= errors.min(axis=1) + 1).all()
    with pytest.raises(VideoError, match="damaged, its frames do not decode"):
        encode(Entry(str(shared_clips / "bad" / "corrupted.mp4"), None), tmp_path / "x", settings)
