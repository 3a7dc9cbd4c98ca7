"""Does the mask look at what moves? One number, from videos whose moving objects have known boxes.

    adaptivity = (share of visible tokens that lies on moving boxes) / (share of all tokens that lies on moving boxes)

1 means that the mask ignores what moves, as uniformly random masks do in expectation; 2 means that visible tokens lie
on moving objects twice as often as tokens in general. A token that a box covers partly counts by its covered share.

Shape suffixes: B clips, T frames, O objects, N tokens, K visible.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from adamae_fast.data.clips import CropBox
from adamae_fast.grid import TokenGrid
from adamae_fast.masking import STRATEGIES, MaskStrategy
from adamae_fast.model.adamae import AdaMAE


class Figure(TypedDict):
    """A ratio and its standard error over clips (None for a single clip, which says nothing about others)."""

    value: float
    standard_error: float | None


class AdaptivityResult(TypedDict):
    """What :func:`measure_adaptivity` found, ready for JSON."""

    adaptive: Figure
    """Masks of the trained sampler."""
    untrained: Figure
    """Masks of the same sampler before its first step: what training adds is the difference."""
    random: Figure
    """Masks that look at nothing."""
    box_share: float
    """Share of all tokens that lies on moving boxes."""
    num_clips: int
    repeats: int


def box_coverage(
    boxes_TO4: NDArray[np.floating], frame_ids: NDArray[np.integer], crop: CropBox, grid: TokenGrid
) -> NDArray[np.float64]:
    """Share of each token's area that the union of the boxes covers, averaged over the frames of its tubelet.

    Args:
        boxes_TO4: (x0, y0, x1, y1) for each frame of the video and object, in pixels of the video, exclusive ends.
            A box without area covers nothing.
        frame_ids: the video's frames that make the clip, ``grid.num_frames`` of them.
        crop: the part of the video's frames that is resized to the clip's square.
        grid: how the clip is cut into tokens.

    Returns:
        coverage_N in [0, 1], float64, exact (areas of rectangles, no raster).

    Raises ValueError for another number of frames, or a frame without boxes.
    """
    if len(frame_ids) != grid.num_frames:
        raise ValueError(f"frame_ids has {len(frame_ids)} frames; pass the {grid.num_frames} of the clip")
    if min(frame_ids) < 0 or max(frame_ids) >= len(boxes_TO4):
        raise ValueError(
            f"frame_ids reach from {min(frame_ids)} to {max(frame_ids)}, but boxes_TO4 has {len(boxes_TO4)} frames;"
            " pass boxes for each frame of the video"
        )
    num_tubelets, rows, columns = grid.shape
    # One unit is one token.
    to_tokens = np.array([columns / crop.width, rows / crop.height] * 2)
    boxes_TO4 = (np.asarray(boxes_TO4, dtype=np.float64)[frame_ids] - [crop.left, crop.top] * 2) * to_tokens
    boxes_TO4 = boxes_TO4.clip(0, [columns, rows] * 2)
    shares = np.stack([_union_in_cells(boxes_O4, rows, columns) for boxes_O4 in boxes_TO4])
    return shares.reshape(num_tubelets, grid.tubelet_size, rows * columns).mean(axis=1).flatten()


def _union_in_cells(boxes_O4: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """Area of the boxes' union in each unit cell, (rows, columns).

    All edges, of boxes and cells, cut the plane into pieces that are either inside or outside of each box.
    """
    x = np.unique(np.concatenate([boxes_O4[:, 0], boxes_O4[:, 2], np.arange(columns + 1)]))
    y = np.unique(np.concatenate([boxes_O4[:, 1], boxes_O4[:, 3], np.arange(rows + 1)]))
    x_middle, y_middle = (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2
    inside_x = (boxes_O4[:, :1] < x_middle) & (x_middle < boxes_O4[:, 2:3])
    inside_y = (boxes_O4[:, 1:2] < y_middle) & (y_middle < boxes_O4[:, 3:])
    areas = (inside_y[:, :, None] & inside_x[:, None, :]).any(axis=0) * np.diff(y)[:, None] * np.diff(x)
    by_row = np.add.reduceat(areas, np.searchsorted(y, np.arange(rows)), axis=0)
    return np.add.reduceat(by_row, np.searchsorted(x, np.arange(columns)), axis=1)


def adaptivity_figure(coverage_BN: NDArray[np.floating], visible_ids_RBK: NDArray[np.integer]) -> Figure:
    """Mean coverage of the visible tokens over mean coverage of all tokens, pooled over clips and R draws of the mask.

    Its expectation is exactly 1 for uniformly random ids. Clips without boxes have no say. The standard error is that
    of a ratio of means over clips (first-order), with a clip's draws averaged first, because draws of one clip are not
    independent evidence. Raises ValueError if no clip has any box.
    """
    all_B = np.asarray(coverage_BN, dtype=np.float64).mean(axis=1)
    with_boxes = all_B > 0
    if not with_boxes.any():
        raise ValueError(
            f"coverage_BN: none of the {len(all_B)} clips shows a box; pass videos with moving boxes in view"
        )
    visible_RB = np.take_along_axis(coverage_BN[None], visible_ids_RBK, axis=2).mean(axis=2)
    visible_B, all_B = visible_RB.mean(axis=0)[with_boxes], all_B[with_boxes]
    value = visible_B.sum() / all_B.sum()
    count = len(all_B)
    if count == 1:
        return {"value": float(value), "standard_error": None}
    residual_B = visible_B - value * all_B
    error = np.sqrt(count / (count - 1) * (residual_B**2).sum()) / all_B.sum()
    return {"value": float(value), "standard_error": float(error)}


def sampler_logits(model: AdaMAE, videos: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Logits (B, N) of uint8 clips (B, 3, T, H, W), in eval mode, without encoder and decoder; fp32.

    Raises ValueError for a model without a sampler.
    """
    if model.sampler is None:
        raise ValueError(
            f"mask.strategy={model.mask_config.strategy!r}: adaptivity is measured on models with a sampler (adaptive)"
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = [model.sampler(model.tokenizer(batch.to(device))).float() for batch in videos.split(batch_size)]
    finally:
        model.train(was_training)
    return torch.cat(logits)


def drawn_figure(
    strategy: MaskStrategy,
    grid: TokenGrid,
    ratio: float,
    coverage_BN: NDArray[np.floating],
    seeds_RB: torch.Tensor,
    logits_BN: torch.Tensor | None = None,
) -> Figure:
    """:func:`adaptivity_figure` of the masks that ``strategy`` draws with each row of ``seeds_RB``."""
    splits = [strategy(grid, ratio, seeds_B, logits_BN) for seeds_B in seeds_RB]
    return adaptivity_figure(coverage_BN, torch.stack([split.visible_ids_BK for split in splits]).cpu().numpy())


def measure_adaptivity(
    model: AdaMAE,
    untrained: AdaMAE,
    videos: torch.Tensor,
    coverage_BN: NDArray[np.floating],
    *,
    seed: int = 0,
    repeats: int = 8,
    batch_size: int = 8,
) -> AdaptivityResult:
    """Adaptivity of the masks of a model, of the model before training, and of random masks, over the same clips.

    All draw as many visible tokens, from the same seeds.

    Args:
        model: a model with a sampler (mask.strategy=adaptive), on the device to be used.
        untrained: the same configuration with its initial weights, on the same device.
        videos: uint8 (B, 3, T, H, W) clips.
        coverage_BN: :func:`box_coverage` of each clip.
        seed: source of all masks.
        repeats: masks drawn for each clip and strategy.
        batch_size: clips in one forward pass.

    Raises ValueError for a model without a sampler, or where no clip shows a box.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    seeds_RB = torch.randint(2**63 - 1, (repeats, len(videos)), device=device, generator=generator)

    def draw(strategy: MaskStrategy, logits_BN: torch.Tensor | None = None) -> Figure:
        return drawn_figure(strategy, model.grid, model.mask_config.ratio, coverage_BN, seeds_RB, logits_BN)

    share_B = coverage_BN.mean(axis=1)
    return {
        "adaptive": draw(model.strategy, sampler_logits(model, videos, batch_size)),
        "untrained": draw(model.strategy, sampler_logits(untrained, videos, batch_size)),
        "random": draw(STRATEGIES["random"]),
        "box_share": float(share_B[share_B > 0].mean()),
        "num_clips": int((share_B > 0).sum()),
        "repeats": repeats,
    }
