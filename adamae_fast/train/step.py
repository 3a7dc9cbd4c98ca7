"""One optimizer step: forward and backward of each micro-batch, clip, check, update; no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_fast.config import PretrainConfig
from adamae_fast.device import arithmetic
from adamae_fast.model.adamae import AdaMAE, AdaMAEOutput
from adamae_fast.train.finite import FiniteGuard
from adamae_fast.train.optim import build_optimizer, set_learning_rate

FIGURES = ("loss", "loss_reconstruction", "loss_sampling", "probability_entropy", "probability_max", "logit_range")
"""What a forward pass reports, in this order; averaged over the micro-batches of a step."""


class Stepper:
    """The model with its optimizer, loss scaler and random numbers."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.model = AdaMAE(config.model, config.mask, config.loss).to(device).train()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self.guard = FiniteGuard((*FIGURES, "grad_norm"), device)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._mask_noise = torch.Generator(device)
        self._figures = torch.zeros(len(FIGURES), device=device)
        self._grad_norm = torch.zeros((), device=device)

    def begin(self, step: int, learning_rate: float) -> None:
        """Prepare for step ``step``: its learning rate and its own stream of masking noise."""
        set_learning_rate(self.optimizer, learning_rate)
        self._mask_noise.manual_seed((self._config.seed << 40) + step)
        self._figures = torch.zeros_like(self._figures)

    def accumulate(self, video_BCTHW: Tensor) -> None:
        """Forward and backward of one micro-batch of uint8 clips; gradients add up over ``train.accumulate`` calls."""
        video_BCTHW = video_BCTHW.to(self._device, non_blocking=True)
        share = 1 / self._config.train.accumulate
        with arithmetic(self._device, self._config.train.precision):
            output = self.model(video_BCTHW, generator=self._mask_noise)
        self.scaler.scale(output.loss * share).backward()
        self._figures = self._figures + share * describe_output(output)

    def finish(self, step: int) -> None:
        """Clip, check, update. A step with a non-finite value leaves the parameters untouched."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        limit = self._config.optim.clip_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, self._grad_norm)
        if self.scaler.is_enabled():
            # Infinite gradients are fp16's normal way to find its scale: the scaler skips such a step by itself.
            self.guard.observe(step, torch.cat((self._figures, torch.zeros_like(self._grad_norm)[None])))
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.guard.observe(step, torch.cat((self._figures, self._grad_norm[None])))
            self.optimizer.found_inf = self.guard.found_inf()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def read_figures(self) -> dict[str, float]:
        """Wait for the device; return the last step's figures. Raises NonFiniteError if any step so far was bad."""
        self.guard.check()
        figures = dict(zip(FIGURES, self._figures.tolist(), strict=True))
        figures["grad_norm"] = float(self._grad_norm)
        return figures


@torch.no_grad()
def describe_output(output: AdaMAEOutput) -> Tensor:
    """Return FIGURES of one forward pass as a tensor on its device; zeros where there is no sampler."""
    entropy = largest = logit_range = torch.zeros_like(output.loss)
    if output.logits is not None:
        log_p_BN = torch.log_softmax(output.logits, dim=-1)
        entropy = -(log_p_BN.exp() * log_p_BN).sum(-1).mean()
        largest = log_p_BN.max(-1).values.exp().mean()
        # A logit of minus infinity leaves all losses finite; the range of the logits does not stay finite.
        logit_range = output.logits.amax() - output.logits.amin()
    losses = (output.loss, output.loss_reconstruction, output.loss_sampling)
    return torch.stack([figure.detach().float() for figure in (*losses, entropy, largest, logit_range)])
