"""No arm is timed before it has given the loss and the gradients of our model on the reference of every operation."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from adamae_fast.model.adamae import AdaMAE
from adamae_fast.testing import prefer
from bench.arms import Arm, Gradients, Setting, initial_state, take_gradients, without_dropout

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 2e-3
"""Relative errors in fp32: of the loss, and of each part's gradient in the 2-norm."""


class Parity(ABC):
    """Compares arms with our model on the reference of every operation, in fp32; its attention is what "auto" takes."""

    compared: tuple[str, ...]
    """Groups of parameters whose gradients are compared, each on its own."""

    visible_ids: Tensor | None = None
    """The mask that all arms are given; None where there is none."""

    def __init__(self, setting: Setting) -> None:
        with prefer("reference"), _exact_products():
            self._loss, self._gradients = self.reference(setting)

    @abstractmethod
    def reference(self, setting: Setting) -> tuple[float, Gradients]:
        """The truth: loss and gradients at the weights that all arms start from."""

    def fault(self, arm: Arm) -> str | None:
        """What is wrong with an arm that still has its first weights; None: nothing."""
        with _exact_products():
            loss, gradients = arm.loss_and_gradients(self.visible_ids)
        error = abs(loss - self._loss) / abs(self._loss)
        if not error <= LOSS_TOLERANCE:
            return f"the loss is off by {error:.1e}, allowed is {LOSS_TOLERANCE:.0e}"
        for group in self.compared:
            names = [name for name in self._gradients if name.startswith(group)]
            if any(name not in gradients for name in names):
                return f"no gradient of {', '.join(name for name in names if name not in gradients)}"
            if not names:
                continue
            truth = torch.cat([self._gradients[name].flatten().double() for name in names])
            actual = torch.cat([gradients[name].flatten().double() for name in names])
            error = float((actual - truth).norm() / truth.norm())
            if not error <= GRADIENT_TOLERANCE:
                return f"the gradient of {group} is off by {error:.1e}, allowed is {GRADIENT_TOLERANCE:.0e}"
        return None


class PretrainParity(Parity):
    """Of pre-training: the mask is drawn once, and given to all."""

    compared = ("tokenizer.weight", "sampler.", "encoder.", "projection.weight", "mask_token", "decoder.")

    def reference(self, setting: Setting) -> tuple[float, Gradients]:
        """As :class:`Parity` says."""
        with setting.device:
            model = AdaMAE(setting.model, setting.mask)
        model.load_state_dict(initial_state(setting))
        seeds_B = torch.arange(setting.batch_size, device=setting.device)
        video = setting.draw_video()
        with without_dropout(model):
            with torch.no_grad():
                self.visible_ids = model.eval()(video, seeds=seeds_B).visible_ids
            loss = model.train()(video, visible_ids=self.visible_ids).loss
            loss.backward()
        return loss.item(), take_gradients(model)


def _exact_products() -> contextlib.AbstractContextManager[object]:
    """fp32 means fp32: cuDNN would convolve in TF32. (Matrix products are exact by torch's default.)"""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
