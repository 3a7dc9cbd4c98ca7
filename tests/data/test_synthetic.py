"""The rendered set: real files, true boxes, honest labels, the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from jsonargparse import auto_cli
from numpy.typing import NDArray

from adamae_fast.data import synthetic
from adamae_fast.data.synthetic import FRAME_RATE, MOTIONS, read_boxes, render, synthesize

NUM_VIDEOS, NUM_FRAMES, WIDTH, HEIGHT = 2 * len(MOTIONS), 24, 160, 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "set"
    assert synthesize(str(out), num_videos=NUM_VIDEOS, num_frames=NUM_FRAMES) == out / "manifest.txt"
    return out


def entries(folder: Path) -> list[tuple[Path, str]]:
    """Path and name of the class of each video, as the manifest has them."""
    labels = json.loads((folder / "labels.json").read_text())
    lines = [line.split(" ") for line in (folder / "manifest.txt").read_text().splitlines()]
    return [(folder / path, labels[int(label)]) for path, label in lines]


def boxes_of(path: Path) -> NDArray[np.float64]:
    boxes_TO4 = read_boxes(path)
    assert boxes_TO4 is not None
    return boxes_TO4


def decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def inside(boxes_TO4: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Pixels within any box, (T, H, W)."""
    y, x = np.arange(height)[:, None], np.arange(width)
    x0, y0, x1, y1 = boxes_TO4[..., None, None].transpose(2, 0, 1, 3, 4)
    return ((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)).any(axis=1)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_manifest_classes_and_files(folder: Path) -> None:
    listed = entries(folder)
    assert [name for _, name in listed[:8]] != [name for _, name in listed[8:]]
    for block in (listed[:8], listed[8:]):
        assert sorted(name for _, name in block) == sorted(MOTIONS)
    for index, (path, name) in enumerate(listed):
        assert path.name == f"{index:04d}_{name}.{('mp4', 'webm')[index % 2]}"
        truth = json.loads(path.with_suffix(".boxes.json").read_text())
        assert MOTIONS[truth.pop("label")] == name
        assert np.array_equal(truth.pop("boxes"), boxes_of(path))
        assert truth == {"width": WIDTH, "height": HEIGHT, "num_frames": NUM_FRAMES}
    assert len(list(folder.iterdir())) == 3
    assert len(list((folder / "videos").iterdir())) == 2 * NUM_VIDEOS


