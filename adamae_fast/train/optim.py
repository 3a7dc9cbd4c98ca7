"""AdamW with weight decay and learning-rate scales where the published recipes have them."""

from __future__ import annotations

import re

import torch
from torch import nn

from adamae_fast.config import OptimConfig

_ENCODER_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return torch's fused AdamW; biases, norms, the mask token and other 1-D tensors are not decayed.

    The sampler's position table (1, N, D) is decayed, as in the published code. Each group carries the ``lr_scale`` of
    :func:`layer_scale`.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    depth = 1 + max((int(match[1]) for name in names if (match := _ENCODER_BLOCK.match(name))), default=-1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name in names:
        parameter = model.get_parameter(name)
        weight_decay = config.weight_decay if parameter.ndim > 1 else 0.0
        key = layer_scale(name, depth, config.layer_decay), weight_decay
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr_scale": scale, "weight_decay": decay} for (scale, decay), group in groups.items()],
        lr=config.base_lr,
        betas=config.betas,
        fused=True,
    )


def layer_scale(name: str, depth: int, layer_decay: float) -> float:
    """Return decay^(L + 1 − i) for a parameter of a model with L = ``depth`` encoder blocks.

    i is 0 for the tokenizer, k + 1 for encoder block k, and L + 1 for all the rest, which keeps the full rate.
    """
    block = _ENCODER_BLOCK.match(name)
    layer = 0 if name.startswith("tokenizer.") else int(block[1]) + 1 if block else depth + 1
    return layer_decay ** (depth + 1 - layer)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
