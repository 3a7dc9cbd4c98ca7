"""A ViT that classifies clips: the encoder of pre-training over all tokens, their mean, LayerNorm, one linear layer.

Shapes: B clips, C channels, T frames, H, W pixels, N tokens, D encoder width.
"""

from __future__ import annotations

import json
import logging
import re
from argparse import ArgumentError
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import yaml
from torch import Tensor, nn

from adamae_fast.config import ModelConfig, Recompute
from adamae_fast.grid import TokenGrid
from adamae_fast.model.block import chosen_backend, set_recompute
from adamae_fast.model.encoder import Encoder
from adamae_fast.model.layers import LayerNorm
from adamae_fast.model.positions import sinusoid_table
from adamae_fast.model.sizes import SIZES
from adamae_fast.model.tokenizer import Tokenizer
from adamae_fast.ops.registry import without_autocast
from adamae_fast.parser_errors import in_plain_words
from adamae_fast.run_folder import find_weights
from adamae_fast.tensor_file import read_tensors_file

HEAD_SCALE = 0.001
"""Factor on the head's first weights: a fresh classifier starts with nearly equal logits, as published."""

_FRESH = ("fc_norm.", "head.")
"""What no pre-training file has."""

_DECIDES = {
    "model.size",
    "model.num_frames",
    "model.frame_size",
    "model.tubelet_size",
    "model.patch_size",
    "model.attention.encoder",
}
"""Keys of a recipe that decide which classifier there is."""

_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")

log = logging.getLogger("adamae_fast")


@dataclass(frozen=True, kw_only=True)
class LoadedKeys:
    """What a classifier took from a checkpoint, from :func:`adamae_fast.load_encoder`, and what it did not.

    Names are those of state dicts; ``str()`` is one line for the user, which groups and counts them.
    """

    used: tuple[str, ...]
    """Tensors of the file that were taken, under its names."""

    missing: tuple[str, ...]
    """Parameters of the classifier that keep their first values, under its names."""

    left_over: tuple[str, ...]
    """Tensors of the file that were not taken, under its names."""

    def __str__(self) -> str:
        missing, left_over = (_grouped(names) for names in (self.missing, self.left_over))
        return f"{len(self.used)} tensors used; missing, so fresh: {missing}; left over: {left_over}"


def _grouped(names: Iterable[str]) -> str:
    counts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{prefix} ({count})" for prefix, count in counts.items()) or "none"


