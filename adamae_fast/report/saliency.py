"""Where a checkpoint's sampler looks, over whole videos: ``adamae-fast saliency``.

A sampler sees clips. Over a video of any length and shape, clips are windows that slide by half of their own size, in
time and along the longer side of the frame, all on one grid of tokens. Where windows overlap, their maps are averaged.

Letters: T frames of a clip, H, W pixels, N tokens of a window; L, R, C tubelets, rows and columns of a video's map.
"""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adamae_fast.config import load_config
from adamae_fast.data.clips import resize
from adamae_fast.data.decode import Frames, VideoError, VideoFile, fitted_size, open_video
from adamae_fast.data.encode import container_rate, write_frames
from adamae_fast.device import pick_device
from adamae_fast.grid import TokenGrid
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.report.adaptivity import sampler_logits
from adamae_fast.report.overlay import ENCODER, OPTIONS, Overlay, pick_limit
from adamae_fast.report.visualize import file_names
from adamae_fast.run_folder import find_weights
from adamae_fast.tensor_file import read_tensors_file

WINDOWS_AT_ONCE = 4
"""Windows of one forward pass. They and the frames of one clip are all of a video that is in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """A video's grid of tokens, and the windows that cover it.

    The frame's short side has as many tokens as a clip's; the long one as many as keep its shape best. A tubelet stands
    for ``tubelet_size * stride`` frames of the video. A video shorter than a clip is one window: what it lacks is its
    last frame again, as in all clips (``data.clips.frame_ids``), and has no place in the map.
    """

    grid: TokenGrid
    stride: int
    num_frames: int
    """Of the video."""
    height: int
    width: int

    @property
    def tubelet_frames(self) -> int:
        """Frames of the video that one tubelet stands for, those that the stride leaves out among them."""
        return self.grid.tubelet_size * self.stride

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, R, C)."""
        side, short = self.grid.shape[1], min(self.height, self.width)
        rows, columns = (round(pixels * side / short) for pixels in (self.height, self.width))
        return -(-self.num_frames // self.tubelet_frames), rows, columns

    @cached_property
    def starts(self) -> tuple[list[int], list[int], list[int]]:
        """First tubelets, first rows and first columns of windows, which are all their combinations."""
        times, rows, columns = map(window_starts, self.shape, self.grid.shape)
        return times, rows, columns

    def clips(self, video: VideoFile) -> Iterator[tuple[int, Tensor]]:
        """Yield first tubelet and frames, uint8 (3, T, R * patch, C * patch), of each window in time.

        Decodes the video once, from beginning to end, and keeps T frames of it.
        """
        _, rows, columns = self.shape
        height, width = rows * self.grid.patch_size, columns * self.grid.patch_size
        starts, count = deque(self.starts[0]), 0
        kept: deque[Tensor] = deque(maxlen=self.grid.num_frames)
        last_HWC: Frames | None = None
        for number, last_HWC in enumerate(video.in_order(min(self.height, self.width))):
            if number % self.stride:
                continue
            kept.append(_resized(last_HWC, height, width))
            count += 1
            if starts and count == starts[0] * self.grid.tubelet_size + self.grid.num_frames:
                yield starts.popleft(), torch.stack([*kept], dim=1)
        for start in starts:  # one at most: the last window may reach beyond the end
            assert last_HWC is not None
            own = [*kept][start * self.grid.tubelet_size - count :]
            again = [_resized(last_HWC, height, width)] * (self.grid.num_frames - len(own))
            yield start, torch.stack([*own, *again], dim=1)


@dataclass(frozen=True)
class Saliency:
    """A video's map, and the entropy of each window's."""

    maps_LRC: NDArray[np.float32]
    """Probability relative to uniform, N · softmax(logits), averaged over windows; 1 is as likely as by chance."""

    window_starts_W3: NDArray[np.int64]
    """First tubelet, row and column of each window."""

    entropy_W: NDArray[np.float64]
    """-Σ p log p of each window in nats; log N where all tokens are equally likely."""


def window_starts(length: int, window: int) -> list[int]:
    """First places of windows that cover 0..length-1: every half window, the last one at the end; [0] if one does."""
    if length <= window:
        return [0]
    return [*range(0, length - window, max(1, window // 2)), length - window]


def measure_saliency(model: AdaMAE, video: VideoFile, tiling: Tiling) -> Saliency:
    """Run tokenizer and sampler over every window of a video, in eval mode.

    Memory follows from the window and the size of a frame; only the map grows with the video. Raises VideoError for a
    video that does not decode, ValueError for a model without a sampler, or with one whose logits are not finite.
    """
    grid, patch = tiling.grid, tiling.grid.patch_size
    sums_LRC, counts_LRC = np.zeros(tiling.shape), np.zeros(tiling.shape)
    places: list[tuple[int, int, int]] = []
    entropies: list[float] = []
    corners = list(product(*tiling.starts[1:]))
    times, side, _ = grid.shape
    for first, frames_CTHW in tiling.clips(video):
        squares = [
            frames_CTHW[:, :, y * patch :, x * patch :][:, :, : grid.frame_size, : grid.frame_size] for y, x in corners
        ]
        for begin in range(0, len(squares), WINDOWS_AT_ONCE):
            batch = torch.stack(squares[begin : begin + WINDOWS_AT_ONCE])
            log_p_BN = sampler_logits(model, batch, WINDOWS_AT_ONCE).double().log_softmax(dim=1).cpu()
            if not log_p_BN.isfinite().all():
                raise ValueError(f"{video.path}: the sampler's logits are not finite; choose an earlier checkpoint")
            entropies += torch.special.entr(log_p_BN.exp()).sum(dim=1).tolist()
            relative = (log_p_BN.exp() * grid.num_tokens).unflatten(1, grid.shape).numpy()
            for (y, x), map_thw in zip(corners[begin:], relative, strict=False):
                part = np.s_[first : first + times, y : y + side, x : x + side]
                sums_LRC[part] += map_thw[: len(sums_LRC) - first]
                counts_LRC[part] += 1
                places.append((first, y, x))
    maps_LRC = (sums_LRC / counts_LRC).astype(np.float32)
    return Saliency(maps_LRC, np.array(places), np.array(entropies))


def saliency(
    checkpoint: str,
    videos: list[str],
    out: str = "saliency",
    scale: float | None = None,
    side_by_side: bool = False,
    device: str = "auto",
) -> int:
    """Write each video with the sampler's probability map over it, as H.264, and the maps as numbers.

    ``NAME_saliency.mp4`` has the frames, the rate and the size of the video (odd sides lose a pixel), without sound.
    ``NAME_saliency.npz`` holds maps (tubelets, rows, columns), places and entropies of the windows;
    ``NAME_saliency.json`` the same without the maps. Videos are decoded frame by frame, twice: their length does not
    matter. A video shorter than a clip is seen with its last frame repeated. A video that cannot be read is named with
    its reason; the others are still done.

    Args:
        checkpoint: A checkpoint folder, or a run's folder, whose newest checkpoint is taken; with a sampler.
        videos: Video files.
        out: Folder to write; files of the same names are replaced.
        scale: Colours reach from 1/scale to scale times the uniform probability; give one number to compare videos. By
            default it is chosen for each video and shown in its legend.
        side_by_side: The video as it is to the left of it, in twice the width.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.

    Returns:
        Exit status: 0, or 1 if a video could not be read.
    """
    if scale is not None and not (math.isfinite(scale) and scale > 1):
        raise ValueError(f"scale={scale}: choose a number above 1; 4 colours from a quarter to four times uniform")
    model = _load(checkpoint).to(pick_device(device))
    stride = load_config(find_weights(checkpoint)[1]).data.stride
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    names = {video: f"{name}_saliency" for video, name in file_names(videos).items()}
    inputs = {Path(video).resolve() for video in videos}
    for name in names.values():
        if (folder / f"{name}.mp4").resolve() in inputs:
            raise ValueError(f"out={out!r}: {name}.mp4 there is one of the videos; choose another folder")
    unreadable: list[VideoError] = []
    for video, name in names.items():
        try:
            _write_saliency(model, stride, video, folder / name, scale, side_by_side)
        except VideoError as error:
            unreadable.append(error)
            print(error, file=sys.stderr)
    print(f"saliency of {len(names) - len(unreadable)} of {len(names)} videos in {out}")
    return 1 if unreadable else 0


def _load(checkpoint: str) -> AdaMAE:
    """Return the checkpoint's model. Raises ValueError if it has no sampler."""
    weights_file, _ = find_weights(checkpoint)
    problem = None
    if "fc_norm.weight" in read_tensors_file(weights_file):
        problem = "holds a classifier, which has no sampler; give the run of pretrain that it started from"
    else:
        model = AdaMAE.from_pretrained(checkpoint)
        if model.sampler is not None:
            return model
        strategy = model.mask_config.strategy
        problem = f"was trained with mask.strategy={strategy}, without a sampler; give a run of mask.strategy=adaptive"
    raise ValueError(f"{checkpoint!r} {problem}")


def _write_saliency(
    model: AdaMAE, stride: int, path: str, target: Path, scale: float | None, side_by_side: bool
) -> None:
    """Measure one video and write its three files."""
    with closing(open_video(path)) as video:
        short = min(video.height, video.width)
        height, width = fitted_size(video.height, video.width, short)
        tiling = Tiling(grid=model.grid, stride=stride, num_frames=video.num_frames, height=height, width=width)
        found = measure_saliency(model, video, tiling)
        limit = scale or pick_limit(found.maps_LRC)
        overlay = Overlay(found.maps_LRC, tiling.tubelet_frames, height, width, limit, side_by_side=side_by_side)
        frames = (overlay.draw(number, frame) for number, frame in enumerate(video.in_order(short)))
        rate = container_rate(video.fps)
        film, part = target.with_name(f"{target.name}.mp4"), target.with_name(f"{target.name}.part")
        try:
            write_frames(part, frames, rate, ENCODER, OPTIONS)
            part.replace(film)
        finally:
            part.unlink(missing_ok=True)
    maps = target.with_name(f"{target.name}.npz")
    arrays = {"maps": found.maps_LRC, "window_starts": found.window_starts_W3, "entropy": found.entropy_W}
    np.savez_compressed(maps, **arrays, tubelet_frames=np.int64(tiling.tubelet_frames))  # type: ignore[arg-type]
    share = found.entropy_W / math.log(model.grid.num_tokens)
    facts = {
        "video": path,
        "frames": video.num_frames,
        "frames_per_second": float(rate),
        "height": height,
        "width": width,
        "map_shape": list(tiling.shape),
        "tubelet_frames": tiling.tubelet_frames,
        "window_shape": list(model.grid.shape),
        "scale": limit,
        "overlay": film.name,
        "maps": maps.name,
        "windows": [
            {"tubelet": t, "row": y, "column": x, "entropy_nats": round(nats, 6), "entropy_of_uniform": round(part, 6)}
            for (t, y, x), nats, part in zip(
                found.window_starts_W3.tolist(), found.entropy_W.tolist(), share.tolist(), strict=True
            )
        ],
    }
    target.with_name(f"{target.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(
        f"{film}: {video.num_frames} frames, {len(share)} windows, entropy {share.mean():.1%} of uniform,"
        f" colours from 1/{limit:g} to {limit:g} × uniform",
        flush=True,
    )


def _resized(frame_HWC: Frames, height: int, width: int) -> Tensor:
    """(3, height, width)."""
    return resize(torch.as_tensor(frame_HWC.copy()).permute(2, 0, 1)[None], height, width)[0]
