"""Memory and time of a step on one GPU: measured where the very same was measured, else modelled, with two ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from adamae_fast.config import MaskConfig, ModelConfig, PretrainConfig, Recompute
from adamae_fast.plan import hardware, work
from adamae_fast.plan.calibration import Calibration, MeasuredStep
from adamae_fast.plan.hardware import CAUTIOUS, FAST, GIB, GPUS, Gpu
from adamae_fast.plan.options import PlanOptions
from adamae_fast.plan.shares import Parameters, passing_bytes, state_bytes

Basis = Literal["measured", "modelled", "exact"]
"""exact: arithmetic on the recipe alone."""

RESERVED_BYTES = 3 * GIB
"""Of a GPU's memory, for CUDA's context, the libraries' workspaces and the communication's buffers."""

USABLE_SHARE = 0.95
"""Of the rest; what is lost between the allocator's blocks."""

MEASURED_MODEL = (ModelConfig(), MaskConfig())
"""What ``bench.step`` measures."""


@dataclass(frozen=True)
class Range:
    """Both ends of the model; one number where it was measured."""

    fast: float
    slow: float

    def map(self, factor: float) -> Range:
        """Both times ``factor``."""
        return Range(fast=self.fast * factor, slow=self.slow * factor)

    def plus(self, other: Range) -> Range:
        """The sum."""
        return Range(fast=self.fast + other.fast, slow=self.slow + other.slow)

    def per_second(self, amount: float) -> Range:
        """How much is done in a second where ``amount`` takes this long."""
        return Range(fast=amount / self.fast, slow=amount / self.slow)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one GPU, in bytes."""

    fixed: float
    """Parameters, gradients, moments, casts."""
    per_clip: float

    def of(self, batch_size: int) -> float:
        """Allocated peak."""
        return self.fixed + batch_size * self.per_clip

    def largest_batch(self, gpu: Gpu, multiple_of: int) -> int:
        """Clips that fit; 0: none."""
        clips = (usable_bytes(gpu) - self.fixed) / self.per_clip
        return max(0, math.floor(clips / multiple_of) * multiple_of)


def usable_bytes(gpu: Gpu) -> float:
    """What a process can allocate."""
    return USABLE_SHARE * (gpu.memory - RESERVED_BYTES)


def memory_of(
    config: PretrainConfig, parameters: Parameters, num_processes: int, recompute: Recompute, rank: int = 0
) -> Memory:
    """Modelled; the first process has most. What is kept for the backward in it is what hooks count."""
    fixed = state_bytes(config, parameters, num_processes, rank) + passing_bytes(config, parameters, num_processes)
    per_clip = work.clip_bytes(config.model, config.mask, recompute)
    if config.train.cuda_graph:
        per_clip *= 2  # the graph's own pool, beside what the first steps took
    return Memory(fixed=fixed + work.kept_bytes_once(config.model, config.mask), per_clip=per_clip)


def arm_of(config: PretrainConfig) -> str:
    """The arm of ``bench.step`` that trains as the recipe does."""
    train = config.train
    return f"ours-{train.recompute}{'+compile' * train.compile}{'+graph' * train.cuda_graph}"


def is_measured_model(model: ModelConfig, mask: MaskConfig) -> bool:
    """Whether a step of it takes the same memory and time as of :data:`MEASURED_MODEL`."""
    return work.sizes_of(model, mask) == work.sizes_of(*MEASURED_MODEL)


def measured_step(calibration: Calibration, options: PlanOptions, config: PretrainConfig) -> MeasuredStep | None:
    """The measurement on this GPU that is nearest in batch size."""
    rows = [row for row in calibration.steps if (row.gpu, row.arm) == (options.gpu, arm_of(config))]
    return min(rows, key=lambda row: abs(row.batch - config.train.batch_size), default=None)


def step_times(
    calibration: Calibration, options: PlanOptions, config: PretrainConfig, num_parameters: int
) -> tuple[Range, Range, Basis, str]:
    """Seconds of one forward and backward, and of an update; the basis of the first, and how it came about."""
    gpu, recompute = GPUS[options.gpu], config.train.recompute
    sizes, usual = work.sizes_of(config.model, config.mask), work.sizes_of(*MEASURED_MODEL)

    def passes(sizes: work.Sizes, batch_size: int, assumptions: hardware.Assumptions) -> float:
        return sum(hardware.pass_parts(gpu, sizes, batch_size, recompute, assumptions).values())

    batch_size = config.train.batch_size
    one_pass = Range(fast=passes(sizes, batch_size, FAST), slow=passes(sizes, batch_size, CAUTIOUS))
    updates = (hardware.update_seconds(gpu, num_parameters, assumptions) for assumptions in (FAST, CAUTIOUS))
    update = Range(*updates)
    found = measured_step(calibration, options, config)
    if found is None:
        return one_pass, update, "modelled", "roofline: fast and cautious end"
    modelled = passes(usual, found.batch, FAST) + hardware.update_seconds(gpu, work.num_parameters(*MEASURED_MODEL))
    factor = found.seconds / modelled
    one_pass, update = (Range(fast=x.fast * factor, slow=x.fast * factor) for x in (one_pass, update))
    if is_measured_model(config.model, config.mask) and found.batch == batch_size:
        return one_pass, update, "measured", f"{found.source}, {found.arm}"
    how = f"roofline × {factor:.2f}, as {found.arm} at batch {found.batch} was measured ({found.source})"
    return one_pass, update, "modelled", how
