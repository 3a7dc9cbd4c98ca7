"""From a model's output on one clip to pictures: input, prediction, error, probability map and mask.

Rows as in figures 3, 5 and 7-20 of the AdaMAE paper. Everything here works on plain tensors of one clip.

Shape suffixes: C channels, T frames, H, W pixels, N tokens, K visible, M masked, P pixels a token (ordered t, h, w and
then channel, as the prediction is).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from adamae_fast.config import TargetKind
from adamae_fast.grid import NUM_CHANNELS, TokenGrid

GROUND = (24, 26, 31)
BRIGHT = (236, 238, 242)
DIM = (156, 163, 175)
MASKED_GREY = 104
MIN_CELL = 112
"""Pixels that a frame is enlarged to at least."""

MAX_COLUMNS = 8
GIF_CELL = 223
"""Frames of an animation stay below 224 pixels, which are halved: five panels fit a screen and a small file."""

GIF_MILLISECONDS = 125


@dataclass(frozen=True)
class ColourScale:
    """What the colours of a heat map mean: a matplotlib colour map and the values at its two ends."""

    colour_map: str
    low: str
    high: str
    note: str


@dataclass(frozen=True)
class Panel:
    """One row of a strip, one column of an animation: uint8 frames (T, H, W, 3) and their name."""

    name: str
    frames_THWC: np.ndarray
    scale: ColourScale | None = None


def split_frames(video_CTHW: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Cut a clip into tokens (N, P), ordered t, h, w, channel inside a token; dtype and values are kept."""
    t, h, w = grid.shape
    tubelet, patch = grid.tubelet_size, grid.patch_size
    blocks = video_CTHW.reshape(NUM_CHANNELS, t, tubelet, h, patch, w, patch)
    return blocks.permute(1, 3, 5, 2, 4, 6, 0).reshape(grid.num_tokens, grid.pixels_per_token)


