"""AdamW with weight decay and learning-rate scales where the published recipes have them: torch's or apex's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamae_fast.config import OptimConfig
from adamae_fast.train.apex import build_apex_adamw

_ENCODER_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return a fused AdamW; biases, norms, the mask token and other 1-D tensors are not decayed.

    The sampler's position table (1, N, D) is decayed, as in the published code. Each group carries its ``lr_scale``:
    ``optim.sampler_lr_scale`` for the sampler, for all else that of :func:`layer_scale`. No update happens while the
    optimizer's ``found_inf``, a tensor that the caller sets, is 1.

    Raises ValueError where ``optim.implementation`` asks for apex and it cannot be used.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    depth = 1 + max((int(match[1]) for name in names if (match := _ENCODER_BLOCK.match(name))), default=-1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name in names:
        parameter = model.get_parameter(name)
        weight_decay = config.weight_decay if parameter.ndim > 1 else 0.0
        scale = config.sampler_lr_scale if name.startswith("sampler.") else layer_scale(name, depth, config.layer_decay)
        key = scale, weight_decay
        groups.setdefault(key, []).append(parameter)
    described = [{"params": ps, "lr_scale": scale, "weight_decay": decay} for (scale, decay), ps in groups.items()]
    build = build_apex_adamw if config.implementation == "apex" else _build_torch_adamw
    optimizer = build(described, config)
    for group in optimizer.param_groups:
        # A tensor, with and without a CUDA graph: a recorded step reads the rate of the day, and both round it alike.
        group["lr"] = torch.tensor(config.base_lr, dtype=torch.float32, device=group["params"][0].device)
    return optimizer


def _build_torch_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    on_cuda = groups[0]["params"][0].is_cuda  # where a step can be recorded
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.betas, fused=True, capturable=on_cuda)


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
        group["lr"].fill_(learning_rate * group["lr_scale"])


def export_state(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Return each parameter's moments and number of steps, under torch's names, whoever made the optimizer."""
    exported = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = dict(optimizer.state.get(parameter, {}))
            if state and "step" in group:  # apex counts the steps of a group
                state["step"] = group["step"].float().reshape(())
            exported[parameter] = state
    return exported


def import_state(optimizer: torch.optim.Optimizer, state: Mapping[nn.Parameter, dict[str, Tensor]]) -> None:
    """Restore what :func:`export_state` returned, of this or the other implementation."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values = {name: value.to(parameter.device) for name, value in state.get(parameter, {}).items()}
            if values and not isinstance(optimizer, torch.optim.AdamW):
                group["step"] = values.pop("step").to(torch.int32).reshape(1)
            if values:
                optimizer.state[parameter] = values
