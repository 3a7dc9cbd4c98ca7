"""One optimizer step: forward and backward of each micro-batch, clip, check, update; no wait for the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adamae_fast.config import PretrainConfig, RunConfig
from adamae_fast.config_distributed import check_world
from adamae_fast.data.batch import Batch
from adamae_fast.device import Uploader, arithmetic, product_dtype, upload
from adamae_fast.distributed.parallelize import load_whole, only_last_syncs, parallelize, whole
from adamae_fast.distributed.world import World
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.ops.sample_visible import NonFiniteLogitsError
from adamae_fast.train.apex import use_apex_layer_norm
from adamae_fast.train.compile import compile_blocks
from adamae_fast.train.finite import FiniteGuard, NonFiniteError, non_finite
from adamae_fast.train.metrics import Stopwatch
from adamae_fast.train.optim import build_optimizer, set_learning_rate
from adamae_fast.train.sampler_figures import describe_output, figure_names
from adamae_fast.train.step_graph import StepGraph

ALONE = World()

ModelT = TypeVar("ModelT", AdaMAE, VideoClassifier)


class BaseStepper(ABC, Generic[ModelT]):
    """A model with its optimizer and loss scaler; a class below says what is computed of a micro-batch.

    Every random number of a step (masks, dropout, augmentation) follows from the seed, the step and the place of its
    micro-batch or clip in it: a resumed run needs no other state, and micro-batches give the same, whether one process
    takes them one after another or several at a time.

    What a step reads and writes stays at its place in memory, so that with ``train.cuda_graph`` the same step can be
    recorded: then :meth:`_run_or_keep` brings a micro-batch, and :meth:`finish` runs forward, backward and update at
    once.

    Args:
        config: of the run.
        device: where it computes.
        model: freshly built; it is moved to the device.
        figures: names of what a forward pass reports, "loss" first; averaged over the processes, too.
        world: the processes that share each step.

    Raises ValueError where the device or the installed packages cannot do what the configuration asks for.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, model: ModelT, figures: tuple[str, ...], world: World
    ) -> None:
        check_world(config, world.size)
        self._config = config
        self._world = world
        self.device = device
        self._upload_clips = Uploader(device)
        self.model: ModelT = model.to(device).train()
        self.model.set_recompute(config.train.recompute)
        product = product_dtype(config.train.precision)
        self.attention_backends: dict[str, str] = self.model.attention_backends(device, product)
        if config.model.layer_norm == "apex":
            use_apex_layer_norm(self.model)
        if config.train.compile:
            compile_blocks(self.model)
        # After it, not before: what is shared among processes is a model that recomputes and is compiled.
        self.network = parallelize(self.model, config.distributed, world, device, config.train.precision)
        """What is called in training: the model, or what shares it among processes."""
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self.guard = FiniteGuard((*figures, "grad_norm"), device, world, num_common=1 if world.size > 1 else 0)
        self.forward_time = Stopwatch(device)
        """What this process takes for its share before it waits for the others'; measured where there are others."""
        self._figure_names = figures
        self._parameters: list[nn.Parameter] = [p for p in self.model.parameters() if p.requires_grad]
        self._figures = torch.zeros(len(figures), device=device)
        self._last_figures = torch.zeros(len(figures), device=device)  # of a whole step: a later one may be left out
        self._grad_norm = torch.zeros((), device=device)
        self._step = self._num_batches = 0
        self.averaged: dict[str, Tensor] | None = None
        """A moving average of the weights by their names; None where none is kept."""
        self._step_on_device = torch.zeros((), dtype=torch.int64, device=device)
        self.graph: StepGraph | None = None
        if config.train.cuda_graph:
            self.graph = StepGraph(self._run_recorded, device)

    @abstractmethod
    def take(self, batch: Any) -> None:
        """Forward and backward of one batch of the loader; gradients add up over ``train.accumulate`` calls."""

    @abstractmethod
    def _kept(self) -> tuple[Tensor, ...]:
        """The tensors that a recorded step reads its micro-batch from."""

    @abstractmethod
    def _forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and its figures, which are constants."""

    def begin(self, step: int, learning_rate: float) -> None:
        """Prepare for step ``step``, and set its learning rate."""
        set_learning_rate(self.optimizer, learning_rate)
        self._step, self._num_batches = step, 0
        self._figures.zero_()

    @property
    def _place(self) -> int:
        """Number of the next micro-batch among those of the step on all processes."""
        return self._num_batches * self._world.size + self._world.rank

    def finish(self, step: int) -> None:
        """Clip, check, update. From the first non-finite value on, the parameters are left as they are."""
        self._step_on_device.fill_(step)
        if self.graph is None:
            self._update()
        else:
            self.graph()

    def _run_or_keep(self, *inputs: Tensor) -> None:
        """Forward and backward of a micro-batch, now or when the recorded step runs, with random numbers of its own."""
        torch.manual_seed(micro_batch_seed(self._config.seed, self._step, self._place))
        self._num_batches += 1
        if self.graph is None:
            self._forward_backward(*inputs)
            return
        for kept, value in zip(self._kept(), inputs, strict=True):
            assert value.shape == kept.shape  # copy_ would repeat a single clip
            kept.copy_(value)

    def _run_recorded(self) -> None:
        self._forward_backward(*self._kept())
        self._update()

    def _forward_backward(self, *inputs: Tensor) -> None:
        share = 1 / self._config.train.accumulate
        with only_last_syncs(self.network, self._num_batches == self._config.train.accumulate):
            timed = self.forward_time if self._world.size > 1 else nullcontext()
            with timed, arithmetic(self.device, self._config.train.precision):
                loss, figures = self._forward(*inputs)
            self.scaler.scale(loss * share).backward()
        self._figures.add_(share * figures)

    def _update(self) -> None:
        own_figures = self._figures.clone() if self._world.size > 1 else self._figures
        self._world.average(self._figures)
        if self.scaler.is_enabled():
            # Infinite gradients are fp16's normal way to find its scale, and the scaler skips such a step by itself.
            # A loss that is not finite is a fault: a poisoned gradient makes the scaler skip this and all later steps.
            no_norm = torch.zeros_like(self._grad_norm)
            self._observe(own_figures, no_norm)
            smallest = min((p.grad for p in self._parameters if p.grad is not None), key=Tensor.numel)
            smallest.add_(torch.where(self.guard.found_inf() > 0, float("inf"), 0.0).to(smallest.dtype))
            self.scaler.unscale_(self.optimizer)
        self._last_figures.copy_(self._figures)
        self._measure_gradients()
        limit = self._config.optim.clip_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, self._grad_norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self._observe(own_figures, self._grad_norm)
            self.optimizer.found_inf = self.guard.found_inf()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _measure_gradients(self) -> None:
        """Keep the norm of the step's gradients, which are unscaled and not clipped yet."""
        self._grad_norm.copy_(gradient_norm(self._parameters))

    def _observe(self, own_figures: Tensor, norm: Tensor) -> None:
        own = torch.cat((own_figures, norm[None]))
        values = torch.cat((self._figures, norm[None])) if self._world.size > 1 else own
        self.guard.observe(self._step_on_device, values, own)

    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the model's weights by whole ones, of which each process takes its share."""
        load_whole(self.model, weights, self._world)

    def check(self) -> None:
        """Wait for the device; raise NonFiniteError if a step so far was bad, or if fp16 finds no scale that works."""
        self.guard.check()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            error = NonFiniteError(
                f"train.precision='fp16': gradients overflow even at a loss scale of {self.scaler.get_scale():g}: "
                "no step updates the parameters; use bf16, lower optim.base_lr or set optim.clip_grad_norm"
            )
            raise self._world.agreed(error)

    def read_figures(self) -> dict[str, float]:
        """Wait for the device; return the last step's figures. Raises as :meth:`check` does."""
        self.check()
        figures = dict(zip(self._figure_names, self._last_figures.tolist(), strict=True))
        figures["grad_norm"] = float(self._grad_norm)
        if self.scaler.is_enabled():
            figures["loss_scale"] = self.scaler.get_scale()
        return figures


