"""How a clip is cut into tokens: the one place that knows the order and the sizes.

Tokens are ordered frame-major, then row, then column, which is the order in which a strided 3-D convolution flattens.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_CHANNELS = 3
"""Colour channels of every clip (RGB)."""


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """A clip of ``num_frames`` × ``frame_size`` × ``frame_size`` pixels cut into tubelets.

    Raises ValueError that names the sizes if they do not divide.
    """

    num_frames: int
    frame_size: int
    tubelet_size: int
    patch_size: int

    def __post_init__(self) -> None:
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames={self.num_frames} is not a multiple of tubelet_size={self.tubelet_size}; change one"
            )
        if self.frame_size % self.patch_size:
            raise ValueError(
                f"frame_size={self.frame_size} is not a multiple of patch_size={self.patch_size}; change one"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        side = self.frame_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def tokens_per_frame(self) -> int:
        """Tokens that share one tubelet's time."""
        return self.shape[1] * self.shape[2]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.shape[0] * self.tokens_per_frame

    @property
    def pixels_per_token(self) -> int:
        """P: values of one tubelet, all channels."""
        return self.tubelet_size * self.patch_size**2 * NUM_CHANNELS

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of one clip."""
        return NUM_CHANNELS, self.num_frames, self.frame_size, self.frame_size
