"""What each parameter of :class:`AdaMAE` and :class:`VideoClassifier` is called elsewhere, and what a file must hold.

A layout is one function from our name to the names of the file. Most parameters keep their value and shape. Two do not:
the mask token, (E,) here and (1, 1, E) elsewhere; and qkv.weight (3D, D), which transformers keeps as three (D, D).
Because only this direction is written down, reading and writing cannot disagree.

Shapes: D, E widths of encoder and decoder, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adamae_fast.config import LossConfig, MaskConfig, ModelConfig, SamplerConfig
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.tensor_file import listed

Names = Callable[[str], tuple[str, ...]]
"""Our parameter's name → its name in the file, or the names of the pieces it is cut into along its first axis."""

NO_SAMPLER_MASK = MaskConfig(strategy="tube", ratio=0.9)
"""Mask of a model that comes without a sampler: VideoMAE's own pre-training setting."""

_PUBLISHED = (
    ("tokenizer.", "encoder.patch_embed.proj."),
    ("sampler.positions", "encoder.pos_embed_probs"),
    ("sampler.blocks.0.", "encoder.get_token_probs.0."),
    ("sampler.head.", "encoder.get_token_probs.1."),
    ("projection.", "encoder_to_decoder."),
)
_PUBLISHED_CLASSIFIER = (
    ("tokenizer.", "patch_embed.proj."),
    ("encoder.blocks.", "blocks."),
)
_TRANSFORMERS = (
    ("tokenizer.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."),
    ("encoder.norm.", "videomae.layernorm."),
    ("projection.", "encoder_to_decoder."),
    ("decoder.blocks.", "decoder.decoder_layers."),
    ("head.", "classifier."),
)
_TRANSFORMERS_BLOCK = (
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attention.proj.", ".attention.output.dense."),
    (".attention.q_bias", ".attention.attention.q_bias"),
    (".attention.v_bias", ".attention.attention.v_bias"),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A pre-trained model or a classifier between two layouts: its description, and its weights under our names."""

    model: ModelConfig
    mask: MaskConfig
    loss: LossConfig
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    """What the reader had to assume or change, for the user to see."""

    @property
    def num_classes(self) -> int | None:
        """Of a classifier, to which mask and loss mean nothing; None for a pre-trained model."""
        return len(self.state["head.weight"]) if "head.weight" in self.state else None

    @property
    def has_sampler(self) -> bool:
        """Whether the weights include the sampler."""
        return self.mask.strategy == "adaptive"

    def without_sampler(self) -> Checkpoint:
        """Return the model as VideoMAE would train it: no sampler, tube masks."""
        state = {name: tensor for name, tensor in self.state.items() if not name.startswith("sampler.")}
        return replace(self, model=replace(self.model, sampler=SamplerConfig()), mask=NO_SAMPLER_MASK, state=state)


def published_names(ours: str) -> tuple[str, ...]:
    """Return the name in published AdaMAE and VideoMAE pre-training files."""
    return (_with_prefix(ours, _PUBLISHED).replace(".attention.", ".attn."),)


def published_classifier_names(ours: str) -> tuple[str, ...]:
    """Return the name in published AdaMAE and VideoMAE fine-tuning files."""
    return (_with_prefix(ours, _PUBLISHED_CLASSIFIER).replace(".attention.", ".attn."),)


def transformers_names(ours: str) -> tuple[str, ...]:
    """Return the names in the files of transformers' VideoMAE, either class; qkv is split into query, key and value.

    The biases are called ``q_bias`` and ``v_bias``: in the files on the hub, in what transformers 4 needs and in what
    transformers 5.23 saves and loads. (Inside its model they are ``query.bias`` and ``value.bias``.)
    """
    ours = _with_prefix(ours, _TRANSFORMERS)
    if ours.endswith(".attention.qkv.weight"):
        stem = ours.removesuffix("qkv.weight") + "attention."
        return tuple(f"{stem}{part}.weight" for part in ("query", "key", "value"))
    for part, theirs in _TRANSFORMERS_BLOCK:
        if part in ours:
            return (ours.replace(part, theirs),)
    return (ours,)


def _with_prefix(ours: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for prefix, theirs in prefixes:
        if ours.startswith(prefix):
            return theirs + ours.removeprefix(prefix)
    return ours


def parameter_shapes(model: ModelConfig, mask: MaskConfig) -> dict[str, tuple[int, ...]]:
    """Return our name and shape of every parameter of the model, without allocating it."""
    with torch.device("meta"):
        network = AdaMAE(model, mask)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def classifier_shapes(model: ModelConfig, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Return our name and shape of every parameter of the classifier, without allocating it."""
    with torch.device("meta"):
        network = VideoClassifier(model, num_classes)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def read_tensors(
    tensors: Mapping[str, Tensor], names: Names, shapes: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, Tensor]:
    """Return the file's tensors as fp32 copies under our names.

    Raises ValueError that lists, under the file's names, every tensor that is missing, left over, or of another shape
    or dtype (fp16 and bf16 are widened, which is exact).
    """
    wanted = {theirs: shape for ours, shape in shapes.items() for theirs, shape in _pieces(ours, shape, names)}
    faults = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            faults.append(f"unknown: {name} {tuple(tensor.shape)}")
        elif tuple(tensor.shape) != wanted[name]:
            faults.append(f"shape: {name} {tuple(tensor.shape)}, expected {wanted[name]}")
        elif tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            faults.append(f"dtype: {name} {tensor.dtype}, expected torch.float32")
    if faults:
        raise ValueError(f"{source}: {len(faults)} tensors do not fit this kind of file:{listed(faults)}")
    return {
        ours: torch.cat([tensors[name].detach().float() for name in names(ours)]).reshape(shape)
        for ours, shape in shapes.items()
    }


def write_tensors(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Return copies of our tensors under the file's names and shapes. The inverse of :func:`read_tensors`."""
    tensors: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        pieces = _pieces(ours, tuple(tensor.shape), names)
        for (theirs, shape), part in zip(pieces, tensor.chunk(len(pieces)), strict=True):
            tensors[theirs] = part.reshape(shape).clone()
    return tensors


def _pieces(ours: str, shape: tuple[int, ...], names: Names) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of each tensor in the file that our parameter is made of."""
    if ours == "mask_token":
        shape = (1, 1, *shape)
    theirs = names(ours)
    if len(theirs) > 1:
        shape = (shape[0] // len(theirs), *shape[1:])
    return [(name, shape) for name in theirs]
