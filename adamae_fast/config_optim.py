"""Knobs of the optimizer and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adamae_fast.errors import require

FusedBy = Literal["torch", "apex"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule (paper Table 5)."""

    base_lr: float = 1.5e-4
    """Peak learning rate for a total batch of 256 clips; scaled linearly with the total batch."""

    min_lr: float = 1e-5
    """Learning rate at the end of the cosine, for a total batch of 256; scaled likewise."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""

    weight_decay: float = 0.05
    """Decoupled decay; not applied to biases, norms, other 1-D tensors and the mask token."""

    layer_decay: float = 1.0
    """Factor on the learning rate for each encoder block towards the input; 1 for one rate everywhere. Below 1 the
    early layers of a model that continues on other data change less."""

    sampler_lr_scale: float = 1.0
    """Factor on the learning rate for the sampler; 1 is the paper's. As long as gradients are well above its
    eps, AdamW takes steps of one size whatever loss.sampling_weight is: this is what makes the sampler learn faster or
    slower than the rest. The tokenizer, which the sampling loss also teaches, keeps its own rate."""

    warmup_epochs: float = 40.0
    """Length of the linear warm-up from 0. With train.steps it keeps its share of the run."""

    clip_grad_norm: float | None = None
    """Largest allowed 2-norm of all gradients together; null for no clipping."""

    implementation: FusedBy = "torch"
    """torch's fused AdamW, or the FusedAdam of NVIDIA apex where it is installed (CUDA only). They differ in rounding,
    and continue each other's checkpoints. Cost: a package to build; whether there is a gain was not measured."""

    def __post_init__(self) -> None:
        require(self.base_lr > 0, "optim.base_lr", self.base_lr, "choose a positive learning rate")
        require(0 <= self.min_lr <= self.base_lr, "optim.min_lr", self.min_lr, f"choose 0 to base_lr={self.base_lr}")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "choose 0 or more")
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "choose a factor in (0, 1]")
        require(
            self.sampler_lr_scale > 0,
            "optim.sampler_lr_scale",
            self.sampler_lr_scale,
            "choose a positive factor; loss.sampling_weight=0 leaves the sampler untrained",
        )
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "choose 0 or more epochs")
        require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "optim.clip_grad_norm",
            self.clip_grad_norm,
            "choose a positive norm, or null for no clipping",
        )
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "choose two numbers in [0, 1)")
