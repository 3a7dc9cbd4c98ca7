"""Fine-tuning starts from what anybody's pre-training, or fine-tuning, has left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from adamae_fast.config import LossConfig
from adamae_fast.interop.convert import detect_layout
from adamae_fast.interop.huggingface import check_config, read_config, read_weights, transformers_config
from adamae_fast.interop.infer import encoder_depth
from adamae_fast.interop.keys import Names, transformers_names
from adamae_fast.interop.published import layout_of, read_pth
from adamae_fast.model.classifier import LoadedKeys, VideoClassifier
from adamae_fast.run_folder import find_weights
from adamae_fast.tensor_file import read_tensors_file

_ENCODER_SETTINGS = ("num_attention_heads", "intermediate_size", "hidden_act", "qv_bias")
"""What config.json says about the encoder and its tensors do not."""


def load_encoder(model: VideoClassifier, path: str | Path) -> LoadedKeys:
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
    tensors, names, source = _read(Path(path), model)
    ours: dict[str, Tensor] = {}
    theirs: dict[str, tuple[str, ...]] = {}
    for name in _encoder_names(model, encoder_depth(tensors, names)):
        pieces = names(name)
        if all(piece in tensors for piece in pieces):
            ours[name] = torch.cat([tensors[piece] for piece in pieces])
            theirs[name] = pieces
    keys = model.take_weights(ours, source)
    used = tuple(piece for name in keys.used for piece in theirs[name])
    return LoadedKeys(
        used=used, missing=keys.missing, left_over=tuple(name for name in tensors if name not in set(used))
    )


def _read(path: Path, model: VideoClassifier) -> tuple[Mapping[str, Tensor], Names, str]:
    """Return the file's tensors, its layout, and what to call it."""
    layout = detect_layout(path)
    if layout == "pth":
        tensors, _ = read_pth(path)
        return tensors, layout_of(tensors), str(path)
    if layout == "transformers":
        expected = transformers_config(model.config, LossConfig())
        settings = {key: expected[key] for key in _ENCODER_SETTINGS}
        config, tensors = read_config(path), read_weights(path)
        if config.get("hidden_size") == expected["hidden_size"]:  # else the error about the size is the better one
            check_config(path, config, settings)
        return tensors, transformers_names, str(path)
    weights, _ = find_weights(path)
    return read_tensors_file(weights), _our_names, str(weights)


def _our_names(ours: str) -> tuple[str, ...]:
    return (ours,)


def _encoder_names(model: VideoClassifier, depth: int) -> Iterator[str]:
    """Names that a classifier like ``model`` of that depth has: what a deeper one has more must not go unnoticed."""
    for name in model.state_dict():
        if name.startswith("encoder.blocks.0."):
            yield from (name.replace(".0.", f".{number}.", 1) for number in range(depth))
        elif not name.startswith("encoder.blocks."):
            yield name
