"""A colour map laid over the frames of a video, with a legend.

Letters: H, W pixels; L, R, C tubelets, rows and columns of the map.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from adamae_fast.data.decode import Frames
from adamae_fast.report.pictures import BRIGHT, GROUND

ENCODER = "libx264"
OPTIONS = {
    "preset": "medium",
    "crf": "18",
    # Without the macroblock tree, whose decisions change from call to call; frames are converted by BT.601.
    "x264-params": "mbtree=0:colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m",
}

LIMITS = (1.25, 1.5, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256)
COVERED = 0.995
"""Share of the map's values that the colours reach to."""

COLOUR_MAP = "inferno"
"""Of matplotlib, above 1: from black to bright yellow. Below 1 is black."""

OPACITY = (0.72, 0.25, 0.85)
"""At the low end, at 1 and at the high end."""

GREY = 0.7
"""How far the colours of the video give way to grey under the map: two colours at once cannot be told apart."""


def pick_limit(maps_LRC: NDArray[np.floating]) -> float:
    """The first of :data:`LIMITS` that nearly all values stay below; far less than uniform is black in any case."""
    most = float(np.quantile(maps_LRC, COVERED))
    return next((limit for limit in LIMITS if most <= limit), LIMITS[-1])


class Overlay:
    """Draws the map of a whole video over its frames.

    A value v has the place 1/2 + log(v) / (2 log(limit)) in the colours: 1, which is uniform, in their middle;
    what is below grows dark, what is above glows. Places are interpolated linearly in time between the middles of
    tubelets, bicubically in space.

    Args:
        maps_LRC: values above 0, relative to uniform.
        tubelet_frames: frames of the video that a tubelet stands for.
        height: of a frame.
        width: of a frame.
        limit: the colours reach from 1/limit to limit.
        side_by_side: whether the frame as it is stands to the left.
    """

    def __init__(
        self,
        maps_LRC: NDArray[np.floating],
        tubelet_frames: int,
        height: int,
        width: int,
        limit: float,
        *,
        side_by_side: bool = False,
    ) -> None:
        logs_LRC = np.log(np.maximum(maps_LRC, 1e-9)) / (2 * math.log(limit))
        self._places_LRC = (0.5 + logs_LRC).clip(0, 1).astype(np.float32)
        self._tubelet_frames = tubelet_frames
        self._size = (height, width)
        self._side_by_side = side_by_side
        self._kept, self._added = _colours()
        self._legend = _draw_legend(height, width, limit, self._kept * 128 + self._added)

    def places(self, number: int) -> NDArray[np.float32]:
        """Places in the colours, in [0, 1], of the pixels (H, W) of frame ``number``."""
        at = (number + 0.5) / self._tubelet_frames - 0.5
        at = min(max(at, 0.0), len(self._places_LRC) - 1.0)
        low = int(at)
        high = min(low + 1, len(self._places_LRC) - 1)
        places_RC = self._places_LRC[low] + (at - low) * (self._places_LRC[high] - self._places_LRC[low])
        smooth = F.interpolate(torch.from_numpy(places_RC)[None, None], self._size, mode="bicubic", align_corners=False)
        return np.asarray(smooth[0, 0].clamp(0, 1).numpy())

    def draw(self, number: int, frame_HWC: Frames) -> Frames:
        """Frame ``number`` with its colours and the legend; uint8 (H, W, 3), or (H, 2 W, 3) side by side."""
        index_HW = (self.places(number) * 255).round().astype(np.uint8)
        grey_HW1 = (frame_HWC @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
        faded_HWC = frame_HWC + GREY * (grey_HW1 - frame_HWC)
        drawn_HWC = (faded_HWC * self._kept[index_HW] + self._added[index_HW]).round().clip(0, 255).astype(np.uint8)
        picture = Image.fromarray(drawn_HWC)
        margin = self._legend.height // 6
        picture.paste(self._legend, (margin, self._size[0] - self._legend.height - margin), self._legend)
        drawn_HWC = np.asarray(picture)
        return np.concatenate([frame_HWC, drawn_HWC], axis=1) if self._side_by_side else drawn_HWC


def _colours() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For 256 places the share of the frame that stays, (256, 1), and what is added to that, (256, 3)."""
    import matplotlib

    ramp = np.linspace(-1, 1, 256)
    opacity = np.interp(ramp, (-1, 0, 1), OPACITY)[:, None]
    colours = np.asarray(matplotlib.colormaps[COLOUR_MAP](ramp.clip(0)))[:, :3] * 255
    return (1 - opacity).astype(np.float32), (colours * opacity).astype(np.float32)


def _draw_legend(height: int, width: int, limit: float, ramp: NDArray[np.float32]) -> Image.Image:
    """What the colours mean, as they are over grey, on a plate that lets a little of the video through."""
    size = min(max(9, round(min(height, width) / 26)), 26)
    font = ImageFont.load_default(size)
    pad, thick, long = round(size * 0.6), max(4, round(size * 0.6)), min(round(size * 13), round(width * 0.4))
    title = "probability / uniform"
    top = pad + (round(1.3 * size) if font.getlength(title) <= long else 0)
    plate = Image.new("RGBA", (long + 2 * pad, top + thick + round(1.2 * size) + pad), (*GROUND, 190))
    draw = ImageDraw.Draw(plate)
    if top > pad:
        draw.text((pad, pad), title, (*BRIGHT, 255), font, anchor="lt")
    bar = ramp[np.linspace(0, 255, long).round().astype(int)].round().astype(np.uint8)
    plate.paste(Image.fromarray(bar[None].repeat(thick, axis=0)), (pad, top))
    below = top + thick + round(0.4 * size)
    for x, text, anchor in ((0, f"1/{limit:g}", "lt"), (long / 2, "1x", "mt"), (long, f"{limit:g}x", "rt")):
        draw.text((pad + x, below), text, (*BRIGHT, 255), font, anchor=anchor)
    return plate
