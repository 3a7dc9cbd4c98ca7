"""One optimizer step: forward and backward of each micro-batch, clip, check, update; no wait for the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adamae_fast.config import PretrainConfig
from adamae_fast.device import arithmetic
from adamae_fast.model.adamae import AdaMAE, AdaMAEOutput
from adamae_fast.ops.sample_visible import NonFiniteLogitsError
from adamae_fast.train.finite import FiniteGuard, NonFiniteError, non_finite
from adamae_fast.train.optim import build_optimizer, set_learning_rate

FIGURES = ("loss", "loss_reconstruction", "loss_sampling", "probability_entropy", "probability_max")
"""What a forward pass reports, in this order; averaged over the micro-batches of a step."""


class Stepper:
    """The model with its optimizer and loss scaler.

    Every random number of a step (masks, dropout) follows from (seed, step): a resumed run needs no other state.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self._config = config
        self.device = device
        torch.manual_seed(config.seed)
        self.model = AdaMAE(config.model, config.mask, config.loss).to(device).train()
        self.model.set_recompute(config.train.recompute)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self.guard = FiniteGuard((*FIGURES, "grad_norm"), device)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._figures = torch.zeros(len(FIGURES), device=device)
        self._step = self._num_clips = 0
        self._grad_norm = torch.zeros((), device=device)

    def begin(self, step: int, learning_rate: float) -> None:
        """Prepare for step ``step``: its learning rate and its own stream of random numbers."""
        set_learning_rate(self.optimizer, learning_rate)
        torch.manual_seed(step_seed(self._config.seed, step))
        self._step, self._num_clips = step, 0
        self._figures = torch.zeros_like(self._figures)

    def accumulate(self, video_BCTHW: Tensor) -> None:
        """Forward and backward of one micro-batch of uint8 clips; gradients add up over ``train.accumulate`` calls."""
        video_BCTHW = video_BCTHW.to(self.device, non_blocking=True)
        share = 1 / self._config.train.accumulate
        seeds_B = mask_seeds(self._config.seed, self._step, self._num_clips, video_BCTHW.shape[0])
        self._num_clips += video_BCTHW.shape[0]
        try:
            with arithmetic(self.device, self._config.train.precision):
                output = self.model(video_BCTHW, seeds=seeds_B.to(self.device, non_blocking=True))
        except NonFiniteLogitsError as error:
            raise non_finite(self._step, str(error)) from error
        self.scaler.scale(output.loss * share).backward()
        self._figures = self._figures + share * describe_output(output)

    def finish(self, step: int) -> None:
        """Clip, check, update. From the first non-finite value on, the parameters are left as they are."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self.scaler.is_enabled():
            # Infinite gradients are fp16's normal way to find its scale, and the scaler skips such a step by itself.
            # A loss that is not finite is a fault: a poisoned gradient makes the scaler skip this and all later steps.
            self.guard.observe(step, torch.cat((self._figures, torch.zeros_like(self._grad_norm)[None])))
            smallest = min(gradients, key=Tensor.numel)
            smallest.add_(torch.where(self.guard.found_inf() > 0, float("inf"), 0.0).to(smallest.dtype))
            self.scaler.unscale_(self.optimizer)
        self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        limit = self._config.optim.clip_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, self._grad_norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.guard.observe(step, torch.cat((self._figures, self._grad_norm[None])))
            self.optimizer.found_inf = self.guard.found_inf()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self) -> None:
        """Wait for the device; raise NonFiniteError if a step so far was bad, or if fp16 finds no scale that works."""
        self.guard.check()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise NonFiniteError(
                f"train.precision='fp16': gradients overflow even at a loss scale of {self.scaler.get_scale():g}: "
                "no step updates the parameters; use bf16, lower optim.base_lr or set optim.clip_grad_norm"
            )

    def read_figures(self) -> dict[str, float]:
        """Wait for the device; return the last step's figures. Raises as :meth:`check` does."""
        self.check()
        figures = dict(zip(FIGURES, self._figures.tolist(), strict=True))
        figures["grad_norm"] = float(self._grad_norm)
        if self.scaler.is_enabled():
            figures["loss_scale"] = self.scaler.get_scale()
        return figures


def step_seed(seed: int, step: int) -> int:
    """Return a 32-bit seed of one step, all that torch's CPU generator takes in; a hash, so that every bit counts."""
    return int(np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1)[0])


def mask_seeds(seed: int, step: int, first_clip: int, num_clips: int) -> Tensor:
    """Return int64 seeds for the masks of clips ``first_clip`` … of one step, however it is cut into batches."""
    state = np.random.SeedSequence(seed, spawn_key=(step, 0)).generate_state(first_clip + num_clips, np.uint64)
    return torch.from_numpy(state[first_clip:].view(np.int64))


@torch.no_grad()
def describe_output(output: AdaMAEOutput) -> Tensor:
    """Return FIGURES of one forward pass as a tensor on its device; zeros where there is no sampler."""
    entropy = largest_p = torch.zeros_like(output.loss)
    if output.logit_statistics is not None:
        largest_B, log_sum_exp_B, entropy_B = output.logit_statistics.unbind(1)
        # A logit of minus infinity leaves all losses finite; the entropy does not stay finite.
        entropy, largest_p = entropy_B.mean(), (largest_B - log_sum_exp_B).exp().mean()
    losses = (output.loss, output.loss_reconstruction, output.loss_sampling)
    return torch.stack([figure.detach().float() for figure in (*losses, entropy, largest_p)])
