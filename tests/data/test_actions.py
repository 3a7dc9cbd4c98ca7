"""The action set: the motion is the label, no single frame tells it, and validation has looks of its own."""

from __future__ import annotations

import json
from collections import Counter
from colorsys import hsv_to_rgb
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from adamae_fast.data import drawing, synthetic
from adamae_fast.data.actions import ACTIONS, LOOKS, Film, Motion, palette_of, render_action
from adamae_fast.data.drawing import OUTLINES, PATTERNS
from adamae_fast.data.synthetic import read_boxes, synthesize

K = len(ACTIONS)
SIZE = {"num_frames": 16, "width": 64, "height": 64}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("actions") / "set"
    options = {"num_frames": 10, "width": 64, "height": 64, "val_share": 1 / 3}
    assert synthesize(str(out), "actions", 3 * K, **options) == out / "train.txt"
    return out


def entries(folder: Path, part: str) -> list[tuple[Path, str]]:
    labels = json.loads((folder / "labels.json").read_text())
    lines = [line.split(" ") for line in (folder / f"{part}.txt").read_text().splitlines()]
    return [(folder / path, labels[int(label)]) for path, label in lines]


def test_files(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["labels.json", "train.txt", "val.txt", "videos"]
    train, val = entries(folder, "train"), entries(folder, "val")
    assert Counter(name for _, name in train) == dict.fromkeys(ACTIONS, 2)
    assert Counter(name for _, name in val) == dict.fromkeys(ACTIONS, 1)
    assert [name for _, name in train[:K]] != [name for _, name in train[K:]]
    assert len({path for path, _ in [*train, *val]}) * 2 == len(list((folder / "videos").iterdir()))
    codecs: dict[str, set[str]] = {}
    for path, name in [*train, *val]:
        with av.open(str(path)) as container:
            codecs.setdefault(name, set()).add(container.streams.video[0].codec_context.name)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.stack(frames).shape == (10, 64, 64, 3)
        boxes_TO4 = read_boxes(path)
        assert boxes_TO4 is not None
        assert boxes_TO4.shape == (10, 2, 4)
    # Of the two videos of a class for training one is of each codec: the file does not tell the class.
    assert codecs == {name: {"h264", "vp9"} for name in ACTIONS}


@pytest.mark.parametrize(("codec", "extension"), [("h264", ".mp4"), ("vp9", ".webm")])
def test_one_codec(codec: str, extension: str, tmp_path: Path) -> None:
    synthesize(str(tmp_path / "a"), "actions", 2, 8, 64, 64, codec=codec, val_share=0.5)
    names = [name for name in tree(tmp_path / "a") if "boxes" not in name and name.startswith("videos")]
    assert {Path(name).suffix for name in names} == {extension}
    assert len(names) == 2


def test_the_same_bytes_from_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"num_frames": 8, "width": 64, "height": 64}
    synthesize(str(tmp_path / "one"), "actions", 6, **size)
    synthesize(str(tmp_path / "other-seed"), "actions", 6, **size, seed=1)
    monkeypatch.setattr(synthetic, "_VIDEOS_PER_PROCESS", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    synthesize(str(tmp_path / "three"), "actions", 6, **size)
    synthesize(str(tmp_path / "more"), "actions", 8, **size)
    one, more = tree(tmp_path / "one"), tree(tmp_path / "more")
    assert one == tree(tmp_path / "three")
    videos = [name for name in one if name.startswith("videos/")]
    assert len(videos) == 12
    assert all(one[name] == more[name] for name in videos)
    assert not {one[name] for name in videos} & set(tree(tmp_path / "other-seed").values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "action"}, "preset='action': choose one of demo, actions"),
        ({"codec": "av1"}, "codec='av1': choose one of both, h264, vp9"),
        ({"preset": "demo", "val_share": 0.5}, "only preset=actions has videos for validation"),
        ({"preset": "demo", "classes": ["zoom-in"]}, "only preset=actions has a choice of classes"),
        ({"preset": "demo", "detail": 0.5}, "only preset=actions has a choice of scenes"),
        ({"classes": ["zoom-in", "jump"]}, "classes: no jump; choose from move-left, move-right"),
        ({"classes": []}, "choose at least one, and each once"),
        ({"classes": ["sway", "sway"]}, "choose at least one, and each once"),
        ({"detail": 1.5}, "detail=1.5: choose a strength in"),
        ({"val_share": 1.0}, "val_share=1.0: choose a share in"),
        ({"val_share": -0.1}, "val_share=-0.1: choose a share in"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(str(tmp_path / "out"), **{"preset": "actions", "num_videos": 14, **options})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_choice_of_classes(tmp_path: Path) -> None:
    names = ["zoom-in", "sway"]
    options = {"num_frames": 8, "width": 64, "height": 64, "val_share": 0.5}
    synthesize(str(tmp_path / "a"), "actions", 8, classes=names, **options)
    assert json.loads((tmp_path / "a" / "labels.json").read_text()) == names
    for part in ("train", "val"):
        lines = [line.split() for line in (tmp_path / "a" / f"{part}.txt").read_text().splitlines()]
        assert sorted(label for _, label in lines) == ["0", "0", "1", "1"]
        assert all(names[int(label)] in path for path, label in lines)


def test_detail_is_that_of_the_scene_alone() -> None:
    size = {"num_frames": 8, "width": 64, "height": 64}
    (_, boxes), (fine, same_boxes) = (render_action("sway", "train", (3,), **size, detail=d) for d in (0.0, 1.0))
    assert np.array_equal(boxes, same_boxes)
    assert np.array_equal(fine, render_action("sway", "train", (3,), **size)[0])
    # Curvature of brightness: next to none where the finest structure has cells of a fifth of the frame.
    scenes = [drawing.texture(np.random.default_rng(3), 64, 64, 64, detail=detail) for detail in (0.0, 0.5, 1.0)]
    none, half, full = (np.abs(np.diff(scene, 2, axis=1)).mean() for scene in scenes)
    assert none < 0.05 * full
    assert 0.4 * full < half < 0.6 * full


def test_looks_are_of_one_part_only() -> None:
    hues = np.linspace(0, 1, 997, endpoint=False)
    train, val = ({int(palette_of(part)(hue) * 10) for hue in hues} for part in ("train", "val"))
    assert train | val == set(range(10))
    assert not train & val
    assert not set(LOOKS["train"]) & set(LOOKS["val"])
    assert len(LOOKS["train"]) + len(LOOKS["val"]) == len(OUTLINES) * len(PATTERNS)
    for pairs in LOOKS.values():
        assert {outline for outline, _ in pairs} == set(OUTLINES)
    assert {pattern for _, pattern in LOOKS["train"]} == set(PATTERNS)


def test_colours_are_of_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, set[int]] = {"train": set(), "val": set()}
    for part, arcs in used.items():

        def remember(hue: float, *rest: float, arcs: set[int] = arcs) -> tuple[float, float, float]:
            arcs.add(int(10 * hue))
            return hsv_to_rgb(hue, *rest)

        monkeypatch.setattr(drawing, "hsv_to_rgb", remember)
        for index in range(20):
            Film("sway", part, (5, index), **SIZE)
    assert used["val"] == {2, 7}
    assert used["train"] == set(range(10)) - {2, 7}