def test_files_are_h264_and_vp9_and_decode(folder: Path) -> None:
    decord = pytest.importorskip("decord")
    for index, (path, _) in enumerate(entries(folder)):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == ("h264", "vp9")[index % 2]
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == FRAME_RATE
        frames_THWC = decode(path)
        assert frames_THWC.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3)
        reader = decord.VideoReader(str(path), num_threads=1)
        assert len(reader) == NUM_FRAMES
        # Out of order: seeking finds the same frames (colour conversion differs by rounding).
        ids = [NUM_FRAMES - 1, 0, NUM_FRAMES // 2]
        difference = reader.get_batch(ids).asnumpy().astype(int) - frames_THWC[ids]
        assert np.abs(difference).mean() < 1.5


def test_boxes_hold_what_moves(folder: Path) -> None:
    shares = []
    for path, name in entries(folder):
        change_THW = np.abs(np.diff(decode(path).astype(float), axis=0)).mean(axis=-1)
        covered_THW = inside(boxes_of(path), HEIGHT, WIDTH)
        either_THW = covered_THW[1:] | covered_THW[:-1]
        assert change_THW[either_THW].mean() > 8 * change_THW[~either_THW].mean(), name
        shares.append(covered_THW.mean())
    assert 0.08 < np.mean(shares) < 0.20


@pytest.mark.parametrize("motion", MOTIONS)
def test_boxes_are_the_extent_of_the_sprites(motion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On grey, because a sprite's dark rim would not show on a dark background.
    grey_THWC = np.full((10, 90, 120, 3), 0.5, dtype=np.float32)
    monkeypatch.setattr(synthetic, "_background", lambda *_: grey_THWC.copy())
    size = {"num_frames": 10, "width": 120, "height": 90}
    counts = set()
    for seed in range(6):
        frames_THWC, boxes_TO4 = render(motion, np.random.default_rng(seed), **size)
        changed_THW = np.abs(frames_THWC / 255 - grey_THWC).max(axis=-1) > 0.01
        assert frames_THWC.dtype == np.uint8
        assert boxes_TO4.min() >= 0
        assert (boxes_TO4.max(axis=(0, 1)) <= (120, 90, 120, 90)).all()
        assert (boxes_TO4[..., 2:] - boxes_TO4[..., :2]).min() >= 5
        # A rim that is less than a tenth covered may lie outside.
        assert not (changed_THW & ~inside(boxes_TO4 + np.array([-1, -1, 1, 1]), 90, 120)).any()
        for t, o in np.ndindex(boxes_TO4.shape[:2]):
            x0, y0, x1, y1 = boxes_TO4[t, o].astype(int)
            region = changed_THW[t, y0:y1, x0:x1]
            assert region[0].any(), (seed, t, o)
            assert region[-1].any(), (seed, t, o)
            assert region[:, 0].any(), (seed, t, o)
            assert region[:, -1].any(), (seed, t, o)
            assert region.mean() > 0.4, (seed, t, o)  # a star that is a ring
        counts.add(boxes_TO4.shape[1])
    assert counts == {1, 2}


def test_labels_name_the_motion_of_the_boxes(folder: Path) -> None:
    for path, name in entries(folder):
        boxes_TO4 = boxes_of(path)
        centre_TO2 = (boxes_TO4[..., :2] + boxes_TO4[..., 2:]) / 2 / (WIDTH, HEIGHT)
        size_TO = np.sqrt((boxes_TO4[..., 2:] - boxes_TO4[..., :2]).prod(axis=-1))
        dx, dy = (centre_TO2[-1] - centre_TO2[0]).T
        swing_O2 = np.ptp(centre_TO2, axis=0)
        growth_O = size_TO[-1] / size_TO[0]
        axis, sign = {"move-left": (0, -1), "move-right": (0, 1), "move-up": (1, -1), "move-down": (1, 1)}.get(
            name, (None, 0)
        )
        if axis is not None:
            assert (sign * (dx, dy)[axis] > 0.5).all(), name
            assert (swing_O2[:, 1 - axis] < 0.1).all(), name
        elif name == "oscillate":
            assert (swing_O2[:, 0] > 0.35).all()
            turns_O = (np.diff(np.sign(np.diff(centre_TO2[..., 0], axis=0)), axis=0) != 0).sum(axis=0)
            assert (turns_O >= 3).all()
            assert (swing_O2[:, 1] < 0.02).all()
        else:
            assert (swing_O2 < 0.1).all(), name
            if name == "zoom-in":
                assert (growth_O > 2).all()
            elif name == "zoom-out":
                assert (growth_O < 0.5).all()
            else:
                assert name == "rotate"
                assert (np.abs(growth_O - 1) < 0.2).all()


def test_background_is_easier_to_predict_than_sprites(folder: Path) -> None:
    """Predict every token by the mean over the set, on normalised targets: the first thing that a model learns."""
    tokens, covered = [], []
    for path, _ in entries(folder):
        frames_THWC = decode(path)[:, :112] / 255
        cells = (NUM_FRAMES // 2, 2, 7, 16, 10, 16)
        pixels = frames_THWC.reshape(*cells, 3).transpose(0, 2, 4, 1, 3, 5, 6).reshape(-1, 512, 3)
        tokens.append(
            (pixels - pixels.mean(axis=1, keepdims=True)) / (pixels.std(axis=1, ddof=1, keepdims=True) + 1e-6)
        )
        covered.append(inside(boxes_of(path), HEIGHT, WIDTH)[:, :112].reshape(cells).mean(axis=(1, 3, 5)).ravel())
    target, share = np.concatenate(tokens), np.concatenate(covered)
    error = ((target - target.mean(axis=0)) ** 2).mean(axis=(1, 2))
    assert error[share > 0.5].mean() > 1.4 * error[share == 0].mean()


@pytest.mark.parametrize("seed", range(6))
def test_background_is_textured_and_distractors_pan_with_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def background() -> NDArray[np.float32]:
        return synthetic._background(np.random.default_rng(seed), NUM_FRAMES, WIDTH, HEIGHT)

    frames_THWC = background()
    monkeypatch.setattr(synthetic, "draw", lambda *_: None)
    plain_THWC = background()
    covered_THW = np.abs(frames_THWC - plain_THWC).max(axis=-1) > 0.02
    assert 0.05 < covered_THW.mean() < 0.2

    # Texture: what is left of 16 x 16 pixels without their mean and slopes.
    blocks = plain_THWC[0, :112].mean(axis=-1).reshape(7, 16, 10, 16).transpose(0, 2, 1, 3).reshape(70, 256)
    y, x = np.mgrid[:16, :16]
    plane = np.stack([np.ones(256), y.ravel(), x.ravel()], axis=1)
    residual = blocks.T - plane @ np.linalg.lstsq(plane, blocks.T, rcond=None)[0]
    assert residual.std() > 0.007

    # Panning: horizontal differences, which the light does not touch, of the first frame are found again in the last.
    detail_THW = np.diff(plain_THWC.mean(axis=-1), axis=2)
    reach = 14
    inner = (slice(reach, -reach), slice(reach, -reach))
    shifts = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]

    def difference(shift: tuple[int, int]) -> float:
        return float(np.abs(np.roll(detail_THW[0], shift, axis=(0, 1)) - detail_THW[-1])[inner].mean())

    shift = min(shifts, key=difference)
    assert np.hypot(*shift) > 0.03 * HEIGHT
    assert difference(shift) < 0.7 * difference((0, 0))
    moved_HW, last_HW = np.roll(covered_THW[0], shift, axis=(0, 1))[inner], covered_THW[-1][inner]
    assert (moved_HW & last_HW).sum() > 0.85 * (moved_HW | last_HW).sum()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    size = {"num_frames": 12, "width": 96, "height": 64}
    synthesize(str(tmp_path / "a"), num_videos=4, **size)
    synthesize(str(tmp_path / "b"), num_videos=4, **size)
    synthesize(str(tmp_path / "fewer"), num_videos=2, **size)
    synthesize(str(tmp_path / "other"), num_videos=2, **size, seed=1)
    first = tree(tmp_path / "a")
    assert first == tree(tmp_path / "b")
    fewer, other = tree(tmp_path / "fewer"), tree(tmp_path / "other")
    videos = [name for name in fewer if name.startswith("videos/")]
    assert len(videos) == 4
    assert all(first[name] == fewer[name] for name in videos)
    assert not {fewer[name] for name in videos} & set(other.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_videos": 0}, "num_videos=0: choose at least 1"),
        ({"num_frames": 7}, "num_frames=7: choose at least 8"),
        ({"width": 62}, "width=62: choose at least 64"),
        ({"height": -2}, "height=-2: choose at least 64"),
        ({"width": 161}, "width=161: choose an even number"),
        ({"height": 121}, "height=121: choose an even number"),
        ({"seed": -1}, "seed=-1: choose at least 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(str(tmp_path / "out"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(ValueError, match="already holds something; choose a new folder"):
            synthesize(str(out), num_videos=1)
    assert tree(tmp_path) == {"precious.txt": b"mine"}


def test_an_empty_or_missing_folder_is_filled(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "deep" / "er"):
        if out == tmp_path:
            out = tmp_path / "empty"
            out.mkdir()
        synthesize(str(out), num_videos=1, num_frames=8, width=64, height=64)
        assert sorted(p.name for p in out.iterdir()) == ["labels.json", "manifest.txt", "videos"]


def test_an_interrupted_render_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = synthetic.encode, []

    def interrupted(path: Path, *rest: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        encode(path, *rest)

    monkeypatch.setattr(synthetic, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(str(tmp_path / "out"), num_videos=3, num_frames=8, width=64, height=64)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_read_boxes_without_and_with_a_broken_file(tmp_path: Path) -> None:
    video, beside = tmp_path / "clip.name.mp4", tmp_path / "clip.name.boxes.json"
    assert read_boxes(video) is None
    beside.write_text('{"num_frames": 1, "boxes": [[[1, 2, 3.5, 4]]]}')
    boxes_TO4 = read_boxes(str(video))
    assert boxes_TO4 is not None
    assert boxes_TO4.dtype == np.float64
    assert boxes_TO4.tolist() == [[[1, 2, 3.5, 4]]]
    for text in (
        "{",
        "[]",
        "{}",
        '{"num_frames": 2, "boxes": [[[1, 2, 3, 4]]]}',
        '{"num_frames": 1, "boxes": [[[1]]]}',
    ):
        beside.write_text(text)
        with pytest.raises(ValueError, match=r"clip\.name\.boxes\.json.*render the set again"):
            read_boxes(video)


def test_command_line_reads_the_signature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        auto_cli(synthesize, args=["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("--num_videos", "Videos to render", "--seed", "Source of every random choice", "Folder to make"):
        assert text in shown
    out = tmp_path / "set"
    manifest = auto_cli(
        synthesize, args=[str(out), "--num_videos=1", "--num_frames=8", "--width=64", "--height=64", "--seed=3"]
    )
    assert manifest == out / "manifest.txt"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Rendering videos" in printed.err
