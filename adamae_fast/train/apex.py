"""The fused AdamW and LayerNorm of NVIDIA apex, for those who have it; nothing needs it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from adamae_fast.config import OptimConfig

_OPTIMIZER = ("apex.optimizers", "FusedAdam", "amp_C")
_LAYER_NORM = ("apex.normalization", "FusedLayerNorm", "fused_layer_norm_cuda")


def reason_missing(module: str, name: str, extension: str) -> str | None:
    """Why ``name`` of apex, which computes with ``extension``, cannot be used; None if it can."""
    try:
        getattr(importlib.import_module(module), name)
        importlib.import_module(extension)  # apex that was built without it imports, and fails when it is used
    except Exception as error:  # a broken binary raises anything
        return f"{type(error).__name__}: {error}"
    return None


def reason_no_cuda(parameter: Tensor) -> str | None:
    """Why apex cannot compute with ``parameter``; None if it can."""
    on_cuda = parameter.device.type == "cuda"
    return None if on_cuda else f"it computes on CUDA devices, and the run on {parameter.device}"


def missing_parts() -> dict[str, str]:
    """Return why FusedAdam and FusedLayerNorm cannot be used, for each that cannot."""
    no_cuda = None if torch.cuda.is_available() else "it computes on CUDA devices, and torch finds none"
    reasons = {part[1]: reason_missing(*part) or no_cuda for part in (_OPTIMIZER, _LAYER_NORM)}
    return {name: reason for name, reason in reasons.items() if reason}


def _load(part: tuple[str, str, str], key: str, parameter: Tensor) -> Any:
    reason = reason_missing(*part) or reason_no_cuda(parameter)
    if reason:
        raise ValueError(
            f"{key}='apex' cannot be used ({reason}); install NVIDIA apex with its CUDA extensions, "
            f"https://github.com/NVIDIA/apex, or choose {key}=torch"
        )
    return getattr(importlib.import_module(part[0]), part[1])


class _FoundInf:
    """Tells FusedAdam whether to leave a step out, in the way of the loss scaler that it expects."""

    def __init__(self, found_inf: Tensor) -> None:
        self._found_inf = found_inf.reshape(1)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self._found_inf.device: self._found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self._found_inf)


def build_apex_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Return apex's FusedAdam as AdamW. It heeds ``found_inf`` as torch's fused AdamW does, and never waits.

    Raises ValueError where it cannot be used.
    """
    fused_adam = _load(_OPTIMIZER, "optim.implementation", groups[0]["params"][0])

    class ApexAdamW(fused_adam):  # type: ignore[misc, valid-type]
        def step(self) -> None:
            super().step(grad_scaler=_FoundInf(self.found_inf))

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

    # capturable: rate, number of steps and found_inf are read on the device.
    optimizer: torch.optim.Optimizer = ApexAdamW(
        groups, lr=config.base_lr, betas=config.betas, adam_w_mode=True, capturable=True
    )
    return optimizer


def use_apex_layer_norm(model: nn.Module) -> None:
    """Replace each LayerNorm below ``model`` by apex's fused one with the same weights, under the same names.

    Raises ValueError where it cannot be used.
    """
    fused_layer_norm = _load(_LAYER_NORM, "model.layer_norm", next(model.parameters()))
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.LayerNorm):
                fused = fused_layer_norm(norm.normalized_shape, eps=norm.eps)
                fused.weight, fused.bias = norm.weight, norm.bias
                setattr(parent, name, fused)
