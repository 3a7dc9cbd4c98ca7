"""A ViT that classifies clips: the encoder of pre-training over all tokens, their mean, LayerNorm, one linear layer.

Shapes: B clips, C channels, T frames, H, W pixels, N tokens, D encoder width.
"""

from __future__ import annotations

import json
import logging
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
import yaml
from torch import Tensor, nn

from adamae_fast.config import ModelConfig
from adamae_fast.model.layers import LayerNorm
from adamae_fast.model.sizes import SIZES
from adamae_fast.model.video_encoder import VideoEncoder
from adamae_fast.ops.registry import without_autocast
from adamae_fast.parser_errors import in_plain_words
from adamae_fast.run_folder import find_weights
from adamae_fast.tensor_file import fill, read_tensors_file

HEAD_SCALE = 0.001
"""Factor on the head's first weights: a fresh classifier starts with nearly equal logits, as published."""

_DECIDES = {
    "model.size",
    "model.num_frames",
    "model.frame_size",
    "model.tubelet_size",
    "model.patch_size",
    "model.attention.encoder",
}
"""Keys of a recipe that decide which classifier there is."""

log = logging.getLogger("adamae_fast")


class VideoClassifier(VideoEncoder):
    """Logits (B, num_classes) = head(fc_norm(mean over tokens of the encoder's last block)); there is no class token.

    A call takes clips (B, 3, T, H, W), uint8 or floating in [0, 1]. Parameters are fp32; under ``torch.autocast`` the
    encoder's matrix products run in its dtype, and mean, ``fc_norm`` and head in fp32.

    The encoder has no last LayerNorm: ``fc_norm`` takes its place.

    First values are the published ones for fine-tuning: linear layers truncated normal with standard deviation 0.02,
    biases 0, the head 0.001 of that, the tokenizer as Conv3d starts.

    Args:
        model: sizes of the clip and of the encoder.
        num_classes: length of a row of logits.
        drop_path: as in :class:`~adamae_fast.model.video_encoder.VideoEncoder`.

    Raises ValueError for a number out of its range.
    """

    def __init__(self, model: ModelConfig, num_classes: int, drop_path: float = 0.1) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: choose at least 1 class")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path}: choose a probability in [0, 1)")
        super().__init__(model, drop_path=drop_path, norm=False)
        self.num_classes = num_classes
        size = SIZES[model.size].encoder
        self.fc_norm = LayerNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.head.weight.mul_(HEAD_SCALE)

    @classmethod
    def from_config(cls, path: str | Path, num_classes: int, drop_path: float = 0.1, **overrides: object) -> Self:
        """Build the classifier for the group ``model`` of any recipe, of pre-training too, with fresh weights.

        ``overrides`` change single keys: ``from_config(path, 174, **{"model.num_frames": 32})``. Raises ValueError for
        a recipe that cannot be read, and for an override that would have no effect here.
        """
        return cls(read_model_config(path, overrides), num_classes, drop_path)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, num_classes: int | None = None, *, drop_path: float = 0.1, **overrides: object
    ) -> Self:
        """Load a checkpoint folder, or that of a run: its best one in validation, else its newest one.

        Without ``num_classes`` it is a classifier's, and all of its weights are taken. With it, the checkpoint, of
        pre-training or of a classifier, is a starting point: encoder, and head where it has as many classes; what
        was used, missing and left over is logged. ``overrides`` are those of :meth:`from_config`.

        Files of the published code, VideoMAE and transformers: ``adamae-fast convert`` brings them into this layout,
        :func:`adamae_fast.load_encoder` starts from them as they are. Raises ValueError where the folder holds no
        checkpoint or the weights do not fit.
        """
        weights, recipe = find_weights(path)
        tensors = read_tensors_file(weights)
        config = read_model_config(recipe, overrides)
        if num_classes is not None:
            model = cls(config, num_classes, drop_path)
            log.info("%s: %s", weights, model.take_weights(tensors, str(weights)))
            return model
        if "head.weight" not in tensors:
            raise ValueError(f"num_classes=None: {str(path)!r} is no classifier; give num_classes to start one from it")
        model = cls(config, len(tensors["head.weight"]), drop_path)
        fill(model, tensors, weights)
        return model

    def pool(self, tokens_BND: Tensor) -> Tensor:
        """Return what the head sees of each clip, fc_norm of the mean of its :meth:`features`: (B, D), as the head."""
        with without_autocast(tokens_BND.device):
            return self.fc_norm(tokens_BND.mean(dim=1, dtype=self.head.weight.dtype))

    def forward(self, video: Tensor) -> Tensor:
        """Return logits (B, num_classes) in the head's dtype, under autocast too; ``video`` as for :meth:`features`."""
        pooled_BD = self.pool(self.features(video))
        with without_autocast(video.device):
            return self.head(pooled_BD)


def read_model_config(path: str | Path, overrides: Mapping[str, object]) -> ModelConfig:
    """Read the group ``model`` of a recipe, whichever command it is for; ``overrides`` change single keys of it."""
    for key, value in overrides.items():
        if key not in _DECIDES:
            raise ValueError(
                f"{key}={value!r} has no effect on a classifier; choose among {', '.join(sorted(_DECIDES))}"
            )
    if not Path(path).is_file():
        raise ValueError(f"config={str(path)!r}: no such file; recipes are in the folder configs/")
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig, "model")
    arguments = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()
    ]
    try:
        recipe = yaml.safe_load(Path(path).read_text())
        if not isinstance(recipe, dict):
            raise ValueError("not a recipe; expected groups such as model")
        given = parser.parse_object({"model": recipe.get("model", {})})
        config: ModelConfig = parser.instantiate(parser.parse_args(arguments, namespace=given)).model
        return config
    except (ArgumentError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {in_plain_words(error)}") from error