class VideoClassifier(nn.Module):
    """Logits (B, num_classes) = head(fc_norm(mean over tokens of the encoder's last block)); there is no class token.

    A call takes clips (B, 3, T, H, W), uint8 or floating in [0, 1]. Parameters are fp32; under ``torch.autocast`` the
    encoder's matrix products run in its dtype, and mean, ``fc_norm`` and head in fp32.

    The encoder is :class:`~adamae_fast.model.adamae.AdaMAE`'s, names of its parameters included, without its last
    LayerNorm: ``fc_norm`` takes its place. Of ``model`` only size, clip, tokens, and the encoder's attention matter.
    Positions are computed, for any clip: a model that saw other frame counts before sees the same table, longer or
    shorter; another frame size numbers its tokens anew, as in the published code.

    First values are the published ones for fine-tuning: linear layers truncated normal with standard deviation 0.02,
    biases 0, the head 0.001 of that, the tokenizer as Conv3d starts.

    Args:
        model: sizes of the clip and of the encoder.
        num_classes: length of a row of logits.
        drop_path: probability, in training, that the last block leaves out its attention, and likewise its MLP, for a
            clip; it grows linearly from 0 at the first block (stochastic depth).

    Raises ValueError for a number out of its range.
    """

    positions_ND: Tensor

    def __init__(self, model: ModelConfig, num_classes: int, drop_path: float = 0.1) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: choose at least 1 class")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path}: choose a probability in [0, 1)")
        self.config = model
        self.num_classes = num_classes
        self.grid = TokenGrid(
            num_frames=model.num_frames,
            frame_size=model.frame_size,
            tubelet_size=model.tubelet_size,
            patch_size=model.patch_size,
        )
        size = SIZES[model.size].encoder
        self.tokenizer = Tokenizer(self.grid, size.width)
        self.encoder = Encoder(size, model.attention.encoder, drop_path=drop_path, norm=False)
        self.fc_norm = LayerNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.head.weight.mul_(HEAD_SCALE)
        self.register_buffer("positions_ND", sinusoid_table(self.grid.num_tokens, size.width), persistent=False)

    @classmethod
    def from_config(cls, path: str | Path, num_classes: int, drop_path: float = 0.1, **overrides: object) -> Self:
        """Build the classifier for the group ``model`` of any recipe, of pre-training too, with fresh weights.

        ``overrides`` change single keys: ``from_config(path, 174, **{"model.num_frames": 32})``. Raises ValueError for
        a recipe that cannot be read, and for an override that would have no effect here.
        """
        return cls(_read_model_config(path, overrides), num_classes, drop_path)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, num_classes: int | None = None, *, drop_path: float = 0.1, **overrides: object
    ) -> Self:
        """Load a checkpoint folder, or the newest checkpoint of a run's folder.

        Without ``num_classes`` it is a classifier's, and all of its weights are taken. With it, the checkpoint, of
        pre-training or of a classifier, is a starting point: encoder, and head where it has as many classes; what
        was used, missing and left over is logged. ``overrides`` are those of :meth:`from_config`.

        Files of the published code, VideoMAE and transformers: ``adamae-fast convert`` brings them into this layout,
        :func:`adamae_fast.load_encoder` starts from them as they are. Raises ValueError where the folder holds no
        checkpoint or the weights do not fit.
        """
        weights, recipe = find_weights(path)
        tensors = read_tensors_file(weights)
        config = _read_model_config(recipe, overrides)
        if num_classes is not None:
            model = cls(config, num_classes, drop_path)
            log.info("%s: %s", weights, model.take_weights(tensors, str(weights)))
            return model
        if "head.weight" not in tensors:
            raise ValueError(f"num_classes=None: {str(path)!r} is no classifier; give num_classes to start one from it")
        model = cls(config, len(tensors["head.weight"]), drop_path)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{weights}: these weights do not fit the configured model: {error}") from error
        return model

    def take_weights(self, tensors: Mapping[str, Tensor], source: str) -> LoadedKeys:
        """Take tokenizer and blocks from ``tensors``, under this model's names; fc_norm, and a head of this shape, too.

        Raises ValueError that names key, value and remedy for an encoder of another size or with other tubelets, and
        lists what is missing or mis-shaped. Then nothing has changed.
        """
        self._check_sizes(tensors, source)
        own = self.state_dict()
        head = tensors.get("head.weight")
        takes_head = head is not None and head.shape == own["head.weight"].shape
        used = [name for name in own if name in tensors and (takes_head or not name.startswith("head."))]
        missing = [name for name in own if name not in used]
        faults = [f"missing: {name} {tuple(own[name].shape)}" for name in missing if not name.startswith(_FRESH)]
        for name in used:
            found, wanted = tensors[name], own[name]
            if found.shape != wanted.shape:
                faults.append(f"shape: {name} {tuple(found.shape)}, expected {tuple(wanted.shape)}")
            elif not found.is_floating_point():
                faults.append(f"dtype: {name} {found.dtype}, expected torch.float32")
        if faults:
            raise ValueError(f"{source}: {len(faults)} tensors do not fit this encoder:\n  " + "\n  ".join(faults[:20]))
        self.load_state_dict({name: tensors[name] for name in used}, strict=False)
        left_over = tuple(name for name in tensors if name not in set(used))
        return LoadedKeys(used=tuple(used), missing=tuple(missing), left_over=left_over)

    def _check_sizes(self, tensors: Mapping[str, Tensor], source: str) -> None:
        kernel = tensors.get("tokenizer.weight")
        if kernel is None or kernel.ndim != 5:
            raise ValueError(f"{source}: holds no video encoder (no tokenizer with a weight of five dimensions)")
        width, _, tubelet_size, patch_size, _ = kernel.shape
        depth = 1 + max((int(match[1]) for name in tensors if (match := _BLOCK.match(name))), default=-1)
        size = SIZES[self.config.size].encoder
        if (width, depth) != (size.width, size.depth):
            fits = [name for name, s in SIZES.items() if (s.encoder.width, s.encoder.depth) == (width, depth)]
            remedy = f"set model.size={fits[0]}" if fits else "no model.size has that; choose another checkpoint"
            raise ValueError(
                f"model.size={self.config.size!r} has {size.depth} blocks of width {size.width}, but {source} has "
                f"{depth} of width {width}: {remedy}"
            )
        for key, found in (("tubelet_size", tubelet_size), ("patch_size", patch_size)):
            if getattr(self.config, key) != found:
                raise ValueError(
                    f"model.{key}={getattr(self.config, key)}, but {source} has tokens of {tubelet_size} frames of "
                    f"{patch_size} × {patch_size} pixels: set model.{key}={found}"
                )

    def attention_backends(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """Return the attention back end that training on ``device``, with products in ``dtype``, takes.

        Raises ValueError that names the key and each reason if the one that ``model.attention.encoder`` asks for cannot
        run there.
        """
        chosen = chosen_backend("encoder", self.encoder, self.grid.num_tokens, device, dtype)
        return {} if chosen is None else {"encoder": chosen}

    def set_recompute(self, policy: Recompute) -> None:
        """Choose what the backward computes again instead of keeping it; weights and results stay what they are.

        The policies are those of :class:`~adamae_fast.model.block.Block`; a fresh model has "none". Raises ValueError
        for another name.
        """
        set_recompute(self, policy)

    def features(self, video: Tensor) -> Tensor:
        """Return the tokens of the last block, (B, N, D), ordered time, row, column; arguments as for the call."""
        self._check_video(video)
        tokens_BND = self.tokenizer(video)
        # One rounding in place of two: positions are not rounded to bf16 before they are added.
        return self.encoder((tokens_BND + self.positions_ND).to(tokens_BND.dtype))

    def forward(self, video: Tensor) -> Tensor:
        """Return logits (B, num_classes) in the head's dtype, under autocast too.

        Args:
            video: uint8 (B, 3, T, H, W), or a floating type in [0, 1]; normalisation happens inside.

        Raises ValueError for a video of another shape or dtype.
        """
        tokens_BND = self.features(video)
        with without_autocast(video.device):
            pooled_BD = tokens_BND.mean(dim=1, dtype=self.head.weight.dtype)
            return self.head(self.fc_norm(pooled_BD))

    def _check_video(self, video: Tensor) -> None:
        if not isinstance(video, Tensor):
            raise ValueError(f"video is a {type(video).__name__}; pass a torch.Tensor; torch.as_tensor makes one")
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise ValueError(f"video has dtype {video.dtype}; pass uint8 clips, or floating ones in [0, 1]")
        if video.ndim != 5 or tuple(video.shape[1:]) != self.grid.video_shape:
            raise ValueError(
                f"video has shape {tuple(video.shape)}; this model takes clips of shape "
                f"(B, {', '.join(map(str, self.grid.video_shape))}): resize the clip, or build the model with other "
                "model.num_frames and model.frame_size"
            )


def _read_model_config(path: str | Path, overrides: Mapping[str, object]) -> ModelConfig:
    """Read the group ``model`` of a recipe, whichever command it is for."""
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