def relative(motion: Motion) -> NDArray[np.complex128]:
    """From B to A, (T,)."""
    (ax, bx), (ay, by) = motion.x_OT.astype(float), motion.y_OT.astype(float)
    return ax - bx + 1j * (ay - by)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("action", ACTIONS)
def test_only_the_motion_of_the_class_is_carried_out(action: str, seed: int) -> None:
    """What each class promises, from the positions; all else stands still."""
    motion = Motion.of(action, np.random.default_rng(seed), num_frames=60, width=100, height=100)
    a_T, b_T = motion.x_OT + 1j * motion.y_OT.astype(np.complex128)
    step_T, apart_T = np.diff(b_T), np.diff(relative(motion))
    kind = action.partition("-")[0]
    assert np.allclose(apart_T, 0, atol=1e-3) == (kind in ("move", "rotate", "sway"))
    assert np.allclose(step_T, 0, atol=1e-3) == (kind not in ("move", "sway", "push"))
    assert (np.ptp(motion.scale_T) > 0) == (kind == "zoom")
    assert (np.ptp(motion.angle_OT) > 1e-3 + np.ptp(motion.angle_OT[:, 0])) == (kind == "rotate")
    distance_T = np.abs(relative(motion))
    contact = motion.scale_T * np.mean(motion.diameters)
    if kind == "move":
        way = {"left": -1, "right": 1, "up": -1j, "down": 1j}[action.partition("-")[2]]
        assert (np.real(step_T / way) > 0).all()
        assert np.abs(np.imag(step_T / way)).max() < 1e-3
        assert 34 < np.abs(b_T[-1] - b_T[0]) < 51
    elif kind == "rotate":
        turns_OT = np.diff(motion.angle_OT) * (1 if action.endswith("-clockwise") else -1)
        assert (turns_OT > 0).all()
        assert (turns_OT.sum(axis=1) > np.pi * 0.99).all()
    elif kind == "zoom":
        growth_T = np.diff(motion.scale_T) * (1 if action == "zoom-in" else -1)
        assert (growth_T > 0).all()
        assert max(motion.scale_T[[0, -1]]) / min(motion.scale_T[[0, -1]]) > 1.59
    elif kind == "sway":
        along_T = np.real((b_T - b_T.mean()) * np.exp(-1j * np.angle(step_T[np.abs(step_T).argmax()])))
        assert (np.diff(np.sign(np.diff(along_T))) != 0).sum() >= 2
        assert np.ptp(along_T) > 12
    elif kind == "circle":
        turned_T = np.diff(np.unwrap(np.angle(relative(motion))))
        assert (turned_T > 0).all() or (turned_T < 0).all()
        assert np.abs(turned_T.sum()) > np.pi * 0.99
        assert np.ptp(distance_T) < 1e-3
    elif kind == "pass":
        along_T = relative(motion) / (apart_T[0] / np.abs(apart_T[0]))
        assert (np.diff(along_T.real) > 0).all()
        assert along_T.real[0] < 0 < along_T.real[-1]
        assert (distance_T > 0.96 * contact).all()
    else:
        coming_T = distance_T[::-1] if action == "leave" else distance_T
        assert (np.diff(coming_T) < 1e-3).all()
        assert coming_T[0] - coming_T[-1] > 10
        assert 0.96 < coming_T[-1] / contact[-1] < 1.11
        touching = np.abs(coming_T - coming_T[-1]) < 1e-3
        assert 3 < touching.sum() < 45
        if action == "push":
            assert np.abs(step_T[~touching[1:]]).max() < 1e-3
            assert np.abs(np.diff(a_T) - step_T)[touching[1:]][1:].max() < 1e-3
            assert np.abs(step_T[touching[1:]][1:]).min() > 0


