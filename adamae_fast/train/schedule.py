"""How long a run is, and the learning rate of each of its steps (paper Tables 5 and 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adamae_fast.config import RunConfig

REFERENCE_BATCH = 256
"""Learning rates are stated for this total batch and scaled linearly."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and learning rates of one run, derived from the configuration and the number of videos."""

    total_batch: int
    """Clips per optimizer step: batch size × accumulation × processes, repeated crops counted."""

    steps_per_epoch: float
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float

    @classmethod
    def from_config(cls, config: RunConfig, num_videos: int, num_processes: int = 1) -> Schedule:
        """Derive the run's length. Warm-up keeps its share of the run when train.steps replaces train.epochs."""
        train, optim = config.train, config.optim
        total_batch = train.batch_size * train.accumulate * num_processes
        steps_per_epoch = num_videos * config.data.repeat / total_batch
        total_steps = train.steps or math.ceil(train.epochs * steps_per_epoch)
        lr_scale = total_batch / REFERENCE_BATCH
        return cls(
            total_batch=total_batch,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            warmup_steps=round(total_steps * optim.warmup_epochs / train.epochs),
            peak_lr=optim.base_lr * lr_scale,
            min_lr=optim.min_lr * lr_scale,
        )

    def learning_rate(self, step: int) -> float:
        """Return the rate of step ``step`` in 0 … total_steps − 1: linear from 0 to the peak, then half a cosine.

        The last step exists for every length: the rate is computed, not looked up.
        """
        if step < self.warmup_steps:
            return self.peak_lr * step / max(1, self.warmup_steps - 1)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + 0.5 * (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * progress))

    def ends_epoch(self, step: int) -> bool:
        """Whether ``step`` steps done are the first to complete an epoch, or the whole run."""
        clips_per_epoch = round(self.steps_per_epoch * self.total_batch)  # whole numbers: exact for every length
        before, after = ((s * self.total_batch) // clips_per_epoch for s in (step - 1, step))
        return step > 0 and (after > before or step == self.total_steps)

    def describe(self) -> list[tuple[str, str]]:
        """Facts for the user: the total batch and the scaled rates, which peers' users were confused by."""
        epochs = self.total_steps / self.steps_per_epoch
        return [
            ("steps", f"{self.total_steps} = {epochs:.4g} epochs of {self.steps_per_epoch:.4g} steps"),
            (
                "batch",
                f"{self.total_batch} clips a step (batch size × accumulation × processes, repeated crops counted)",
            ),
            (
                "learning rate",
                f"{self.peak_lr:.3g} at the peak (base × {self.total_batch}/{REFERENCE_BATCH}) "
                f"after {self.warmup_steps} steps of warm-up",
            ),
        ]
