"""The step of fine-tuning: augment, classify, compare with soft labels; and the moving average of the weights.

Shapes: B clips, C channels, T frames, H, W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from adamae_fast.config_finetune import FinetuneConfig
from adamae_fast.data.augment import Augment
from adamae_fast.data.labelled import LabelledBatch
from adamae_fast.device import upload
from adamae_fast.distributed.parallelize import whole_weights
from adamae_fast.distributed.world import World
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.ops.patchify import IMAGENET_MEAN, IMAGENET_STD
from adamae_fast.train.step import ALONE, BaseStepper

FIGURES = ("loss",)
"""What a forward pass of fine-tuning reports; averaged over the micro-batches of a step."""


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Mean over clips of ``- Σ_k target_k · log softmax(logits)_k``, a scalar; computed in fp32 whatever comes in."""
    return -(targets_BK.float() * F.log_softmax(logits_BK.float(), dim=1)).sum(1).mean()


def build_classifier(config: FinetuneConfig, num_classes: int) -> VideoClassifier:
    """Return the classifier that a run starts with, its first values drawn from the run's seed."""
    torch.manual_seed(config.seed)
    return VideoClassifier(config.model, num_classes, drop_path=config.classifier.drop_path)


class FinetuneStepper(BaseStepper[VideoClassifier]):
    """The step of fine-tuning.

    With ``train.ema_decay`` = d, ``averaged`` holds a moving average of the weights, under their names, which starts as
    the weights and becomes d · average + (1 - d) · weights after each step.
    """

    def __init__(self, config: FinetuneConfig, num_classes: int, device: torch.device, world: World = ALONE) -> None:
        super().__init__(config, device, build_classifier(config, num_classes), FIGURES, world)
        self._augment = Augment(
            config.augment, num_classes, config.seed, pixel_mean=IMAGENET_MEAN, pixel_std=IMAGENET_STD
        )
        self._ema_decay = config.train.ema_decay
        if self._ema_decay is not None:
            self.averaged = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if self.graph is not None:
            shape_B = (config.train.batch_size,)
            shape_BCTHW = (*shape_B, *self.model.grid.video_shape)
            self._video_BCTHW = torch.zeros(shape_BCTHW, dtype=torch.uint8, device=device)
            self._targets_BK = torch.zeros((*shape_B, num_classes), device=device)

    def take(self, batch: LabelledBatch) -> None:
        """:meth:`accumulate` of a batch of the loader."""
        self.accumulate(batch.video, batch.labels)

    def accumulate(self, video_BCTHW: Tensor, labels_B: Tensor) -> None:
        """Forward and backward of one micro-batch of uint8 clips; gradients add up over ``train.accumulate`` calls."""
        # Among all of the run, on all processes.
        number = self._step * self._config.train.accumulate * self._world.size + self._place
        self._run_or_keep(*self._augment(self._upload_clips(video_BCTHW), upload(labels_B, self.device), number))

    def finish(self, step: int) -> None:
        """Clip, check, update, average. From the first non-finite value on, the parameters are left as they are."""
        super().finish(step)
        if self.averaged is not None and self._ema_decay is not None:
            averages = [self.averaged[name] for name, _ in self.model.named_parameters()]
            torch._foreach_lerp_(averages, [p.detach() for p in self.model.parameters()], 1 - self._ema_decay)

    def restart_average(self) -> None:
        """Let the average be the weights: where a run begins with those of another."""
        for name, average in (self.averaged or {}).items():
            average.copy_(self.model.get_parameter(name).detach())

    @contextmanager
    def validated_model(self) -> Iterator[VideoClassifier]:
        """The model in eval mode, with the averaged weights if there are any; afterwards all is as before."""
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()} if self.averaged else {}
        self._copy_weights(self.averaged or {})
        self.model.eval()
        try:
            # Other shapes than the training's: not worth another compilation.
            with torch.compiler.set_stance("force_eager"), whole_weights(self.model):
                yield self.model
        finally:
            self.model.train()
            self._copy_weights(weights)

    def _copy_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.model.get_parameter(name).copy_(value)

    def _kept(self) -> tuple[Tensor, ...]:
        return self._video_BCTHW, self._targets_BK

    def _forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        video_BCTHW, targets_BK = inputs
        loss = soft_cross_entropy(self.network(video_BCTHW), targets_BK)
        return loss, loss.detach()[None]
