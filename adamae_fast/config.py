"""Every knob of a training run, one frozen dataclass per group.

``adamae-fast pretrain --help`` prints these docstrings; a YAML recipe under ``configs/`` sets any subset of the fields;
the command line overrides single fields (``--mask.ratio 0.9``). Each class checks its own values when it is built, so a
configuration that exists is a valid one. Checks that need two groups live in :class:`RunConfig` and below.
"""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import yaml

from adamae_fast.config_distributed import DistributedConfig, check_distributed
from adamae_fast.config_optim import FusedBy, OptimConfig
from adamae_fast.errors import require as _require
from adamae_fast.parser_errors import in_plain_words

if TYPE_CHECKING:
    # Only the command line and recipes need it, so the model also runs where nothing but PyTorch is installed.
    from _typeshed import DataclassInstance
    from jsonargparse import ArgumentParser, Namespace

ModelSize = Literal["pico", "nano", "small", "base", "large", "huge"]
SamplerKind = Literal["attention", "mlp"]
MaskStrategyName = Literal["adaptive", "random", "tube", "frame"]
ErrorKind = Literal["mse", "l1"]
TargetKind = Literal["normalized", "raw", "mae_st"]
DecoderName = Literal["auto", "decord", "pyav", "dali"]
CropKind = Literal["multi_scale", "random_resized", "center"]
Precision = Literal["fp32", "bf16", "fp16"]
AttentionName = Literal[
    "auto",
    "flash_attn_3",
    "flash_attn_2",
    "xformers",
    "sdpa_cudnn",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa",
    "reference",
]
Recompute = Literal["none", "pointwise", "fc1", "block"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The network that predicts which tokens should stay visible (paper section 3.1, Table 1(f))."""

    kind: SamplerKind = "attention"
    """Transformer blocks and a linear layer ("attention"), or two linear layers on each token alone ("mlp")."""

    width: int | None = None
    """Channels of the attention blocks; the encoder's if null. Another width puts a linear projection in front."""

    depth: int = 1
    """Number of attention blocks."""

    dropout: float = 0.1
    """Dropout after the attention projection and after the second MLP layer of each attention block."""

    detach_tokens: bool = False
    """Keep the sampling loss away from the tokenizer. The paper's text says so; the published checkpoints do not."""

    def __post_init__(self) -> None:
        _require(
            self.width is None or (self.width > 0 and self.width % 8 == 0),
            "model.sampler.width",
            self.width,
            "choose a positive multiple of 8 (the sampler has 8 heads), or null for the encoder's width",
        )
        _require(self.depth >= 1, "model.sampler.depth", self.depth, "choose at least 1 block")
        _require(0 <= self.dropout < 1, "model.sampler.dropout", self.dropout, "choose a share in [0, 1)")
        _require(
            self.kind == "attention" or (self.width, self.depth, self.dropout) == (None, 1, 0.1),
            "model.sampler.kind",
            self.kind,
            "width, depth and dropout belong to the attention sampler; leave them at their defaults for the mlp",
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The transformer that reconstructs masked tokens (paper section 3.1, Table 1(c))."""

    depth: int | None = None
    """Number of blocks; the size's own default (4 for base) if null. Table 1(c) compares 1, 2, 4 and 8."""

    keep_ratio: float = 1.0
    """Share of the masked tokens that training decodes and compares, chosen at random for each clip. Below 1 it is
    another algorithm than the paper's. Cost: losses, the sampler's too, become noisier (on average they are those of
    all masked tokens, given the errors), and the decoder predicts without looking at the tokens left out. Gain: 1.35
    times fewer operations in a step of base at 0.5, by calculation, not measured. In eval mode all are decoded."""

    def __post_init__(self) -> None:
        _require(
            self.depth is None or self.depth >= 1, "model.decoder.depth", self.depth, "choose at least 1 block, or null"
        )
        _require(0 < self.keep_ratio <= 1, "model.decoder.keep_ratio", self.keep_ratio, "choose a share in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which implementation computes attention in training. They differ in speed and rounding, not in what they compute.

    A name forces that one: where it cannot run, training does not start, and the message says why.
    """

    encoder: AttentionName = "auto"
    """Attention of the encoder, over the visible tokens. auto: the one preferred for this device and these sizes
    (recommended); sdpa: PyTorch's own choice among its fused kernels; sdpa_flash, sdpa_cudnn, sdpa_efficient: that one
    of them; flash_attn_2, flash_attn_3, xformers: that package, which has to be installed; reference: the plain
    formula, slow and with an N × N matrix. What each takes, and what auto prefers: docs/attention.md."""

    sampler: AttentionName = "auto"
    """Attention of the adaptive sampler, over all tokens; choices as for the encoder."""

    decoder: AttentionName = "auto"
    """Attention of the decoder, over visible and decoded tokens; choices as for the encoder."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the clip and of the network."""

    size: ModelSize = "base"
    """Width, depth and heads of encoder and decoder; the table is in ``adamae_fast/model/sizes.py``."""

    num_frames: int = 16
    """Frames of a clip."""

    frame_size: int = 224
    """Height and width of a clip's frames, in pixels."""

    tubelet_size: int = 2
    """Frames of one token."""

    patch_size: int = 16
    """Height and width of one token, in pixels."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The network that predicts which tokens stay visible."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The transformer that reconstructs masked tokens."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Which implementation computes attention in training; it changes speed and rounding, not the weights' layout."""

    layer_norm: FusedBy = "torch"
    """Whose LayerNorm trains: torch's, or the fused one of NVIDIA apex where it is installed (CUDA only). Weights are
    the same, results but for rounding. Cost: a package to build; whether there is a gain was not measured."""

    def __post_init__(self) -> None:
        for key in ("num_frames", "frame_size", "tubelet_size", "patch_size"):
            _require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "choose a positive number")
        _require(
            self.num_frames % self.tubelet_size == 0,
            "model.num_frames",
            self.num_frames,
            f"choose a multiple of model.tubelet_size={self.tubelet_size}",
        )
        _require(
            self.frame_size % self.patch_size == 0,
            "model.frame_size",
            self.frame_size,
            f"choose a multiple of model.patch_size={self.patch_size}",
        )


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which tokens the encoder sees."""

    strategy: MaskStrategyName = "adaptive"
    """adaptive: drawn from the sampler's probabilities; random: uniform over space-time; tube: the same places in all
    frames; frame: whole frames."""

    ratio: float = 0.95
    """Share of tokens that are masked. adaptive, random: int(N · (1 − ratio)) tokens stay visible; tube, frame:
    int(ratio · places) places of a frame, or int(ratio · frames) frames, are masked."""

    def __post_init__(self) -> None:
        _require(0 < self.ratio < 1, "mask.ratio", self.ratio, "choose a share strictly between 0 and 1, such as 0.95")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the decoder is asked for, and how strongly the sampler is taught (paper Table 1(d), equations 4 and 5)."""

    error: ErrorKind = "mse"
    """Squared or absolute error per pixel."""

    target: TargetKind = "normalized"
    """normalized: each token's pixels to zero mean and unit variance per colour channel; raw: pixels in [0, 1];
    mae_st: normalised over all three channels jointly, as MAE-ST does."""

    sampling_weight: float = 1e-4
    """Factor of the sampling loss in the total; only used by mask.strategy=adaptive."""

    sampling_baseline: float = 0.0
    """Share of the mean error of a clip's decoded tokens that is taken off each token's, down to 0, before the sampler
    learns from it; 0 is the paper's. More makes masks look harder at what is predicted badly; for short trainings on
    little data (docs/ablation.md). Tokens below the baseline are hardly ever visible once it has learned."""

    def __post_init__(self) -> None:
        _require(
            self.sampling_weight >= 0,
            "loss.sampling_weight",
            self.sampling_weight,
            "choose 0 (sampler untrained) or a positive factor",
        )
        _require(
            0 <= self.sampling_baseline < 1,
            "loss.sampling_baseline",
            self.sampling_baseline,
            "choose 0 (the paper's) or a share below 1, such as 0.5",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from and how they are cut."""

    manifest: str = ""
    """An annotation file (formats: ``docs/data.md``), a folder that is searched for videos, or one that data prepare
    wrote."""

    root: str | None = None
    """Folder that relative paths of the manifest start from; the manifest's own folder if null."""

    decoder: DecoderName = "auto"
    """auto: the fastest that reads everything, which is PyAV; pyav, decord: that one; dali: NVIDIA DALI decodes and
    crops on train.device, and what it cannot decode there is read as with auto. What each can read: docs/data.md."""

    stride: int = 4
    """Distance between two frames of a clip, in frames of the video."""

    crop: CropKind = "multi_scale"
    """multi_scale: VideoMAE's crop; random_resized: area in random_resized_scale; center: short side to frame_size."""

    random_resized_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the frame's area for crop=random_resized."""

    flip: bool = False
    """Mirror half of the clips left to right. Off for SSv2, whose labels name directions."""

    repeat: int = 1
    """Clips cut from each decoded video range (repeated augmentation). Each counts in train.batch_size."""

    num_workers: int = 2
    """Decoding processes; 0 decodes in the training process."""

    cache_gib: float = 0.0
    """Memory of each decoding process for whole decoded videos of training, in GiB. A set of short videos that fits is
    decoded once by each of them; what does not fit is decoded as it is needed, and validation always. Costs that
    memory, num_workers times, for as long as the process lives: a video that changes meanwhile is not read again.
    Decoding a video whole takes longer than a clip of it, which counts against data.timeout."""

    timeout: float = 60.0
    """Seconds that a worker may spend on one video. One that takes longer counts as unreadable."""

    max_bad_share: float = 0.05
    """The run stops when more than this share of the manifest's videos turned out unreadable."""

    def __post_init__(self) -> None:
        _require(self.stride >= 1, "data.stride", self.stride, "choose at least 1")
        _require(self.repeat >= 1, "data.repeat", self.repeat, "choose at least 1")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "choose 0 or more processes")
        _require(self.cache_gib >= 0, "data.cache_gib", self.cache_gib, "choose 0 (keep nothing) or a size in GiB")
        _require(self.timeout > 0, "data.timeout", self.timeout, "choose a positive number of seconds")
        _require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "choose a share in [0, 1]")
        low, high = self.random_resized_scale
        _require(
            0 < low <= high <= 1,
            "data.random_resized_scale",
            self.random_resized_scale,
            "choose 0 < low <= high <= 1",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and arithmetic of the run."""

    epochs: float = 800.0
    """Passes over the manifest; an epoch shows each video data.repeat times."""

    steps: int | None = None
    """Optimizer steps; replace epochs as the run's length where given; warm-up and cosine shrink in proportion."""

    batch_size: int = 32
    """Clips in one forward pass on one device, repeated crops counted."""

    accumulate: int = 1
    """Forward passes per optimizer step."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""

    precision: Precision = "bf16"
    """Arithmetic of matrix products; parameters and losses stay fp32. fp16 scales the loss."""

    recompute: Recompute = "none"
    """What the backward computes again instead of keeping it. Of the 16 numbers that a transformer block keeps for each
    token and channel, pointwise (LayerNorm and GELU) keeps 10, fc1 (the first MLP layer, too) 6, block (attention, too)
    2. Each saves memory and costs time, block most (docs/speed.md). Results are the same: to the last bit on the CPU,
    but for rounding on a GPU and with train.compile."""

    compile: bool = False
    """Compile the transformer blocks with torch.compile. Cost: a C++ compiler or Triton, and a wait before the first
    step; dropout draws other numbers from the same seed, and rounding differs. Gain: fused elementwise operations, in
    time and memory; not measured."""

    cuda_graph: bool = False
    """Record forward, backward, clipping and update as one CUDA graph after three steps and launch it whole from then
    on. Masks and dropout are the same, results but for rounding. Cost: memory that the graph keeps for itself, about
    what a step needs. Gain: the host has next to nothing to do in a step, which counts where it was too slow for the
    GPU; not measured."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "train.epochs", self.epochs, "choose a positive number")
        _require(self.steps is None or self.steps >= 1, "train.steps", self.steps, "choose at least 1 step, or null")
        _require(self.batch_size >= 1, "train.batch_size", self.batch_size, "choose at least 1 clip")
        _require(self.accumulate >= 1, "train.accumulate", self.accumulate, "choose at least 1")
        cannot = "train.cuda_graph=true cannot work with it"
        _require(
            not self.cuda_graph or self.accumulate == 1,
            "train.accumulate",
            self.accumulate,
            f"{cannot}: one graph is one whole step, update included, of one batch; choose 1 and a larger "
            "train.batch_size, or train.cuda_graph=false",
        )
        _require(
            not self.cuda_graph or self.precision != "fp16",
            "train.precision",
            self.precision,
            f"{cannot}: the host keeps part of the loss scaler's state, which a graph does not see; choose bf16 or "
            "fp32, or train.cuda_graph=false",
        )
        _require(
            not self.cuda_graph or self.device != "cpu",
            "train.device",
            self.device,
            f"{cannot}: a CPU has no CUDA graphs; choose cuda, or train.cuda_graph=false",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""

    keep: int = 2
    """Newest checkpoints that are kept."""

    asynchronous: bool = False
    """Go on with the next step once weights and moments are copied to host memory, and write the files meanwhile. That
    takes host memory of a checkpoint's size, divided among the processes; a run stops before the next save at the
    latest if the files could not be written."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "choose at least 1 step")
        _require(self.keep >= 2, "checkpoint.keep", self.keep, "keep at least 2, so that one broken file loses nothing")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while a run goes on."""

    every: int = 10
    """Steps between two lines of metrics.jsonl. Only these steps wait for the device."""

    tensorboard: bool = True
    """Also write the metrics as TensorBoard curves under output_dir/tensorboard."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "log.every", self.every, "choose at least 1 step")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has, whatever it trains; saved as config.yaml beside its checkpoints."""

    output_dir: str = "runs/pretrain"
    """Folder of the run."""

    seed: int = 0
    """Source of every random number of the run."""

    resume: str = "auto"
    """auto: continue from output_dir's newest checkpoint if there is one; none: start afresh in an empty output_dir;
    or the path of a checkpoint to continue from."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the clip and of the network."""

    data: DataConfig = field(default_factory=DataConfig)
    """Where clips come from and how they are cut."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its schedule."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch and arithmetic of the run."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept of a run."""

    log: LogConfig = field(default_factory=LogConfig)
    """What is written while a run goes on."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """What the processes of a run that torchrun starts share."""

    def __post_init__(self) -> None:
        check_distributed(self)
        _require(bool(self.output_dir), "output_dir", self.output_dir, "name a folder for the run")
        _require(self.seed >= 0, "seed", self.seed, "choose 0 or more")
        _require(
            self.train.batch_size % self.data.repeat == 0,
            "data.repeat",
            self.data.repeat,
            f"choose a divisor of train.batch_size={self.train.batch_size}, which counts repeated crops",
        )
        _require(
            self.optim.warmup_epochs < self.train.epochs,
            "optim.warmup_epochs",
            self.optim.warmup_epochs,
            f"choose fewer than train.epochs={self.train.epochs}",
        )
        _require(
            self.optim.implementation == "torch" or self.train.precision != "fp16",
            "optim.implementation",
            self.optim.implementation,
            "train.precision=fp16 cannot work with it: apex would divide the gradients, from which the loss scale was "
            "taken for clipping, by it once more; choose torch, or bf16 or fp32",
        )
        _require(
            self.model.layer_norm == "torch" or not self.train.compile,
            "model.layer_norm",
            self.model.layer_norm,
            "train.compile=true cannot work with it: a compiled block has a fused LayerNorm of its own, and the "
            "compiler cannot look into apex's; choose torch, or train.compile=false",
        )
        _require(
            self.model.layer_norm == "torch" or self.train.recompute == "none",
            "model.layer_norm",
            self.model.layer_norm,
            f"train.recompute={self.train.recompute} cannot work with it: what computes a LayerNorm again calls "
            "torch's; choose torch, or train.recompute=none",
        )

    def without_effect(self) -> list[str]:
        """Return a sentence for each option that was set but does nothing in this combination."""
        messages = []
        default = type(self.data)()
        if self.data.crop != "random_resized" and self.data.random_resized_scale != default.random_resized_scale:
            messages.append(f"data.random_resized_scale has no effect: data.crop={self.data.crop}")
        if self.data.num_workers == 0 and self.data.timeout != default.timeout:
            messages.append("data.timeout has no effect: data.num_workers=0 has no process that could be ended")
        if self.data.decoder == "dali" and self.data.cache_gib != default.cache_gib:
            messages.append("data.cache_gib has no effect: data.decoder=dali decodes on train.device")
        return messages


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Everything that decides a pre-training run; saved as config.yaml beside its checkpoints."""

    init_weights: str | None = None
    """Weights to start a fresh run from: a checkpoint or run folder, such as adamae-fast convert writes; random ones if
    null."""

    mask: MaskConfig = field(default_factory=MaskConfig)
    """Which tokens the encoder sees."""

    loss: LossConfig = field(default_factory=LossConfig)
    """What the decoder is asked for, and how strongly the sampler is taught."""

    def without_effect(self) -> list[str]:
        """Return a sentence for each option that was set but does nothing in this combination."""
        messages = super().without_effect()
        if self.mask.strategy != "adaptive":
            reason = f"mask.strategy={self.mask.strategy} has no sampler"
            if self.model.sampler != SamplerConfig():
                messages.append(f"model.sampler has no effect: {reason}")
            if self.model.attention.sampler != "auto":
                messages.append(f"model.attention.sampler has no effect: {reason}")
            for key in ("sampling_weight", "sampling_baseline"):
                if getattr(self.loss, key) != getattr(LossConfig(), key):
                    messages.append(f"loss.{key} has no effect: {reason}")
            if self.optim.sampler_lr_scale != 1:
                messages.append(f"optim.sampler_lr_scale has no effect: {reason}")
        elif self.loss.sampling_weight == 0:
            reason = "loss.sampling_weight=0 leaves the sampler untrained"
            if self.loss.sampling_baseline != 0:
                messages.append(f"loss.sampling_baseline has no effect: {reason}")
            if self.optim.sampler_lr_scale != 1:
                messages.append(f"optim.sampler_lr_scale has no effect: {reason}")
        if (
            self.mask.strategy == "adaptive"
            and self.model.sampler.kind == "mlp"
            and self.model.attention.sampler != "auto"
        ):
            messages.append("model.attention.sampler has no effect: model.sampler.kind=mlp has no attention")
        if self.init_weights is not None and self.resume not in ("auto", "none"):
            messages.append(f"init_weights has no effect: resume={self.resume} brings its own weights")
        return messages


RunConfigT = TypeVar("RunConfigT", bound=RunConfig)
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def add_run_arguments(parser: ArgumentParser, kind: type[DataclassInstance]) -> None:
    """Give a jsonargparse parser ``--config FILE`` and one option for each field of ``kind``."""
    parser.add_argument("--config", action="config", help="A YAML recipe; options that follow override it.")
    add_fields(parser, kind)


def add_fields(parser: ArgumentParser, kind: type[DataclassInstance]) -> None:
    """Give a jsonargparse parser one option for each field of ``kind``; its help is the text below the field."""
    from jsonargparse import set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser.add_class_arguments(kind)


def build_config(parser: ArgumentParser, namespace: Namespace, kind: type[ConfigT]) -> ConfigT:
    """Turn what ``parser`` read into the checked dataclasses. Raises ValueError for a value out of its range."""
    groups = parser.instantiate(namespace)
    return kind(**{f.name: groups[f.name] for f in fields(kind)})


def load_config(path: str | Path, overrides: Mapping[str, object] | None = None) -> PretrainConfig:
    """:func:`load_run_config` of pre-training."""
    return load_run_config(path, PretrainConfig, overrides)


def load_run_config(
    path: str | Path, kind: type[RunConfigT], overrides: Mapping[str, object] | None = None
) -> RunConfigT:
    """Read a YAML recipe and override single keys, such as ``{"train.epochs": 50}``.

    Raises ValueError that names the file, key and value for an unknown key, a wrong type or a value out of range.
    """
    if not Path(path).is_file():
        raise ValueError(f"config={str(path)!r}: no such file; recipes are in the folder configs/")
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_run_arguments(parser, kind)
    arguments = [f"--config={path}"]
    for key, value in (overrides or {}).items():
        arguments.append(f"--{key}={value if isinstance(value, str | Path) else json.dumps(value)}")
    try:
        return build_config(parser, parser.parse_args(arguments), kind)
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{path}: {in_plain_words(error)}") from error


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write every field as YAML that :func:`load_run_config` reads back to an equal object."""
    plain = json.loads(json.dumps(asdict(config)))
    Path(path).write_text(yaml.safe_dump(plain, sort_keys=False))