class Stepper(BaseStepper[AdaMAE]):
    """The step of pre-training."""

    def __init__(self, config: PretrainConfig, device: torch.device, world: World = ALONE) -> None:
        torch.manual_seed(config.seed)
        model = AdaMAE(config.model, config.mask, config.loss)
        super().__init__(config, device, model, figure_names(model), world)
        self._sampler_grad_norm = torch.zeros((), device=device)
        if self.graph is not None:
            shape_B = (config.train.batch_size,)
            shape_BCTHW = (*shape_B, *self.model.grid.video_shape)
            self._video_BCTHW = torch.zeros(shape_BCTHW, dtype=torch.uint8, device=device)
            self._seeds_B = torch.zeros(shape_B, dtype=torch.int64, device=device)

    def take(self, batch: Batch) -> None:
        """:meth:`accumulate` of a batch of the loader."""
        self.accumulate(batch.video)

    def accumulate(self, video_BCTHW: Tensor) -> None:
        """Forward and backward of one micro-batch of uint8 clips; gradients add up over ``train.accumulate`` calls."""
        num_clips = video_BCTHW.shape[0]
        seeds_B = mask_seeds(self._config.seed, self._step, self._place * num_clips, num_clips)
        self._run_or_keep(self._upload_clips(video_BCTHW), upload(seeds_B, self.device))

    def _kept(self) -> tuple[Tensor, ...]:
        return self._video_BCTHW, self._seeds_B

    def _forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        video_BCTHW, seeds_B = inputs
        try:
            output = self.network(video_BCTHW, seeds=seeds_B)
        except NonFiniteLogitsError as error:
            raise non_finite(self._step, self._world.named(self._world.rank, error)) from error
        return output.loss, describe_output(output, self.model.grid)

    def _measure_gradients(self) -> None:
        super()._measure_gradients()
        if self.model.sampler is not None:
            self._sampler_grad_norm.copy_(gradient_norm(self.model.sampler.parameters()))

    def read_figures(self) -> dict[str, float]:
        """Wait for the device; return the last step's figures. Raises as :meth:`check` does.

        With a sampler, sampler_grad_norm among them is the 2-norm of its gradients, unscaled and before clipping.
        """
        figures = super().read_figures()
        if self.model.sampler is not None:
            figures["sampler_grad_norm"] = float(self._sampler_grad_norm)
        return figures


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all their gradients together, of which each process may have a share."""
    return whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def micro_batch_seed(seed: int, step: int, place: int) -> int:
    """Return a 32-bit seed of one micro-batch of a step, all that torch's CPU generator takes in.

    A hash, so that every bit counts.
    """
    return int(np.random.SeedSequence(seed, spawn_key=(step, 1 + place)).generate_state(1)[0])


def mask_seeds(seed: int, step: int, first_clip: int, num_clips: int) -> Tensor:
    """Return int64 seeds for the masks of clips ``first_clip`` … of one step, however it is cut into batches."""
    state = np.random.SeedSequence(seed, spawn_key=(step, 0)).generate_state(first_clip + num_clips, np.uint64)
    return torch.from_numpy(state[first_clip:].view(np.int64))
