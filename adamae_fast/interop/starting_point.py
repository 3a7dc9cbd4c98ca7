"""Fine-tuning, and frozen features, start from what anybody's pre-training, or fine-tuning, has left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamae_fast.config import LossConfig
from adamae_fast.interop.convert import detect_layout
from adamae_fast.interop.huggingface import check_config, read_config, read_weights, transformers_config
from adamae_fast.interop.infer import DEFAULT_CLIP, encoder_depth, infer_model
from adamae_fast.interop.keys import Names, transformers_names
from adamae_fast.interop.published import layout_of, read_pth
from adamae_fast.model.classifier import VideoClassifier, read_model_config
from adamae_fast.model.video_encoder import LoadedKeys, VideoEncoder
from adamae_fast.run_folder import find_weights
from adamae_fast.tensor_file import read_tensors_file

_ENCODER_SETTINGS = ("num_attention_heads", "intermediate_size", "hidden_act", "qv_bias")
"""What config.json says about the encoder and its tensors do not."""


class _Source(NamedTuple):
    """A checkpoint of any layout, as it lies there."""

    tensors: Mapping[str, Tensor]
    names: Names
    name: str
    """What to call it in messages."""

    recipe: Path | None = None
    """Configuration of a checkpoint of ours."""

    settings: Mapping[str, Any] | None = None
    """config.json of transformers."""


def load_encoder(model: VideoEncoder, path: str | Path) -> LoadedKeys:
    """Let a classifier start from a checkpoint: tokenizer and blocks; ``fc_norm`` and a fitting head if it has them.

    ``path`` is a checkpoint or run folder of this project, a published AdaMAE or VideoMAE file (.pth) of pre-training
    or fine-tuning, or a folder of transformers' VideoMAEForPreTraining or VideoMAEForVideoClassification. Decoder and
    sampler are left over, and so are the encoder's last LayerNorm, whose place is ``fc_norm``'s, and a head for another
    number of classes. The clips of the two may differ; the positions are computed for those of ``model``.

    Weights are copied, in the dtype and on the device of ``model``'s parameters, which keeps its mode. Returns the
    names that were taken, that stay fresh and that were left over.

    Raises ValueError that names key, value and remedy for an encoder of another size or with other tubelets, for a file
    that cannot be read safely, and for one that lacks part of the encoder. Then nothing has changed.
    """
    return _take(model, _read(Path(path)))


def open_encoder(path: str | Path, num_frames: int | None = None, frame_size: int | None = None) -> VideoEncoder:
    """Return the encoder in a checkpoint, of the sizes that this has, in eval mode: for features, as it is.

    Args:
        path: as for :func:`load_encoder`. Of a classifier it is a :class:`VideoClassifier`, else a
            :class:`VideoEncoder` with the LayerNorm that pre-training has after the last block. Decoder, sampler and
            optimizer need not be there.
        num_frames: frames of the clips that it is to take; those that it was trained with if None.
        frame_size: height and width of the clips; likewise. A .pth file that does not tell: 16 frames of 224 × 224.

    Raises ValueError that says what the file lacks, or which sizes are not known.
    """
    found = _read(Path(path))
    tensors, names = found.tensors, found.names
    clip = {"num_frames": num_frames, "frame_size": frame_size}
    if found.recipe is not None:
        overrides = {f"model.{key}": value for key, value in clip.items() if value is not None}
        config = read_model_config(found.recipe, overrides)
    else:
        if found.settings is not None:
            for (key, value), theirs, default in zip(
                clip.items(), ("num_frames", "image_size"), DEFAULT_CLIP, strict=True
            ):
                clip[key] = found.settings.get(theirs, default) if value is None else value
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        # Only AdaMAE's sampler tells how many tokens a clip has. Who gives both sizes may want other clips.
        positions = shapes.get("encoder.pos_embed_probs", ())
        num_tokens = positions[1] if len(positions) == 3 and None in clip.values() else None
        config = infer_model(shapes, names, found.name, num_tokens=num_tokens, encoder_only=True, **clip)
    if names("fc_norm.weight")[0] in tensors:
        head = tensors.get(names("head.weight")[0])
        model: VideoEncoder = VideoClassifier(config, 1 if head is None else len(head))
    else:
        model = VideoEncoder(config)
    _take(model, found)
    return model.eval()


def _take(model: VideoEncoder, found: _Source) -> LoadedKeys:
    if found.settings is not None:
        expected = transformers_config(model.config, LossConfig())
        if found.settings.get("hidden_size") == expected["hidden_size"]:  # else the error about the size is better
            check_config(Path(found.name), found.settings, {key: expected[key] for key in _ENCODER_SETTINGS})
    ours: dict[str, Tensor] = {}
    theirs: dict[str, tuple[str, ...]] = {}
    for name in _encoder_names(model, encoder_depth(found.tensors, found.names)):
        pieces = found.names(name)
        if all(piece in found.tensors for piece in pieces):
            ours[name] = torch.cat([found.tensors[piece] for piece in pieces])
            theirs[name] = pieces
    keys = model.take_weights(ours, found.name)
    used = tuple(piece for name in keys.used for piece in theirs[name])
    return LoadedKeys(
        used=used, missing=keys.missing, left_over=tuple(name for name in found.tensors if name not in set(used))
    )


def _read(path: Path) -> _Source:
    layout = detect_layout(path)
    if layout == "pth":
        tensors, _ = read_pth(path)
        return _Source(tensors, layout_of(tensors), str(path))
    if layout == "transformers":
        return _Source(read_weights(path), transformers_names, str(path), settings=read_config(path))
    weights, recipe = find_weights(path)
    return _Source(read_tensors_file(weights), _our_names, str(weights), recipe=recipe)


def _our_names(ours: str) -> tuple[str, ...]:
    return (ours,)


def _encoder_names(model: VideoEncoder, depth: int) -> Iterator[str]:
    """Names that a classifier like ``model`` of that depth has: what a deeper one has more must not go unnoticed."""
    for name in model.state_dict():
        if name.startswith("encoder.blocks.0."):
            yield from (name.replace(".0.", f".{number}.", 1) for number in range(depth))
        elif not name.startswith("encoder.blocks."):
            yield name
