"""The arms of the whole-step measurements: published code, its stand-in, tuned PyTorch, compiled, ours.

An arm owns a model with its optimizer and clips that are already on the device. It can run a training step, and it can
compute loss and gradients in fp32 without dropout for a given mask: so all arms are compared before any is timed.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor, nn

from adamae_fast.config import MaskConfig, ModelConfig, OptimConfig, PretrainConfig, RunConfig, TrainConfig
from adamae_fast.device import arithmetic, upload
from adamae_fast.interop.keys import published_names, write_tensors
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.model.layers import DropPath
from adamae_fast.model.sizes import SIZES
from adamae_fast.ops.patchify import IMAGENET_MEAN, IMAGENET_STD
from adamae_fast.train.optim import build_optimizer
from adamae_fast.train.step import BaseStepper, Stepper
from adamae_fast.train.step_graph import WARM_UP_STEPS
from bench import tuned
from bench.checkout import Checkout, Loader
from bench.models import PublishedLike, Tuned
from bench.published import boolean_mask
from bench.timing import CpuRunner, Runner

LEARNING_RATE = 1e-5
"""Small: parameters move as in training, and no arm diverges on noise."""

OPTIONS = OptimConfig(base_lr=LEARNING_RATE)
"""Of the optimizer in pre-training."""

WARM_UP = WARM_UP_STEPS + 1
"""Steps after which an arm stays what it is: compiled, with the optimizer's moments, recorded as a graph."""

COMPILE_BACKEND = "inductor"

