"""What the shapes in a file say about the model that it belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from adamae_fast.config import DecoderConfig, ModelConfig
from adamae_fast.grid import NUM_CHANNELS
from adamae_fast.interop.keys import Names
from adamae_fast.model.sizes import SIZES

DEFAULT_CLIP = (16, 224)
"""Frames and frame size of every published model; assumed where the file allows it."""

SEARCHED_FRAMES = (8, 16, 32, 64)


def infer_model(
    shapes: Mapping[str, tuple[int, ...]],
    names: Names,
    source: str,
    *,
    num_tokens: int | None = None,
    num_frames: int | None = None,
    frame_size: int | None = None,
    encoder_only: bool = False,
) -> ModelConfig:
    """Return the sizes of the pre-trained model, or of the classifier, whose tensors have these shapes.

    With ``encoder_only`` the decoder is not looked at, and may be missing.

    Width, depth and tubelet come from the shapes; the clip from ``num_frames`` and ``frame_size`` where given, else
    from ``num_tokens`` (see :func:`infer_clip`). Raises ValueError that says what the file lacks or what has no match.
    """
    kernel = _shape(shapes, names("tokenizer.weight")[0], source)
    if len(kernel) != 5 or kernel[1] != NUM_CHANNELS or kernel[3] != kernel[4]:
        raise ValueError(
            f"{source}: {names('tokenizer.weight')[0]} has shape {kernel}; expected (width, {NUM_CHANNELS}, tubelet, "
            "patch, patch): only RGB video with square patches can be converted"
        )
    width, _, tubelet_size, patch_size, _ = kernel
    depth = encoder_depth(shapes, names)
    decoder_width: int | None = None
    decoder_depth: int | None = None
    if not encoder_only and names("head.weight")[0] not in shapes:  # a classifier has no decoder
        decoder_width = _shape(shapes, names("projection.weight")[0], source)[0]
        decoder_depth = _depth(shapes, names, "decoder")
    size = next(
        (
            name
            for name, size in SIZES.items()
            if (size.encoder.width, size.encoder.depth) == (width, depth)
            and decoder_width in (None, size.decoder.width)
        ),
        None,
    )
    if size is None:
        known = "; ".join(f"{n} {s.encoder.width}, {s.encoder.depth}, {s.decoder.width}" for n, s in SIZES.items())
        raise ValueError(
            f"{source}: encoder width {width}, encoder depth {depth}, decoder width {decoder_width or '-'} is none of "
            f"the known sizes ({known}); only these can be converted"
        )
    frames, side = infer_clip(num_tokens, tubelet_size, patch_size, num_frames, frame_size, source)
    return ModelConfig(
        size=size,  # type: ignore[arg-type]  # the keys of SIZES are the literals
        num_frames=frames,
        frame_size=side,
        tubelet_size=tubelet_size,
        patch_size=patch_size,
        decoder=DecoderConfig(depth=None if decoder_depth == SIZES[size].decoder.depth else decoder_depth),
    )


def encoder_depth(shapes: Iterable[str], names: Names) -> int:
    """Return the number of encoder blocks; a gap below the last one shows as missing tensors later."""
    return _depth(shapes, names, "encoder")


def infer_clip(
    num_tokens: int | None,
    tubelet_size: int,
    patch_size: int,
    num_frames: int | None,
    frame_size: int | None,
    source: str,
) -> tuple[int, int]:
    """Return (num_frames, frame_size) of the clips that give ``num_tokens`` = (T/t)·(S/p)².

    What is given is kept. What is not is 16 frames of 224 pixels where that fits or where the number of tokens is not
    known, else the only fit among 8, 16, 32 and 64 square frames. Raises ValueError where none or several fit.
    """
    if num_tokens is None:
        return (
            DEFAULT_CLIP[0] if num_frames is None else num_frames,
            DEFAULT_CLIP[1] if frame_size is None else frame_size,
        )
    if num_frames is not None:
        frames: tuple[int, ...] = (num_frames,)
    elif frame_size is not None:
        frames = (num_tokens // (frame_size // patch_size or 1) ** 2 * tubelet_size,)
    else:
        frames = SEARCHED_FRAMES
    fits = []
    for count in frames:
        side = math.isqrt(num_tokens * tubelet_size // count if count else 0)
        exact = count % tubelet_size == 0 and count // tubelet_size * side**2 == num_tokens
        if exact and frame_size in (None, side * patch_size):
            fits.append((count, side * patch_size))
    if DEFAULT_CLIP in fits:
        return DEFAULT_CLIP
    if len(fits) != 1:
        given = ", ".join(f"--{k}={v}" for k, v in (("num_frames", num_frames), ("frame_size", frame_size)) if v)
        found = " or ".join(f"{count} frames of {side}×{side}" for count, side in fits) or "no such clip"
        raise ValueError(
            f"{source}: {num_tokens} tokens of {tubelet_size}×{patch_size}×{patch_size} pixels"
            f"{f' with {given}' if given else ''} come from {found}; tell it by --num_frames and --frame_size"
        )
    return fits[0]


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, source: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{source}: no tensor {name}, so this is no checkpoint of a known kind")
    return shapes[name]


def _depth(shapes: Iterable[str], names: Names, stack: str) -> int:
    prefix = names(f"{stack}.blocks.0.norm1.weight")[0].split("0.")[0]
    blocks = [int(m[1]) for name in shapes if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))]
    return max(blocks, default=-1) + 1
