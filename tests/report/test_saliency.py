import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from adamae_fast import AdaMAE, VideoClassifier
from adamae_fast.cli import main
from adamae_fast.config import DataConfig, MaskConfig, ModelConfig, PretrainConfig, save_config
from adamae_fast.data.clips import frame_ids
from adamae_fast.data.decode import open_video
from adamae_fast.data.encode import ENCODERS, write_frames
from adamae_fast.report.overlay import Overlay, pick_limit
from adamae_fast.report.saliency import Tiling, measure_saliency, saliency, window_starts

CONFIG = PretrainConfig(
    model=ModelConfig(size="nano", num_frames=4, frame_size=32, patch_size=8),
    mask=MaskConfig(ratio=0.75),
    data=DataConfig(stride=3),
)
RATE = Fraction(30000, 1001)


def film(path, num_frames, height, width):
    """Coloured noise in blocks, another one in each frame."""
    rng = np.random.default_rng(num_frames * height + width)
    blocks = rng.integers(0, 256, (num_frames, height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    frames = blocks.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]
    write_frames(path, frames, RATE, *ENCODERS["h264"])
    return str(path)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """By name: as long and as square as a clip; longer and wider; taller; shorter than a clip."""
    folder = tmp_path_factory.mktemp("films")
    sizes = {"clip": (12, 48, 48), "wide": (40, 48, 90), "tall": (25, 78, 32), "short": (7, 48, 48)}
    return {name: film(folder / f"{name}.mp4", *size) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def model():
    """Logits far from uniform, so that a wrong place in the map shows."""
    torch.manual_seed(0)
    model = AdaMAE(CONFIG.model, CONFIG.mask, CONFIG.loss)
    with torch.no_grad():
        model.sampler.positions.normal_()
        model.sampler.head.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save(model, CONFIG, tmp_path_factory.mktemp("checkpoint"))


def save(model, config, folder):
    save_file(model.state_dict(), folder / "model.safetensors")
    save_config(config, folder / "config.yaml")
    return str(folder)


def measure(model, path):
    video = open_video(path)
    tiling = Tiling(grid=model.grid, stride=3, num_frames=video.num_frames, height=video.height, width=video.width)
    return measure_saliency(model, video, tiling)


def by_hand(model, video_CTHW):
    """N * softmax(sampler's logits) of one clip, tubelets × rows × columns."""
    model.eval()
    with torch.no_grad():
        logits_1N = model.sampler(model.tokenizer(video_CTHW[None]))
    exp_N = logits_1N[0].double().exp().numpy()
    p_N = exp_N / exp_N.sum()
    return (p_N * p_N.size).reshape(2, 4, 4), -(p_N * np.log(p_N)).sum()


def all_frames(path, height, width):
    """The whole video, resized as clips are: (3, frames, height, width)."""
    video = open_video(path)
    frames_FCHW = torch.from_numpy(video.read(range(video.num_frames)).copy()).permute(0, 3, 1, 2)
    return F.interpolate(frames_FCHW, (height, width), mode="bilinear", antialias=True).transpose(0, 1)


def test_the_map_of_one_window_is_the_samplers_softmax(model, videos):
    found = measure(model, videos["clip"])
    truth, entropy = by_hand(model, all_frames(videos["clip"], 32, 32)[:, [0, 3, 6, 9]])
    assert found.window_starts_W3.tolist() == [[0, 0, 0]]
    np.testing.assert_allclose(found.maps_LRC, truth, rtol=1e-5)
    np.testing.assert_allclose(found.entropy_W, [entropy], rtol=1e-6)
    assert found.maps_LRC.max() / found.maps_LRC.min() > 5


@pytest.mark.parametrize(
    ("name", "size", "starts"),
    [
        # 40 frames are 6 2/3 tubelets of 6 frames; the long side has 4 · 90 / 48 = 7.5 tokens.
        ("wide", (7, 4, 8), ([0, 1, 2, 3, 4, 5], [0], [0, 2, 4])),
        ("tall", (5, 10, 4), ([0, 1, 2, 3], [0, 2, 4, 6], [0])),
    ],
)
def test_maps_of_overlapping_windows_are_averaged(model, videos, name, size, starts):
    found = measure(model, videos[name])
    pixels = all_frames(videos[name], size[1] * 8, size[2] * 8)
    windows, entropies, places = [], [], []
    for t in starts[0]:
        ids = [min(3 * k, pixels.shape[1] - 1) for k in range(2 * t, 2 * t + 4)]
        for y in starts[1]:
            for x in starts[2]:
                window = np.full(size, np.nan)
                clip = pixels[:, ids, y * 8 : y * 8 + 32, x * 8 : x * 8 + 32]
                window[t : t + 2, y : y + 4, x : x + 4], entropy = by_hand(model, clip)
                windows.append(window)
                entropies.append(entropy)
                places.append([t, y, x])
    assert found.window_starts_W3.tolist() == places
    np.testing.assert_allclose(found.maps_LRC, np.nanmean(windows, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.entropy_W, entropies, rtol=1e-6)


def test_a_video_shorter_than_a_clip_ends_with_its_last_frame(model, videos):
    ids = frame_ids(7, 4, 3, None)
    assert ids.tolist() == [0, 3, 6, 6]
    truth, _ = by_hand(model, all_frames(videos["short"], 32, 32)[:, ids])
    np.testing.assert_allclose(measure(model, videos["short"]).maps_LRC, truth, rtol=1e-5)
    assert Tiling(grid=model.grid, stride=3, num_frames=6, height=48, width=48).shape == (1, 4, 4)


def test_no_more_frames_are_decoded_than_the_next_window_needs(model):
    decoded = 0

    class Endless:
        def in_order(self, short_side):
            nonlocal decoded
            while True:
                decoded += 1
                yield np.zeros((48, 90, 3), dtype=np.uint8)

    tiling = Tiling(grid=model.grid, stride=3, num_frames=10**6, height=48, width=90)
    windows = tiling.clips(Endless())
    for first in range(5):
        start, frames = next(windows)
        assert (start, tuple(frames.shape)) == (first, (3, 4, 32, 64))
        assert decoded == 3 * (2 * first + 3) + 1  # up to the last of its four frames


def test_a_sampler_that_diverged_is_an_error(videos):
    model = AdaMAE(CONFIG.model, CONFIG.mask)
    torch.nn.init.constant_(model.sampler.head.bias, float("nan"))
    with pytest.raises(ValueError, match=r"clip\.mp4: the sampler's logits are not finite"):
        measure(model, videos["clip"])


@pytest.mark.parametrize("window", [1, 2, 7, 8])
def test_windows_cover_everything_and_stay_inside(window):
    for length in range(window, 40):
        starts = window_starts(length, window)
        assert sorted(set(starts)) == starts
        assert starts[-1] + window == length
        assert {place for start in starts for place in range(start, start + window)} == set(range(length))
    assert window_starts(1, 8) == [0]


def test_the_film_has_the_videos_frames_rate_and_size(checkpoint, videos, tmp_path, capsys):
    assert main(["saliency", checkpoint, videos["wide"], videos["tall"], "--out", str(tmp_path)]) == 0
    assert "saliency of 2 of 2 videos" in capsys.readouterr().out
    for name in ("wide", "tall"):
        with av.open(videos[name]) as source, av.open(str(tmp_path / f"{name}_saliency.mp4")) as written:
            before, after = source.streams.video[0], written.streams.video[0]
            assert after.codec_context.name == "h264"
            assert after.codec_context.pix_fmt == "yuv420p"
            assert after.average_rate == before.average_rate == RATE
            assert (after.height, after.width) == (before.height, before.width)
            assert sum(1 for _ in written.decode(after)) == sum(1 for _ in source.decode(before))
    facts = json.loads((tmp_path / "wide_saliency.json").read_text())
    arrays = np.load(tmp_path / "wide_saliency.npz")
    assert facts["map_shape"] == list(arrays["maps"].shape) == [7, 4, 8]
    assert (facts["frames"], facts["tubelet_frames"], int(arrays["tubelet_frames"])) == (40, 6, 6)
    assert len(facts["windows"]) == len(arrays["entropy"]) == 18
    np.testing.assert_allclose([each["entropy_nats"] for each in facts["windows"]], arrays["entropy"], atol=1e-6)
    share = [each["entropy_of_uniform"] for each in facts["windows"]]
    np.testing.assert_allclose(share, arrays["entropy"] / np.log(32), atol=1e-6)


def test_side_by_side_has_the_video_at_its_left(checkpoint, videos, tmp_path):
    assert main(["saliency", checkpoint, videos["clip"], f"--out={tmp_path}", "--side-by-side", "--device=cpu"]) == 0
    with av.open(str(tmp_path / "clip_saliency.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    truth = open_video(videos["clip"]).read(range(12)).astype(int)
    assert frames.shape == (12, 48, 96, 3)
    off = np.abs(frames[:, :, :48].astype(int) - truth).mean()
    assert off < 12 < np.abs(frames[:, :, 48:].astype(int) - truth).mean()


def test_the_same_command_writes_the_same_bytes(checkpoint, videos, tmp_path):
    for out in ("first", "again"):
        assert saliency(checkpoint, [videos["wide"]], out=str(tmp_path / out), device="cpu") == 0
    first, again = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("first", "again"))
    assert sorted(first) == [f"wide_saliency.{kind}" for kind in ("json", "mp4", "npz")]
    assert first == again


def test_what_cannot_be_read_is_named_and_the_others_are_done(checkpoint, videos, tmp_path, capsys):
    text, out = tmp_path / "notes.mp4", tmp_path / "out"
    text.write_text("not a video")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(Path(videos["wide"]).read_bytes()[:6000])
    paths = [str(tmp_path / "missing.mp4"), str(text), videos["clip"], str(cut)]
    assert saliency(checkpoint, paths, out=str(out), device="cpu") == 1
    printed = capsys.readouterr()
    assert all(path in printed.err for path in (paths[0], paths[1], paths[3]))
    assert "saliency of 1 of 4 videos" in printed.out
    assert sorted(path.name for path in out.iterdir()) == [f"clip_saliency.{kind}" for kind in ("json", "mp4", "npz")]


def test_a_checkpoint_without_a_sampler_is_refused(videos, tmp_path):
    (tmp_path / "random").mkdir()
    (tmp_path / "classifier").mkdir()
    config = replace(CONFIG, mask=MaskConfig(strategy="random", ratio=0.75))
    plain = save(AdaMAE(config.model, config.mask), config, tmp_path / "random")
    with pytest.raises(ValueError, match=r"mask\.strategy=random, without a sampler; give a run of mask\.strategy=ada"):
        saliency(plain, [videos["clip"]], out=str(tmp_path / "out"))
    classifier = save(VideoClassifier(CONFIG.model, num_classes=3), CONFIG, tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds a classifier, which has no sampler"):
        saliency(classifier, [videos["clip"]], out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1.0, -2.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(checkpoint, videos, tmp_path, scale):
    with pytest.raises(ValueError, match=r"scale=.*: choose a number above 1"):
        saliency(checkpoint, [videos["clip"]], out=str(tmp_path), scale=scale)


def test_no_video_is_overwritten(checkpoint, videos, tmp_path):
    both = [tmp_path / "a.mp4", tmp_path / "a_saliency.mp4"]
    for path in both:
        path.write_bytes(Path(videos["clip"]).read_bytes())
    with pytest.raises(ValueError, match=r"a_saliency\.mp4 there is one of the videos; choose another folder"):
        saliency(checkpoint, [str(path) for path in both], out=str(tmp_path))
    assert both[1].read_bytes() == Path(videos["clip"]).read_bytes()


def test_odd_sides_lose_a_pixel(checkpoint, shared_clips, tmp_path):
    video = str(shared_clips / "bad" / "odd_size_444_10bit.mp4")
    assert saliency(checkpoint, [video], out=str(tmp_path), device="cpu") == 0
    with av.open(str(tmp_path / "odd_size_444_10bit_saliency.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.frames) == (240, 320, 25)


def test_places_in_the_colours_follow_the_logarithm_and_are_linear_in_time():
    maps = np.ones((3, 4, 6), dtype=np.float32)
    maps[1], maps[2] = 4, 1 / 2
    overlay = Overlay(maps, 6, 40, 60, 4)
    for number, place in ((0, 0.5), (2, 0.5), (3, 0.5 + 0.5 / 12), (8, 0.5 + 5.5 / 12), (9, 1 - 0.75 / 12), (17, 0.25)):
        np.testing.assert_allclose(overlay.places(number), place, atol=1e-6)


def test_what_is_looked_at_glows_where_it_is():
    maps = np.full((1, 4, 6), 1 / 3, dtype=np.float32)
    maps[0, 1, 4] = 3
    overlay = Overlay(maps, 6, 160, 240, 3)
    frame = np.full((160, 240, 3), 90, dtype=np.uint8)
    drawn = overlay.draw(0, frame).astype(int)
    assert np.unravel_index(overlay.places(0).argmax(), (160, 240)) == pytest.approx((60, 180), abs=2)
    red, green, blue = drawn[60, 180]
    assert min(red, green) > 200 > blue
    assert (drawn[20, 60] < 30).all()
    assert (frame == 90).all()


def test_the_scale_is_chosen_from_the_map():
    values = np.ones(1000)
    values[:20] = 2.9
    assert pick_limit(values) == 3
    values[20:40] = 1 / 50
    assert pick_limit(values) == 3
    values[:20] = [1] * 17 + [50] * 3
    assert pick_limit(values) == 1.25
