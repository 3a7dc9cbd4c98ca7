import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from adamae_fast.config import DataConfig, MaskConfig, ModelConfig, PretrainConfig, save_config
from adamae_fast.data.clips import frame_ids
from adamae_fast.data.manifest import Entry, read_manifest
from adamae_fast.data.prepare import prepare
from adamae_fast.data.synthetic import read_boxes, synthesize
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.visualize import read_center_clip, visualize, write_report
from adamae_fast.run_folder import RunFolder

CONFIG = PretrainConfig(
    model=ModelConfig(size="nano", num_frames=4, frame_size=64, patch_size=16),
    mask=MaskConfig(ratio=0.75),
    data=DataConfig(stride=2),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two small rendered videos, H.264 and VP9, with boxes."""
    manifest = synthesize(
        str(tmp_path_factory.mktemp("videos") / "set"), num_videos=2, num_frames=10, width=96, height=64
    )
    return [str(manifest.parent / line.split()[0]) for line in manifest.read_text().splitlines()]


def build_model(config=CONFIG):
    torch.manual_seed(0)
    return AdaMAE(config.model, config.mask, config.loss)


@pytest.fixture
def run(tmp_path):
    """A run's folder with one checkpoint."""
    run = RunFolder(tmp_path / "runs" / "tiny")
    folder = run.checkpoint(30)
    folder.mkdir(parents=True)
    save_file(build_model().state_dict(), folder / "model.safetensors")
    save_config(CONFIG, folder / "config.yaml")
    save_config(CONFIG, run.config)
    lines = [json.dumps({"step": step, "loss_reconstruction": 1 / step}) + "\n" for step in (1, 10, 20, 30)]
    run.metrics.write_text("".join(lines))
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_center_clip_is_the_middle_of_time_and_space(videos):
    clip = read_center_clip(Entry(videos[0], None), CONFIG)
    assert clip.num_video_frames == 10
    assert clip.frame_ids.tolist() == [1, 3, 5, 7]
    assert (clip.crop.left, clip.crop.top, clip.crop.width, clip.crop.height) == (16, 0, 64, 64)
    assert clip.video_CTHW.shape == (3, 4, 64, 64)
    assert clip.video_CTHW.dtype == torch.uint8


def test_command_writes_pictures_and_report_and_the_seed_decides(run, videos, tmp_path, capsys):
    for out, seed in (("first", 3), ("again", 3), ("other", 4)):
        assert visualize(str(run.path), videos, out=str(tmp_path / out), seed=seed, device="cpu") == 0
    assert "pictures of 2 of 2 videos" in capsys.readouterr().out
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    names = [Path(video).stem for video in videos]
    assert sorted(first) == sorted(["report.html", *(f"{name}.{kind}" for name in names for kind in ("png", "gif"))])
    assert first == again
    assert first[f"{names[0]}.png"] != other[f"{names[0]}.png"]

    strip = Image.open(io.BytesIO(first[f"{names[0]}.png"]))
    assert strip.width > 2 * 128
    assert strip.height > 5 * 128
    assert Image.open(io.BytesIO(first[f"{names[0]}.gif"])).n_frames == 4
    page = first["report.html"].decode()
    assert "<h1>tiny · step 30</h1>" in page
    assert page.count("data:image/png") == page.count("data:image/gif") == 2
    assert "Reconstruction loss" in page
    assert "2 clips with known boxes" in " ".join(page.split())


def test_a_videos_mask_does_not_depend_on_the_others(run, videos, tmp_path):
    assert visualize(str(run.path), videos, out=str(tmp_path / "both")) == 0
    assert visualize(str(run.path), videos[1:], out=str(tmp_path / "one")) == 0
    both, one = contents(tmp_path / "both"), contents(tmp_path / "one")
    name = Path(videos[1]).stem
    assert both[f"{name}.png"] == one[f"{name}.png"]
    twin = tmp_path / "another name.mp4"
    twin.write_bytes(Path(videos[1]).read_bytes())
    assert visualize(str(run.path), [str(twin)], out=str(tmp_path / "twin")) == 0
    assert contents(tmp_path / "twin")["another name.png"] != one[f"{name}.png"]


def test_boxes_lie_where_the_clip_moves(videos):
    """The crop of the boxes is the crop of the frames: what changes between frames is inside the boxes."""
    clip = read_center_clip(Entry(videos[0], None), CONFIG)
    boxes = read_boxes(videos[0])[clip.frame_ids] - [clip.crop.left, clip.crop.top] * 2
    inside = np.zeros((4, 64, 64), dtype=bool)
    for t, boxes_O4 in enumerate(boxes):
        for x0, y0, x1, y1 in boxes_O4.clip(0, 64).astype(int):
            inside[t, y0:y1, x0:x1] = True
    change = np.abs(np.diff(clip.video_CTHW.numpy().astype(int), axis=1)).mean(axis=0)
    either = inside[1:] | inside[:-1]
    assert change[either].mean() > 3 * change[~either].mean()


def test_unreadable_videos_are_named_and_counted_and_the_others_done(run, videos, tmp_path, capsys):
    text = tmp_path / "notes.mp4"
    text.write_text("not a video")
    missing = str(tmp_path / "missing.mp4")
    assert visualize(str(run.checkpoint(30)), [missing, videos[0], str(text)], out=str(tmp_path / "out")) == 1
    printed = capsys.readouterr()
    assert f"{missing}: no such file" in printed.err
    assert f"{text}: " in printed.err
    assert "2 of 3 videos could not be read" in printed.err
    assert "pictures of 1 of 3 videos" in printed.out
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert "missing.mp4" in (tmp_path / "out" / "report.html").read_text()


def test_videos_of_one_name_do_not_overwrite_each_other(run, videos, tmp_path):
    twin = tmp_path / "twin" / Path(videos[0]).name
    twin.parent.mkdir()
    twin.write_bytes(Path(videos[1]).read_bytes())
    assert visualize(str(run.path), [videos[0], str(twin)], out=str(tmp_path / "out")) == 0
    assert f"{twin.stem}_2.png" in contents(tmp_path / "out")


def test_report_measures_on_more_videos_than_it_pictures(videos, tmp_path):
    model = build_model().train()
    entries = [Entry(path, None) for path in videos]
    report = write_report(RunFolder(tmp_path / "run"), model, CONFIG, entries[:1], boxed_videos=entries)
    assert model.training
    assert report.path == tmp_path / "run" / "report.html"
    assert report.unreadable == []
    assert report.adaptivity["num_clips"] == 2
    # CONFIG.seed is what build_model uses: this model is the untrained one.
    assert report.adaptivity["adaptive"] == report.adaptivity["untrained"]
    page = report.path.read_text()
    assert page.count("data:image/png") == 1
    assert [path.name for path in report.path.parent.iterdir()] == ["report.html"]


def test_report_of_a_random_mask_has_neither_probability_nor_adaptivity(videos, tmp_path):
    config = replace(CONFIG, mask=MaskConfig(strategy="random", ratio=0.75))
    report = write_report(RunFolder(tmp_path), build_model(config), config, [Entry(videos[0], None)], pictures=tmp_path)
    assert report.adaptivity is None
    with Image.open(tmp_path / f"{Path(videos[0]).stem}.png") as strip:
        assert 4 * 128 < strip.height < 5 * 128
    assert "<h2>Adaptivity</h2>" not in report.path.read_text()


def test_device_that_is_not_there_is_a_users_error(run, videos, tmp_path):
    with pytest.raises(ValueError, match="device='cuda:99': this machine has"):
        visualize(str(run.path), videos, out=str(tmp_path / "out"), device="cuda:99")


def test_real_videos_of_every_container_can_be_pictured(shared_clips, tmp_path):
    model = build_model()
    paths = [str(shared_clips / "good" / name) for name in ("goat.mp4", "flipping_a_pancake.mkv", "testsrc2_vp9.webm")]
    report = write_report(RunFolder(tmp_path), model, CONFIG, [Entry(path, None) for path in paths], pictures=tmp_path)
    assert report.unreadable == []
    assert report.adaptivity is None
    for path in paths:
        clip = read_center_clip(Entry(path, None), CONFIG)
        total, box = clip.num_video_frames, clip.crop
        assert clip.frame_ids.tolist() == frame_ids(total, 4, 2, None).tolist()
        assert box.width == box.height
    assert len(list(tmp_path.glob("*.gif"))) == 3


def test_prepared_videos_and_images_can_be_pictured(videos, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(videos))
    assert prepare(str(tmp_path / "list.txt"), str(tmp_path / "prepared"), short_side=32, num_workers=1) == 0
    entries = read_manifest(str(tmp_path / "prepared"))
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.new("RGB", (48, 40), (20 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    entries.append(Entry(str(tmp_path / "images"), None, num_frames=9, kind="frames"))
    report = write_report(RunFolder(tmp_path), build_model(), CONFIG, entries, pictures=tmp_path / "out")
    assert report.unreadable == []
    assert len(contents(tmp_path / "out")) == 2 * len(entries)