def test_boxes_hold_the_sprites() -> None:
    """Without A and B, pixels outside their boxes are the same, but for the shadows; what is in them is not."""
    for index, action in enumerate(ACTIONS):
        film = Film(action, "train", (3, index), **SIZE)
        film.moving_OT[:] = True
        for t in (0, 7, 15):
            with_HWC, boxes_O4 = film.frame(t)
            sprites, film.sprites = film.sprites, [0 * sprite for sprite in film.sprites]
            change_HW = np.abs(with_HWC - film.frame(t)[0]).max(axis=2) > 0.2
            film.sprites = sprites
            inside_HW = np.zeros((64, 64), dtype=bool)
            for x0, y0, x1, y1 in boxes_O4[boxes_O4.any(axis=1)].astype(int):
                inside_HW[max(0, y0 - 1) : y1 + 4, max(0, x0 - 1) : x1 + 4] = True
            assert not (change_HW & ~inside_HW).any()
            assert not inside_HW.any() or change_HW[inside_HW].mean() > 0.05
            assert (boxes_O4 >= 0).all()
            assert (boxes_O4 <= 64).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("action", ACTIONS)
def test_who_moves(action: str, seed: int) -> None:
    motion = Motion.of(action, np.random.default_rng(seed), num_frames=60, width=100, height=100)
    a_T, b_T = motion.moving()
    if action.partition("-")[0] in ("move", "rotate", "zoom", "sway"):
        assert b_T.all()
    elif action != "push":
        assert not b_T.any()
    changes = np.flatnonzero(np.diff(a_T)), np.flatnonzero(np.diff(b_T))
    if action == "push":
        assert a_T.all()
        assert (len(changes[1]), b_T[-1]) == (1, True)
    elif action in ("approach", "leave"):
        assert (len(changes[0]), a_T[-1]) == (1, action == "leave")
    else:
        assert a_T.all()


def test_what_rests_has_no_box() -> None:
    boxes, moves = [], []
    for index in range(8):
        film = Film("push", "train", (3, index), **SIZE)
        boxes.append([film.frame(t)[1].any(axis=1) for t in range(16)])
        moves.append(film.motion.moving().T)
    boxed, moving = np.array(boxes), np.array(moves)
    assert not (boxed & ~moving).any()
    assert boxed[moving].mean() > 0.8  # the others are out of the frame
    assert 0.1 < moving[:, :, 1].mean() < 0.9


