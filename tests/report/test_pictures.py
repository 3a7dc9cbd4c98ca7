import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from adamae_fast.grid import TokenGrid
from adamae_fast.ops.masked_patch_loss import patch_targets
from adamae_fast.report import pictures

GRID = TokenGrid(num_frames=6, frame_size=32, tubelet_size=2, patch_size=8)


@pytest.fixture
def clip():
    """A noisy uint8 clip (3, T, H, W) with one flat token, which has no variance to normalise by."""
    video = torch.randint(0, 256, GRID.video_shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video[:, :2, :8, :8] = 77
    return video


def split(num_visible, seed=0):
    order = torch.randperm(GRID.num_tokens, generator=torch.Generator().manual_seed(seed))
    return order[:num_visible].sort().values, order[num_visible:].sort().values


def panels_of(clip, target="normalized", logits=True, num_visible=10, prediction=None):
    visible, masked = split(num_visible)
    if prediction is None:
        prediction = patch_targets(
            clip[None], masked[None], tubelet_size=GRID.tubelet_size, patch_size=GRID.patch_size, target=target
        )[0]
    return pictures.clip_panels(
        clip,
        prediction_MP=prediction,
        error_M=torch.linspace(0.5, 2.0, len(masked)),
        visible_ids_K=visible,
        masked_ids_M=masked,
        logits_N=torch.linspace(-3, 3, GRID.num_tokens) if logits else None,
        grid=GRID,
        target=target,
    )


def token_pixels(frames_THWC, token):
    """The pixels of one token, found by plain index arithmetic."""
    _, rows, columns = GRID.shape
    t, place = divmod(token, rows * columns)
    y, x = divmod(place, columns)
    patch, tubelet = GRID.patch_size, GRID.tubelet_size
    return frames_THWC[t * tubelet :, y * patch :, x * patch :][:tubelet, :patch, :patch]


@pytest.mark.parametrize("target", ["normalized", "raw", "mae_st"])
def test_perfect_prediction_gives_back_the_input(clip, target):
    shown = {panel.name: panel.frames_THWC for panel in panels_of(clip, target)}
    np.testing.assert_array_equal(shown["Input"], clip.permute(1, 2, 3, 0).numpy())
    difference = np.abs(shown["Prediction"].astype(int) - shown["Input"].astype(int))
    assert difference.max() <= 1


def test_prediction_of_zeros_shows_each_tokens_mean_colour(clip):
    _, masked = split(10)
    panels = panels_of(clip, prediction=torch.zeros(len(masked), GRID.pixels_per_token))
    token = int(masked[3])
    true = token_pixels(panels[0].frames_THWC, token).reshape(-1, 3).mean(axis=0)
    shown = token_pixels(panels[1].frames_THWC, token).reshape(-1, 3)
    assert np.abs(shown - true).max() <= 0.5 + 1e-3


def test_visible_tokens_show_true_pixels_and_no_error(clip):
    visible, masked = split(10)
    shown = {p.name: p.frames_THWC for p in panels_of(clip, prediction=torch.zeros(len(masked), GRID.pixels_per_token))}
    for token in visible.tolist():
        for name in ("Prediction", "Mask"):
            np.testing.assert_array_equal(token_pixels(shown[name], token), token_pixels(shown["Input"], token))
    for token in masked.tolist():
        assert (token_pixels(shown["Mask"], token) == pictures.MASKED_GREY).all()
    brightness = np.array([token_pixels(shown["Error"], token).sum() for token in range(GRID.num_tokens)])
    assert brightness[visible].max() < brightness[masked].min()
    assert (np.diff(brightness[masked]) >= 0).all()  # errors ascend, and so does the map's lightness
    assert len(np.unique(token_pixels(shown["Error"], int(masked[0])).reshape(-1, 3), axis=0)) == 1


def test_probability_panel_is_ordered_and_labelled_in_multiples_of_uniform(clip):
    panels = panels_of(clip)
    assert [panel.name for panel in panels] == ["Input", "Prediction", "Error", "Probability", "Mask"]
    green = [token_pixels(panels[3].frames_THWC, token)[0, 0, 0, 1] for token in range(GRID.num_tokens)]
    assert (np.diff(np.array(green, dtype=int)) >= 0).all()
    assert green[0] < green[-1]
    probability = np.exp(np.linspace(-3, 3, GRID.num_tokens))
    relative = probability / probability.mean()
    scale = panels[3].scale
    assert float(scale.low.removesuffix("x")) == pytest.approx(relative.min(), rel=0.05)
    assert float(scale.high.removesuffix("x")) == pytest.approx(relative.max(), rel=0.05)


def test_uniform_probabilities_and_zero_error_can_be_drawn(clip):
    visible, masked = split(10)
    panels = pictures.clip_panels(
        clip,
        prediction_MP=torch.zeros(len(masked), GRID.pixels_per_token),
        error_M=torch.zeros(len(masked)),
        visible_ids_K=visible,
        masked_ids_M=masked,
        logits_N=torch.zeros(GRID.num_tokens),
        grid=GRID,
        target="raw",
    )
    assert panels[3].scale.low == panels[3].scale.high == "1x"
    assert len(np.unique(panels[3].frames_THWC.reshape(-1, 3), axis=0)) == 1


def test_models_without_a_sampler_have_no_probability_row(clip):
    assert [panel.name for panel in panels_of(clip, logits=False)] == ["Input", "Prediction", "Error", "Mask"]


def test_clip_of_another_shape_is_refused(clip):
    with pytest.raises(ValueError, match=r"uint8 frames of shape \(3, 6, 32, 32\)"):
        panels_of(clip[:, :4], prediction=torch.zeros(38, GRID.pixels_per_token))


@pytest.mark.parametrize(
    ("frame_size", "max_cell", "side"),
    [
        (64, None, 128),
        (64, 160, 128),
        (112, 160, 112),
        (160, 160, 160),
        (224, None, 224),
        (224, 160, 112),
        (32, 160, 128),
    ],
)
def test_cells_are_legible_and_whole_multiples(frame_size, max_cell, side):
    enlarge, shrink = pictures.fit_cell(frame_size, max_cell)
    assert frame_size * enlarge // shrink == side
    assert 1 in (enlarge, shrink)


def test_strip_holds_the_frames_of_its_columns(clip):
    panels = panels_of(clip)
    columns = pictures.strip_columns(GRID)
    assert columns == [0, 2, 4]
    strip = pictures.draw_strip(panels, columns, frame_ids=[5, 9, 13, 17, 21, 25])
    pixels = np.asarray(strip)
    for panel in panels:
        for frame in columns:
            cell = panel.frames_THWC[frame].repeat(4, axis=0).repeat(4, axis=1)
            assert contains(pixels, cell), (panel.name, frame)


def contains(picture, cell):
    """Whether ``cell`` is somewhere in the picture, pixel for pixel."""
    height, width = cell.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view((picture == cell[0, 0]).all(axis=-1), (height, width))
    corners = np.argwhere(windows[:, :, 0, 0])
    return any(np.array_equal(picture[y : y + height, x : x + width], cell) for y, x in corners)


def test_strip_of_a_long_clip_has_eight_columns_from_first_to_last_tubelet():
    long = TokenGrid(num_frames=64, frame_size=32, tubelet_size=2, patch_size=8)
    columns = pictures.strip_columns(long)
    assert (len(columns), columns[0], columns[-1]) == (8, 0, 62)
    assert all(column % 2 == 0 for column in columns)


@pytest.mark.parametrize("logits", [True, False])
def test_gif_has_every_frame_loops_forever_and_keeps_colours(clip, logits):
    panels = panels_of(clip, logits=logits)
    content = pictures.encode_gif(panels)
    gif = Image.open(io.BytesIO(content))
    drawn = pictures.draw_animation(panels)
    assert gif.n_frames == len(drawn) == GRID.num_frames
    assert gif.info["loop"] == 0
    assert gif.info["duration"] == 120  # GIF counts in hundredths of a second
    assert gif.size == drawn[0].size
    for frame, picture in zip(ImageSequence.Iterator(gif), drawn, strict=True):
        shown, wanted = np.asarray(frame.convert("RGB")).astype(int), np.asarray(picture).astype(int)
        grey = (wanted == pictures.MASKED_GREY).all(axis=-1)
        assert grey.any()
        assert (shown[grey] == pictures.MASKED_GREY).all()
        assert np.abs(shown - wanted).mean() < 16  # even of noise, which has more colours than a palette


def test_gif_of_a_smooth_small_clip_is_small(tmp_path):
    grid = TokenGrid(num_frames=16, frame_size=64, tubelet_size=2, patch_size=16)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    frames = [torch.stack([(2 * x + 3 * t) % 256, 2 * y + t, x + y]) for t in range(16)]
    video = torch.stack(frames, dim=1).to(torch.uint8)
    visible, masked = torch.arange(0, 128, 10), torch.tensor([i for i in range(128) if i % 10])
    panels = pictures.clip_panels(
        video,
        prediction_MP=torch.zeros(len(masked), grid.pixels_per_token),
        error_M=torch.rand(len(masked), generator=torch.Generator().manual_seed(0)),
        visible_ids_K=visible,
        masked_ids_M=masked,
        logits_N=torch.arange(128.0) / 64,
        grid=grid,
        target="normalized",
    )
    assert len(pictures.encode_gif(panels)) < 1_500_000
