"""A ViT over all tokens of a clip: what classifiers, and frozen features, are made with.

Shapes: B clips, C channels, T frames, H, W pixels, N tokens, D encoder width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adamae_fast.config import ModelConfig, Recompute
from adamae_fast.grid import TokenGrid
from adamae_fast.model.block import chosen_backend, set_recompute
from adamae_fast.model.encoder import Encoder
from adamae_fast.model.positions import sinusoid_table
from adamae_fast.model.sizes import SIZES
from adamae_fast.model.tokenizer import Tokenizer

_FRESH = ("fc_norm.", "head.")
"""What no pre-training file has."""

_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


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


class VideoEncoder(nn.Module):
    """The encoder of :class:`~adamae_fast.model.adamae.AdaMAE`, names of its parameters included, over all tokens.

    Of ``model`` only size, clip, tokens, and the encoder's attention matter. Positions are computed, for any clip: a
    model that saw other frame counts before sees the same table, longer or shorter; another frame size numbers its
    tokens anew, as in the published code.

    Args:
        model: sizes of the clip and of the encoder.
        drop_path: probability, in training, that the last block leaves out its attention, and likewise its MLP, for a
            clip; it grows linearly from 0 at the first block (stochastic depth).
        norm: whether LayerNorm follows the last block, as in pre-training.
    """

    positions_ND: Tensor

    def __init__(self, model: ModelConfig, *, drop_path: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.config = model
        self.grid = TokenGrid(
            num_frames=model.num_frames,
            frame_size=model.frame_size,
            tubelet_size=model.tubelet_size,
            patch_size=model.patch_size,
        )
        size = SIZES[model.size].encoder
        self.tokenizer = Tokenizer(self.grid, size.width)
        self.encoder = Encoder(size, model.attention.encoder, drop_path=drop_path, norm=norm)
        self.register_buffer("positions_ND", sinusoid_table(self.grid.num_tokens, size.width), persistent=False)

    def take_weights(self, tensors: Mapping[str, Tensor], source: str) -> LoadedKeys:
        """Take tokenizer and blocks from ``tensors``, under this model's names; fc_norm and a head of this shape, too.

        Raises ValueError that names key, value and remedy for an encoder of another size or with other tubelets, and
        lists what is missing or mis-shaped. Then nothing has changed.
        """
        self._check_sizes(tensors, source)
        own = self.state_dict()
        head = tensors.get("head.weight")
        # Without fc_norm it is the head of another kind of classifier: on the first token, say, in place of the mean.
        is_behind_norm = "fc_norm.weight" in tensors and "head.weight" in own
        takes_head = head is not None and is_behind_norm and head.shape == own["head.weight"].shape
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
        """Return the tokens of the last block, after its LayerNorm if there is one, ordered time, row, column.

        Args:
            video: uint8 (B, 3, T, H, W), or a floating type in [0, 1]; normalisation happens inside.

        Returns:
            (B, N, D), in the dtype of autocast where that is on, else in the parameters'.

        Raises ValueError for a video of another shape or dtype, and in eval mode on the CPU for floating values over 2.
        """
        self._check_video(video)
        tokens_BND = self.tokenizer(video)
        # One rounding in place of two: positions are not rounded to bf16 before they are added.
        return self.encoder((tokens_BND + self.positions_ND).to(tokens_BND.dtype))

    def pool(self, tokens_BND: Tensor) -> Tensor:
        """Return one vector of each clip from its :meth:`features`: their mean, (B, D), in the parameters' dtype."""
        return tokens_BND.mean(dim=1, dtype=self.tokenizer.weight.dtype)

    forward = features

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
        # Where values can be read without waiting; not in training, whose augmentation adds noise.
        if video.is_floating_point() and video.device.type == "cpu" and not self.training and _has_values(video):
            largest = float(video.detach().amax())
            if largest > 2:
                raise ValueError(
                    f"video is floating and has values up to {largest:g}; pass uint8 clips, or floating ones in [0, 1]"
                )


def _has_values(tensor: Tensor) -> bool:
    """Whether they can be looked at: not those of an empty or fake tensor, nor while a graph is being traced."""
    return tensor.numel() > 0 and type(tensor) is Tensor and not torch.compiler.is_compiling()