NOT_MEASURED = "not measured: give --published with a checkout of the published code"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms train."""

    model: ModelConfig
    mask: MaskConfig
    batch_size: int
    device: torch.device

    def config(self, **train: Any) -> PretrainConfig:
        """Ours, with options of ``train``."""
        options = {"batch_size": self.batch_size, "device": str(self.device), **train}
        return PretrainConfig(model=self.model, mask=self.mask, train=TrainConfig(**options))

    def draw_video(self) -> Tensor:
        """Random uint8 clips (B, C, T, H, W) on the device."""
        size = self.model.frame_size
        shape = (self.batch_size, 3, self.model.num_frames, size, size)
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=generator)


def normalize(video_BCTHW: Tensor) -> Tensor:
    """The float clips that the published data pipeline hands over."""
    mean, std = (torch.tensor(x, device=video_BCTHW.device).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (video_BCTHW.float() / 255 - mean) / std


Gradients = dict[str, Tensor]
"""By our parameter's names."""


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """In training mode, but nothing is left out."""
    before: list[tuple[nn.Module, str, Any, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            before.append((module, "p", module.p, 0.0))
        elif isinstance(module, DropPath):
            before.append((module, "keep", module.keep, torch.ones_like(module.keep)))
        elif hasattr(module, "drop_prob"):  # of the published code
            before.append((module, "drop_prob", module.drop_prob, 0.0))
    for module, name, _, none in before:
        setattr(module, name, none)
    try:
        yield
    finally:
        for module, name, value, _ in before:
            setattr(module, name, value)


class StepRunner:
    """CUDA events around whole steps."""

    how = "steps"

    def __init__(self, step: Callable[[], object], warm_up: int) -> None:
        self._step = step
        self.cpu_seconds: list[float] = []
        for _ in range(warm_up):
            step()
        torch.cuda.synchronize()

    def seconds(self, repetitions: int) -> list[float]:
        """As :class:`bench.timing.Runner` says."""
        self._step()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
        events[0].record()
        for event in events[1:]:
            start = time.process_time()
            self._step()
            self.cpu_seconds.append(time.process_time() - start)
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


class Arm(ABC):
    """One way to train the model."""

    def __init__(self, name: str, setting: Setting, precision: str) -> None:
        self.name, self.setting, self.precision = name, setting, precision
        self.video = setting.draw_video()
        self.clips = self.video
        """What a step takes, on the device; in pinned host memory where its upload is to be timed, too."""
        self.model: nn.Module

    @abstractmethod
    def step(self) -> None:
        """One whole training step, update included."""

    @abstractmethod
    def keep(self) -> object:
        """What the bytes kept for the backward are counted in: a forward pass, or a whole step."""

    @abstractmethod
    def loss_and_gradients(self, visible_ids: Tensor | None) -> tuple[float, Gradients]:
        """In fp32, without dropout, for a given mask, if there are any; leaves the weights as they are."""

    def runner(self, warm_up: int) -> Runner:
        """The step, warmed up, with the clock of its device."""
        if self.setting.device.type == "cuda":
            return StepRunner(self.step, warm_up)
        return CpuRunner(self.step, warm_up)


def take_gradients(model: nn.Module) -> Gradients:
    """Copies of the gradients, which are gone from the model."""
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


class PlainArm(Arm):
    """A model of ours in plain PyTorch with an ordinary loop."""

    def __init__(
        self,
        name: str,
        setting: Setting,
        precision: str,
        network: nn.Module,
        *,
        like_published: bool,
        options: OptimConfig = OPTIONS,
    ) -> None:
        super().__init__(name, setting, precision)
        self.model = network.to(setting.device).train()
        self._call: Callable[..., Tensor] = self.model
        self._like_published = like_published
        self.clips = normalize(self.video) if like_published else self.video
        self._parameters = list(network.parameters())
        self._optimizer = build_optimizer(network, options)
        if like_published:
            self._optimizer = torch.optim.AdamW(self._optimizer.param_groups, lr=LEARNING_RATE, betas=options.betas)
            for group in self._optimizer.param_groups:
                # As the published code makes it: not fused, and a learning rate that is a number.
                group.update(fused=None, capturable=False, lr=LEARNING_RATE)
        self._scaler = torch.amp.GradScaler(setting.device.type, enabled=precision == "fp16")

    def compiled(self, name: str) -> PlainArm:
        """The same weights, compiled with torch's defaults."""
        arm = copy(self)
        arm.name = name
        if self.setting.device.type == "cpu" and hasattr(self.model, "gather"):
            # In one graph, torch 2.13 loses the gradient of the tokenizer that comes through the encoder.
            self.model.gather = torch.compiler.disable(tuned.gather_tokens)
        arm._call = torch.compile(self.model, backend=COMPILE_BACKEND)
        return arm

    def _loss(self, precision: str, visible_ids: Tensor | None = None) -> Tensor:
        clips_BCTHW = upload(self.clips, self.setting.device)
        if not self._like_published:
            with arithmetic(self.setting.device, precision):  # type: ignore[arg-type]
                return self._call(clips_BCTHW, visible_ids)
        assert isinstance(self.model, PublishedLike)
        labels_BNP = self.model.labels(clips_BCTHW)
        with arithmetic(self.setting.device, precision):  # type: ignore[arg-type]
            return self._call(clips_BCTHW, labels_BNP, visible_ids)

    def step(self) -> None:
        """As the published loop does: it looks at the loss and takes the norm gradient by gradient; or better."""
        loss = self._loss(self.precision)
        if self._like_published:
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"{self.name}: the loss is {loss.item()}")
            self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._like_published:
            torch.stack([gradient.norm() for gradient in gradients]).norm()
        else:
            torch.nn.utils.get_total_norm(gradients)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if not self._like_published:
            self._optimizer.zero_grad()
        elif self.setting.device.type == "cuda":
            torch.cuda.synchronize()

    def keep(self) -> object:
        """One forward pass."""
        return self._loss(self.precision)

    def loss_and_gradients(self, visible_ids: Tensor | None) -> tuple[float, Gradients]:
        """As :class:`Arm` says."""
        self.model.zero_grad(set_to_none=True)
        with without_dropout(self.model):
            loss = self._loss("fp32", visible_ids)
            loss.backward()
        return loss.item(), take_gradients(self.model)


class OurArm(Arm):
    """adamae_fast's own step; arms that differ in what the backward computes again share weights and optimizer."""

    stepper: Any

    def __init__(self, name: str, setting: Setting, stepper: BaseStepper[Any], config: RunConfig) -> None:
        super().__init__(name, setting, config.train.precision)
        self.model, self.stepper, self.config = stepper.model, stepper, config
        self._number = 0

    def choose(self) -> None:
        """Make the shared model this arm's."""
        if hasattr(self.stepper.model, "set_recompute"):
            self.stepper.model.set_recompute(self.config.train.recompute)

    def accumulate(self) -> None:
        """Forward and backward of the clips."""
        self.stepper.accumulate(self.clips)

    def loss(self, visible_ids: Tensor | None = None) -> Tensor:
        """One forward pass."""
        loss: Tensor = self.model(self.video, visible_ids=visible_ids).loss
        return loss

    def step(self) -> None:
        """Begin, forward and backward, finish: what the training command runs."""
        self.choose()
        self.stepper.begin(self._number, LEARNING_RATE)
        self.accumulate()
        self.stepper.finish(self._number)
        self._number += 1

    def keep(self) -> object:
        """One forward pass."""
        self.choose()
        with arithmetic(self.setting.device, self.config.train.precision):
            return self.loss()

    def loss_and_gradients(self, visible_ids: Tensor | None) -> tuple[float, Gradients]:
        """As :class:`Arm` says."""
        self.choose()
        self.model.zero_grad(set_to_none=True)
        with without_dropout(self.model):
            loss = self.loss(visible_ids)
            loss.backward()
        return loss.item(), take_gradients(self.model)


class _EngineRunner:
    """Times the steps inside the published loop."""

    how = "steps"

    def __init__(self, arm: PublishedArm, warm_up: int) -> None:
        self._arm = arm
        self.cpu_seconds: list[float] = []
        arm.run(warm_up)

    def seconds(self, repetitions: int) -> list[float]:
        """As :class:`bench.timing.Runner` says."""
        loader = self._arm.run(repetitions + 1)
        self.cpu_seconds += loader.cpu_seconds[1:]
        return loader.seconds[1:]


class PublishedArm(Arm):
    """The published model, loop and optimizer from a checkout."""

    def __init__(self, name: str, setting: Setting, precision: str, checkout: Checkout, state: Gradients) -> None:
        super().__init__(name, setting, precision)
        model, size = setting.model, SIZES[setting.model.size]
        if (model.num_frames, setting.mask.strategy) != (16, "adaptive") or model.sampler != type(model.sampler)():
            raise ValueError("the published code has 16 frames, adaptive masks and one kind of sampler only")
        self._checkout, self._patch_size = checkout, model.patch_size
        network = checkout.build(
            img_size=model.frame_size,
            patch_size=model.patch_size,
            tubelet_size=model.tubelet_size,
            encoder_embed_dim=size.encoder.width,
            encoder_depth=size.encoder.depth,
            encoder_num_heads=size.encoder.num_heads,
            decoder_embed_dim=size.decoder.width,
            decoder_depth=model.decoder.depth or size.decoder.depth,
            decoder_num_heads=size.decoder.num_heads,
            decoder_num_classes=3 * model.tubelet_size * model.patch_size**2,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            mask_ratio=setting.mask.ratio,
        )
        network.load_state_dict(write_tensors(state, published_names))
        self.model = network.to(setting.device)
        self.clips = normalize(self.video)
        self._names = {published_names(name)[0]: name for name in state}
        options = OptimConfig()
        self._optimizer = checkout.optimizer(
            self.model, lr=LEARNING_RATE, weight_decay=options.weight_decay, betas=options.betas
        )
        self._scaler = checkout.scaler(setting.device, precision)

    def run(self, num_steps: int) -> Loader:
        """Some steps; what handed out their clips has timed them."""
        loader = Loader(self.clips, num_steps)
        device = self.setting.device
        self._checkout.run(self.model, self._optimizer, self._scaler, loader, device, self.precision, self._patch_size)
        return loader

    def step(self) -> None:
        """A loop of one step."""
        self.run(1)

    def keep(self) -> object:
        """A whole step: the published loop has no forward of its own."""
        self.step()
        return None

    def runner(self, warm_up: int) -> Runner:
        """As :class:`Arm` says."""
        return _EngineRunner(self, warm_up)

    def loss_and_gradients(self, visible_ids: Tensor | None) -> tuple[float, Gradients]:
        """As :class:`Arm` says; the published loop in fp32, with an optimizer that does not move anything."""
        assert visible_ids is not None
        encoder: Any = self.model.encoder
        mask_BN = boolean_mask(visible_ids, encoder.patch_embed.num_patches)

        def forced_mask(x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            p_BN = encoder.softmax(encoder.get_token_probs(x_BND + encoder.pos_embed_probs))
            return p_BN, visible_ids, mask_BN

        device, still = self.setting.device, torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.model.zero_grad(set_to_none=True)
        with mock.patch.object(encoder, "get_mask", forced_mask), without_dropout(self.model):
            loss = self._checkout.run(
                self.model,
                still,
                self._checkout.scaler(device, "fp32"),
                Loader(self.clips, 1),
                device,
                "fp32",
                self._patch_size,
            )
        gradients = take_gradients(self.model)
        return loss, {self._names[name]: gradient for name, gradient in gradients.items()}


Skipped = dict[str, str]
"""Arms that are not measured, and why."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which arms to build."""

    checkout: Checkout | None = None
    precisions: tuple[str, ...]
    """Of the published arms: fp32 on the CPU; fp16, as published, and bf16 on a GPU."""
    precision: str
    """Of all others."""


def plan_for(device: torch.device, checkout: Checkout | None) -> Plan:
    """fp32 on the CPU, half precision on a GPU."""
    if device.type == "cpu":
        return Plan(checkout=checkout, precisions=("fp32",), precision="fp32")
    return Plan(checkout=checkout, precisions=("fp16", "bf16"), precision="bf16")


def initial_state(setting: Setting) -> Gradients:
    """Weights that all arms start from."""
    torch.manual_seed(0)
    with setting.device:  # initialised there: on a GPU in no time
        return {name: x.detach() for name, x in AdaMAE(setting.model, setting.mask).state_dict().items()}


Builder = Callable[[], Arm]


def builders(setting: Setting, plan: Plan) -> tuple[dict[str, Builder], Skipped]:
    """A function for each arm that can be measured here, and reasons for the others.

    On the CPU arms share weights where they can, since host memory is small; on a GPU each has its own, so that its
    memory can be told.
    """
    state = initial_state(setting)
    build: dict[str, Builder] = {}
    skipped: Skipped = {}
    share = setting.device.type == "cpu"
    for precision in plan.precisions:
        name = f"published-{precision}"
        if plan.checkout is None:
            skipped[name] = NOT_MEASURED
        else:
            build[name] = partial(PublishedArm, name, setting, precision, plan.checkout, state)
    if plan.checkout is None or share:
        for precision in plan.precisions:
            name = f"published-like-{precision}"
            build[name] = partial(_plain, name, setting, precision, state, like_published=True)

    def tuned_anew(name: str) -> PlainArm:
        return _plain(name, setting, plan.precision, state, like_published=False)

    plain: dict[str, PlainArm] = {}

    def tuned_arm() -> Arm:
        plain["tuned"] = tuned_anew("tuned")
        return plain["tuned"]

    def compiled_arm() -> Arm:
        base = plain.get("tuned") if share else None
        return (base or tuned_anew("tuned")).compiled("tuned+compile")

    build["tuned"], build["tuned+compile"] = tuned_arm, compiled_arm
    steppers: dict[tuple[tuple[str, Any], ...], Stepper] = {}

    def our_arm(name: str, options: dict[str, Any]) -> Arm:
        config = setting.config(precision=plan.precision, **options)
        key = tuple(item for item in options.items() if item[0] != "recompute")
        stepper = steppers.get(key) if share else None
        if stepper is None:
            with setting.device:
                stepper = Stepper(config, setting.device)
            stepper.model.load_state_dict(state)
            steppers.update({key: stepper} if share else {})
        return OurArm(name, setting, stepper, config)

    for name, options in our_options(setting.device).items():
        unknown = set(options) - {field.name for field in fields(TrainConfig)}
        if unknown:
            skipped[name] = f"this version has no option {', '.join(f'train.{key}' for key in sorted(unknown))}"
        else:
            build[name] = partial(our_arm, name, options)
    return build, skipped


def our_options(device: torch.device) -> dict[str, dict[str, Any]]:
    """Options of ``train`` of each arm of ours, by its name."""
    arms: dict[str, dict[str, Any]] = {}
    for policy in _recompute_policies():
        arms[f"ours-{policy}"] = {"recompute": policy}
        if device.type == "cuda":
            arms[f"ours-{policy}+graph"] = {"recompute": policy, "cuda_graph": True}
    if device.type == "cuda":
        arms["ours-none+compile"] = {"recompute": "none", "compile": True}
    return arms


def _recompute_policies() -> tuple[str, ...]:
    from adamae_fast.config import Recompute

    return get_args(Recompute)


def _plain(name: str, setting: Setting, precision: str, state: Gradients, *, like_published: bool) -> PlainArm:
    with setting.device:
        network = (PublishedLike if like_published else Tuned)(setting.model, setting.mask)
    network.load_state_dict(state)
    return PlainArm(name, setting, precision, network, like_published=like_published)