def join_tokens(tokens_NP: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Inverse of :func:`split_frames`, with the channel last: frames (T, H, W, 3)."""
    t, h, w = grid.shape
    tubelet, patch = grid.tubelet_size, grid.patch_size
    blocks = tokens_NP.reshape(t, h, w, tubelet, patch, patch, NUM_CHANNELS)
    return blocks.permute(0, 3, 1, 4, 2, 5, 6).reshape(grid.num_frames, grid.frame_size, grid.frame_size, NUM_CHANNELS)


def predicted_pixels(prediction_MP: torch.Tensor, true_MP: torch.Tensor, target: TargetKind) -> torch.Tensor:
    """Turn a prediction of targets back into pixels in [0, 1], clipped.

    normalized: prediction * (sqrt(unbiased var) + 1e-6) + mean, per token and colour channel;
    mae_st: prediction * sqrt(unbiased var + 1e-6) + mean, per token over all channels; raw: the prediction itself.

    Mean and variance come from the **true** token ``true_MP`` (pixels in [0, 1]), as in the papers' pictures: the model
    predicts structure relative to them and says nothing about a token's own brightness and contrast. A picture of a
    model with a normalised target therefore shows colours that the model did not have to find.
    """
    prediction_MP = prediction_MP.float()
    if target == "normalized":
        true = true_MP.unflatten(-1, (-1, NUM_CHANNELS))
        std = true.var(dim=-2, keepdim=True).sqrt() + 1e-6
        pixels = (prediction_MP.unflatten(-1, (-1, NUM_CHANNELS)) * std + true.mean(dim=-2, keepdim=True)).flatten(-2)
    elif target == "mae_st":
        std = (true_MP.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        pixels = prediction_MP * std + true_MP.mean(dim=-1, keepdim=True)
    else:
        pixels = prediction_MP
    return pixels.clamp(0, 1)


def clip_panels(
    video_CTHW: torch.Tensor,
    *,
    prediction_MP: torch.Tensor,
    error_M: torch.Tensor,
    visible_ids_K: torch.Tensor,
    masked_ids_M: torch.Tensor,
    logits_N: torch.Tensor | None,
    grid: TokenGrid,
    target: TargetKind,
) -> list[Panel]:
    """The panels of one clip: Input, Prediction, Error, Probability (only with logits), Mask.

    Prediction and Mask show the true pixels of visible tokens. Error is the loss of each masked token, 0 on visible
    ones, on a linear scale from 0 to the clip's largest. Probability is N * softmax(logits), so 1 is uniform, on a
    logarithmic scale from the clip's smallest to its largest.

    Raises ValueError if the video is not uint8 of the grid's shape.
    """
    if video_CTHW.dtype != torch.uint8 or tuple(video_CTHW.shape) != grid.video_shape:
        raise ValueError(
            f"video_CTHW={tuple(video_CTHW.shape)} {video_CTHW.dtype}: pass uint8 frames of shape {grid.video_shape}"
        )
    tokens_NP = split_frames(video_CTHW.detach().cpu(), grid)
    visible, masked = visible_ids_K.cpu(), masked_ids_M.cpu()
    true_MP = tokens_NP[masked].float() / 255
    predicted_NP = tokens_NP.clone()
    predicted_MP = predicted_pixels(prediction_MP.detach().cpu(), true_MP, target)
    predicted_NP[masked] = (predicted_MP * 255).round().to(torch.uint8)
    kept_NP = torch.full_like(tokens_NP, MASKED_GREY)
    kept_NP[visible] = tokens_NP[visible]
    error_N = torch.zeros(grid.num_tokens)
    error_N[masked] = error_M.detach().cpu().float()

    panels = [
        Panel("Input", join_tokens(tokens_NP, grid).numpy()),
        Panel("Prediction", join_tokens(predicted_NP, grid).numpy()),
        _heat_panel("Error", error_N, 0.0, float(error_N.max()), "magma", "0 where visible", "", grid),
    ]
    if logits_N is not None:
        relative_N = torch.softmax(logits_N.detach().cpu().double(), dim=0) * grid.num_tokens
        log_N = relative_N.clamp_min(torch.finfo(torch.float32).tiny).log10()
        low, high = float(log_N.min()), float(log_N.max())
        panels.append(_heat_panel("Probability", log_N, low, high, "viridis", "of uniform, log", "x", grid))
    panels.append(Panel("Mask", join_tokens(kept_NP, grid).numpy()))
    return panels


def _heat_panel(
    name: str, values_N: torch.Tensor, low: float, high: float, colour_map: str, note: str, unit: str, grid: TokenGrid
) -> Panel:
    """Colour each token by its place between low and high; ``unit`` x marks log10 values, labelled by their power."""
    span = high - low
    places = (values_N.double().numpy() - low) / span if span > 0 else np.zeros(grid.num_tokens)
    colours = _colours(places, colour_map).reshape(*grid.shape, NUM_CHANNELS)
    for axis, times in enumerate((grid.tubelet_size, grid.patch_size, grid.patch_size)):
        colours = colours.repeat(times, axis=axis)
    ends = (10**low, 10**high) if unit else (low, high)
    labels = [f"{end:.2g}{unit}" for end in ends]
    return Panel(name, colours, ColourScale(colour_map, labels[0], labels[1], note))


def _colours(places: np.ndarray, colour_map: str) -> np.ndarray:
    """Uint8 RGB for places in [0, 1]; the darkest few per cent are skipped to stand out from the ground."""
    import matplotlib

    return np.asarray(matplotlib.colormaps[colour_map](0.04 + 0.94 * places, bytes=True))[..., :NUM_CHANNELS]


def strip_columns(grid: TokenGrid) -> list[int]:
    """The clip's frames that a strip shows: the first of each tubelet, at most 8 tubelets evenly spaced."""
    num_tubelets = grid.shape[0]
    tubelets = np.linspace(0, num_tubelets - 1, min(num_tubelets, MAX_COLUMNS)).round().astype(int)
    return [int(tubelet) * grid.tubelet_size for tubelet in tubelets]


def fit_cell(frame_size: int, max_cell: int | None = None) -> tuple[int, int]:
    """Whole factors (enlarge, shrink) that bring a frame to at least 112 pixels and, if it can, at most ``max_cell``.

    Whole factors keep the tokens' edges sharp: small frames are repeated, large ones averaged.
    """
    enlarge = -(-MIN_CELL // frame_size)
    shrink = 1
    if max_cell is not None and frame_size > max_cell:
        shrink = min(-(-frame_size // max_cell), max(1, frame_size // MIN_CELL))
    return enlarge, shrink


def _cell(frame_HWC: np.ndarray, max_cell: int | None) -> Image.Image:
    """One frame at the size it is drawn."""
    enlarge, shrink = fit_cell(frame_HWC.shape[0], max_cell)
    image = Image.fromarray(frame_HWC)
    if enlarge > 1:
        return image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
    return image.reduce(shrink) if shrink > 1 else image


def draw_strip(
    panels: Sequence[Panel],
    columns: Sequence[int],
    *,
    frame_ids: Sequence[int] | None = None,
    max_cell: int | None = None,
) -> Image.Image:
    """One row for each panel, one column for each frame of the clip in ``columns``, with labels.

    ``frame_ids`` are the clip's frames in the video, for the heading; ``max_cell`` bounds a cell's side in pixels.
    """
    side = _cell(panels[0].frames_THWC[0], max_cell).width
    unit = max(1.0, side / 160)
    pad, gap, row_gap, label, head = (round(x * unit) for x in (22, 6, 12, 138, 30))
    name_font, small_font = ImageFont.load_default(round(18 * unit)), ImageFont.load_default(round(13 * unit))
    width = 2 * pad + label + len(columns) * (side + gap) - gap
    height = 2 * pad + head + len(panels) * (side + row_gap) - row_gap
    strip = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(strip)
    for column, frame in enumerate(columns):
        x = pad + label + column * (side + gap)
        text = f"frame {frame if frame_ids is None else frame_ids[frame]}"
        draw.text((x + side // 2, pad + head // 3), text, DIM, small_font, anchor="mm")
        for row, panel in enumerate(panels):
            strip.paste(_cell(panel.frames_THWC[frame], max_cell), (x, pad + head + row * (side + row_gap)))
    for row, panel in enumerate(panels):
        middle = pad + head + row * (side + row_gap) + side // 2
        if panel.scale is None:
            draw.text((pad, middle), panel.name, BRIGHT, name_font, anchor="lm")
            continue
        draw.text((pad, middle - round(26 * unit)), panel.name, BRIGHT, name_font, anchor="lm")
        bar = (label - round(26 * unit), round(9 * unit))
        ramp = _colours(np.linspace(0, 1, bar[0]), panel.scale.colour_map)
        strip.paste(Image.fromarray(ramp[None].repeat(bar[1], axis=0)), (pad, middle - round(8 * unit)))
        low_y, note_y = middle + round(13 * unit), middle + round(31 * unit)
        draw.text((pad, low_y), panel.scale.low, DIM, small_font, anchor="lm")
        draw.text((pad + bar[0], low_y), panel.scale.high, DIM, small_font, anchor="rm")
        draw.text((pad, note_y), panel.scale.note, DIM, small_font, anchor="lm")
    return strip


def draw_animation(panels: Sequence[Panel], *, max_cell: int | None = GIF_CELL) -> list[Image.Image]:
    """The panels side by side with their names, one picture for each frame of the clip."""
    side = _cell(panels[0].frames_THWC[0], max_cell).width
    pad, gap, head = 14, 8, 28
    font = ImageFont.load_default(16)
    ground = Image.new("RGB", (2 * pad + len(panels) * (side + gap) - gap, 2 * pad + head + side), GROUND)
    lefts = [pad + column * (side + gap) for column in range(len(panels))]
    draw = ImageDraw.Draw(ground)
    for x, panel in zip(lefts, panels, strict=True):
        draw.text((x + side // 2, pad + head // 3), panel.name, BRIGHT, font, anchor="mm")
    pictures = []
    for frame in range(len(panels[0].frames_THWC)):
        picture = ground.copy()
        for x, panel in zip(lefts, panels, strict=True):
            picture.paste(_cell(panel.frames_THWC[frame], max_cell), (x, pad + head))
        pictures.append(picture)
    return pictures


def encode_png(picture: Image.Image) -> bytes:
    """PNG file of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encode_gif(panels: Sequence[Panel], *, max_cell: int | None = GIF_CELL) -> bytes:
    """GIF file of :func:`draw_animation`: 1/8 s a frame, looping forever.

    All frames share one palette of 256 colours, so that nothing that stands still flickers: text, grey and colour maps
    have their own entries, the rest goes to the true and predicted pixels.
    """
    ramp = np.linspace(0, 1, 24)
    maps = [_colours(ramp, panel.scale.colour_map) for panel in panels if panel.scale is not None]
    text = np.linspace(GROUND, BRIGHT, 8).round().astype(np.uint8)
    fixed = np.concatenate([text, np.full((1, NUM_CHANNELS), MASKED_GREY, np.uint8), *maps])
    photos = np.concatenate([panel.frames_THWC for panel in panels if panel.scale is None])
    num_free = 256 - len(fixed)
    free = Image.fromarray(photos.reshape(-1, photos.shape[2], NUM_CHANNELS)).quantize(num_free).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*fixed.flatten().tolist(), *free[: NUM_CHANNELS * num_free]])
    pictures = draw_animation(panels, max_cell=max_cell)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=GIF_MILLISECONDS, loop=0, optimize=False
    )
    return buffer.getvalue()
