"""The rows of the paper's Table 1, as configurations: what ``bench.memory`` and ``bench.ablation`` go through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adamae_fast.config import DecoderConfig, LossConfig, MaskConfig, ModelConfig, SamplerConfig


@dataclass(frozen=True)
class Case:
    """One row."""

    part: str
    name: str
    paper_top1: float
    """What the paper reports on SSv2 after fine-tuning, in per cent."""
    paper_gib: float | None = None
    """What it reports for 16 clips on one GPU; None where it says nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    share: float = 1.0
    """Of the paper's 800 epochs of pre-training."""
    sampler_lr_scale: float = 1.0


def _mask(strategy: Any, ratio: float) -> MaskConfig:
    return MaskConfig(strategy=strategy, ratio=ratio)


def _depth(depth: int) -> ModelConfig:
    return ModelConfig(decoder=DecoderConfig(depth=depth))


def _sampler(**options: Any) -> ModelConfig:
    return ModelConfig(sampler=SamplerConfig(**options))


CASES = (
    Case("(a) masking", "tube 75 %", 67.3, 16.2, mask=_mask("tube", 0.75)),
    Case("(a) masking", "tube 90 %", 69.3, 14.7, mask=_mask("tube", 0.9)),
    Case("(a) masking", "random 75 %", 67.9, 16.2, mask=_mask("random", 0.75)),
    Case("(a) masking", "random 90 %", 68.3, 14.7, mask=_mask("random", 0.9)),
    Case("(a) masking", "frame 87.5 %", 61.5, 12.8, mask=_mask("frame", 0.875)),
    Case("(a) masking", "adaptive 95 %", 70.04, 14.4),
    Case("(b) ratio", "0.98", 68.85, 14.1, mask=_mask("adaptive", 0.98)),
    Case("(b) ratio", "0.95", 70.04, 14.4),
    Case("(b) ratio", "0.90", 69.55, 15.1, mask=_mask("adaptive", 0.9)),
    Case("(b) ratio", "0.85", 68.06, 15.9, mask=_mask("adaptive", 0.85)),
    Case("(b) ratio", "0.80", 66.96, 16.9, mask=_mask("adaptive", 0.8)),
    Case("(c) decoder", "1 block", 68.86, 9.2, _depth(1)),
    Case("(c) decoder", "2 blocks", 69.13, 11.0, _depth(2)),
    Case("(c) decoder", "4 blocks", 70.04, 14.4),
    Case("(c) decoder", "8 blocks", 69.97, 21.3, _depth(8)),
    Case("(d) loss", "L1, normalised", 69.12, loss=LossConfig(error="l1")),
    Case("(d) loss", "L1, raw pixels", 68.75, loss=LossConfig(error="l1", target="raw")),
    Case("(d) loss", "MSE, normalised", 70.04),
    Case("(d) loss", "MSE, raw pixels", 68.87, loss=LossConfig(target="raw")),
    Case("(e) length", "1/4 (200 epochs)", 66.42, share=0.25),
    Case("(e) length", "5/8 (500 epochs)", 69.20, share=0.625),
    Case("(e) length", "3/4 (600 epochs)", 69.47, share=0.75),
    Case("(e) length", "1 (800 epochs)", 70.04),
    Case("(f) sampler", "MLP", 65.41, 11.8, _sampler(kind="mlp")),
    Case("(f) sampler", "1 × 384", 69.56, 14.0, _sampler(width=384)),
    Case("(f) sampler", "1 × 768", 70.04, 14.4),
    Case("(f) sampler", "2 × 384", 70.03, 17.1, _sampler(width=384, depth=2)),
)
"""Of ViT-B; the paper's default stands in every part."""