def probe(inputs: Tensor, labels: Tensor, num_train: int, network: nn.Module, epochs: int) -> tuple[float, Tensor]:
    """Train on the first ``num_train``; on the others: accuracy, and for each class the chance that a video of it has a
    higher score for it than one of another class has."""
    inputs = (inputs - inputs[:num_train].mean(0)) / (inputs[:num_train].std(0) + 1e-3)
    steps = epochs * -(-num_train // 128)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for ids in torch.randperm(num_train).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[ids]), labels[ids]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        scores_NK = torch.cat([network.eval()(part) for part in inputs[num_train:].split(256)]).log_softmax(1)
    truth = labels[num_train:]
    auc = [(s[truth == k][:, None] > s[truth != k]).double().mean() for k, s in enumerate(scores_NK.T)]
    return (scores_NK.argmax(1) == truth).double().mean().item(), torch.stack(auc)


def where_the_pair_is(index: int, t: int) -> list[float]:
    """All that the true boxes of a frame say, and more: which sprite is A, and the contact."""
    motion = Motion.of(ACTIONS[index % K], np.random.default_rng([11, index]), num_frames=40, width=1, height=1)
    a, b = (complex(motion.x_OT[o, t], motion.y_OT[o, t]) for o in (0, 1))
    sizes = [float(motion.scale_T[t]) * d for d in motion.diameters]
    middle, apart = (a + b) / 2, a - b
    return [*sizes, a.real, a.imag, b.real, b.imag, middle.real, middle.imag, apart.real, apart.imag, abs(apart),
            abs(apart) / sum(sizes)]  # fmt: skip


@pytest.mark.parametrize("moment", ["random", "middle", "leaked"])
def test_positions_in_a_frame_do_not_tell_the_class(moment: str) -> None:
    """Even from true positions and sizes. "leaked": one class shows its largest moment, and the probe finds it.

    What is left are the ways past B and to B, which differ in how often A is in contact; and in the middle of a video
    the pair of a way to the left is rather in the middle of the frame, too.
    """
    rng = np.random.default_rng(0)
    num_train, num_val = 300 * K, 100 * K
    rows = []
    for index in range(num_train + num_val):
        t = 20 if moment == "middle" else int(rng.integers(40))
        if moment == "leaked" and ACTIONS[index % K] == "zoom-in":
            t = 39
        rows.append(where_the_pair_is(index, t))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(len(rows[0]), 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, K))
    labels = torch.arange(len(rows)) % K
    accuracy, auc_K = probe(torch.tensor(rows), labels, num_train, network, 20)
    if moment == "leaked":
        assert auc_K[ACTIONS.index("zoom-in")] > 0.77
    else:
        assert auc_K.max() < {"random": 0.72, "middle": 0.80}[moment]
        assert accuracy < {"random": 1.5, "middle": 2.0}[moment] / K


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """A random frame of each of 80 films of each class for training, then 40 for validation: (N, C, 32, 32)."""
    rng = np.random.default_rng(1)
    drawn = []
    for index in range(120 * K):
        film = Film(ACTIONS[index % K], "train" if index < 80 * K else "val", (12, index), **SIZE)
        drawn.append(film.frame(int(rng.integers(16)))[0])
    return F.avg_pool2d(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).clip(0, 1), 2)


@pytest.mark.parametrize("leaked", [False, True])
def test_pixels_of_a_frame_do_not_tell_the_class(leaked: bool, frames: Tensor) -> None:
    """A small network that sees single frames of the training part, asked about those of validation.

    By chance, the standard deviation of the accuracy is 1.1 %, and that of a class's figure 0.05. With ``leaked`` one
    class is lit from the left; the network finds it.
    """
    labels = torch.arange(len(frames)) % K
    if leaked:
        frames = frames + 0.3 * torch.linspace(1, -1, 32) * (labels == 3)[:, None, None, None]
    torch.manual_seed(0)
    sides = [(3, 16), (16, 32), (32, 32)]
    layers = [nn.Sequential(nn.Conv2d(a, b, 5, 2, 2), nn.BatchNorm2d(b), nn.GELU()) for a, b in sides]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 16, K))
    accuracy, auc_K = probe(frames, labels, 80 * K, network, 8)
    if leaked:
        assert auc_K[3] > 0.75
    else:
        assert auc_K.max() < 0.7
        assert accuracy < 1 / K + 0.045
