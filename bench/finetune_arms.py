"""The arms of ``bench.step --task finetune``: classifiers over all tokens, with soft labels and drop path.

Augmentation is the same for all and left out: clips and soft labels are on the device already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adamae_fast.config import AttentionConfig
from adamae_fast.config_finetune import (
    AugmentConfig,
    ClassifierConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneTrainConfig,
)
from adamae_fast.data.augment import smooth_labels
from adamae_fast.device import arithmetic, product_dtype, upload
from adamae_fast.interop.keys import published_classifier_names, write_tensors
from adamae_fast.model.block import Attention
from adamae_fast.model.classifier import HEAD_SCALE, VideoClassifier
from adamae_fast.model.sizes import SIZES
from adamae_fast.ops.attention import choose_attention
from adamae_fast.ops.attention_backends import BACKENDS, AttentionProblem
from adamae_fast.plan.work import grid_of
from adamae_fast.train.finetune_step import FinetuneStepper, soft_cross_entropy
from adamae_fast.train.optim import layer_scale
from bench.arms import (
    LEARNING_RATE,
    NOT_MEASURED,
    Arm,
    Builder,
    Gradients,
    OurArm,
    PlainArm,
    Plan,
    Setting,
    Skipped,
    our_options,
    take_gradients,
    without_dropout,
)
from bench.checkout import CLASSIFIER, Checkout
from bench.models import PublishedLikeClassifier, TunedClassifier
from bench.parity import Parity

NUM_CLASSES = 174
"""Of SSv2."""

DROP_PATH = 0.1
OPTIONS = FinetuneOptimConfig(base_lr=LEARNING_RATE)

CPU_BACKENDS = ("sdpa", "reference")
"""Attention that is tried on a CPU beside what "auto" takes; on a GPU all back ends are."""


def draw_labels(setting: Setting) -> Tensor:
    """Random classes (B,) on the device."""
    generator = torch.Generator(setting.device).manual_seed(1)
    return torch.randint(NUM_CLASSES, (setting.batch_size,), device=setting.device, generator=generator)


def draw_targets(setting: Setting) -> Tensor:
    """Their soft labels (B, K)."""
    return smooth_labels(draw_labels(setting), NUM_CLASSES, AugmentConfig().label_smoothing)


def initial_state(setting: Setting) -> Gradients:
    """Weights that all arms start from. The head is not scaled down: or the loss would not depend on the encoder."""
    torch.manual_seed(0)
    with setting.device:
        state = {name: x.detach() for name, x in VideoClassifier(setting.model, NUM_CLASSES).state_dict().items()}
    return {**state, "head.weight": state["head.weight"] / HEAD_SCALE}


def config_of(setting: Setting, attention: str, **train: Any) -> FinetuneConfig:
    """Ours, with this attention and options of ``train``."""
    options = {"batch_size": setting.batch_size, "device": str(setting.device), **train}
    return FinetuneConfig(
        model=replace(setting.model, attention=AttentionConfig(encoder=attention)),  # type: ignore[arg-type]
        classifier=ClassifierConfig(num_classes=NUM_CLASSES, drop_path=DROP_PATH),
        augment=AugmentConfig(layers=0, erase=0.0, mixup=0.0, cutmix=0.0),
        optim=OPTIONS,
        train=FinetuneTrainConfig(**options),
    )


class PlainClassifierArm(PlainArm):
    """A classifier of ours in plain PyTorch with an ordinary loop."""

    def __init__(
        self, name: str, setting: Setting, precision: str, network: nn.Module, *, like_published: bool
    ) -> None:
        super().__init__(name, setting, precision, network, like_published=like_published, options=OPTIONS)
        self._targets = draw_targets(setting)

    def _loss(self, precision: str, visible_ids: Tensor | None = None) -> Tensor:
        clips_BCTHW = upload(self.clips, self.setting.device)
        with arithmetic(self.setting.device, precision):  # type: ignore[arg-type]
            return self._call(clips_BCTHW, self._targets)


class _PublishedClassifier(nn.Module):
    """The published classifier, and the soft cross-entropy that its training takes from timm."""

    def __init__(self, checkout: Checkout, setting: Setting) -> None:
        super().__init__()
        assert checkout.classifier is not None
        model, size = setting.model, SIZES[setting.model.size].encoder
        self.network = checkout.classifier.VisionTransformer(
            img_size=model.frame_size,
            patch_size=model.patch_size,
            num_classes=NUM_CLASSES,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.num_heads,
            qkv_bias=True,
            drop_path_rate=DROP_PATH,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            all_frames=model.num_frames,
            tubelet_size=model.tubelet_size,
        )

    def forward(self, normalized_BCTHW: Tensor, targets_BK: Tensor) -> Tensor:
        return torch.sum(-targets_BK * self.network(normalized_BCTHW).log_softmax(dim=-1), dim=-1).mean()


class PublishedClassifierArm(PlainClassifierArm):
    """The published model from a checkout, in a loop that does what its own does in a step."""

    def __init__(self, name: str, setting: Setting, precision: str, checkout: Checkout, state: Gradients) -> None:
        model = _PublishedClassifier(checkout, setting)
        model.network.load_state_dict(write_tensors(state, published_classifier_names))
        super().__init__(name, setting, precision, model, like_published=True)
        self._names = {f"network.{published_classifier_names(ours)[0]}": ours for ours in state}
        # Rates and decay by layer make as many groups as the published code has.
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for theirs, p in model.named_parameters():
            scale = layer_scale(self._names[theirs], SIZES[setting.model.size].encoder.depth, OPTIONS.layer_decay)
            groups.setdefault((scale, OPTIONS.weight_decay if p.ndim > 1 else 0.0), []).append(p)
        described = [{"params": ps, "weight_decay": decay} for (_, decay), ps in groups.items()]
        self._optimizer = torch.optim.AdamW(described, lr=LEARNING_RATE, betas=OPTIONS.betas)

    def loss_and_gradients(self, visible_ids: Tensor | None) -> tuple[float, Gradients]:
        """As :class:`bench.arms.Arm` says."""
        loss, gradients = super().loss_and_gradients(visible_ids)
        return loss, {self._names[name]: gradient for name, gradient in gradients.items()}


class OurClassifierArm(OurArm):
    """adamae_fast's own fine-tuning step; arms that differ in attention share weights and optimizer, too."""

    def __init__(self, name: str, setting: Setting, stepper: FinetuneStepper, config: FinetuneConfig) -> None:
        super().__init__(name, setting, stepper, config)
        self._labels, self._targets = draw_labels(setting), draw_targets(setting)

    def choose(self) -> None:
        """As :class:`bench.arms.OurArm` says."""
        super().choose()
        for module in self.model.modules():
            if isinstance(module, Attention):
                module.backend = self.config.model.attention.encoder
        # The first of the arms that share a stepper has decided on what it says.
        product = product_dtype(self.config.train.precision)
        self.stepper.attention_backends = self.stepper.model.attention_backends(self.setting.device, product)

    def accumulate(self) -> None:
        """Forward and backward of the clips."""
        self.stepper.accumulate(self.clips, self._labels)

    def loss(self, visible_ids: Tensor | None = None) -> Tensor:
        """One forward pass."""
        return soft_cross_entropy(self.model(self.video), self._targets)


class FinetuneParity(Parity):
    """Of fine-tuning."""

    compared = ("tokenizer.weight", "encoder.", "fc_norm.", "head.")

    def reference(self, setting: Setting) -> tuple[float, Gradients]:
        """As :class:`bench.parity.Parity` says."""
        with setting.device:
            model = VideoClassifier(setting.model, NUM_CLASSES).train()
        model.load_state_dict(initial_state(setting))
        with without_dropout(model):
            loss = soft_cross_entropy(model(setting.draw_video()), draw_targets(setting))
            loss.backward()
        return loss.item(), take_gradients(model)


def attention_arms(setting: Setting, precision: str) -> tuple[list[str], Skipped]:
    """Back ends to force beside what "auto" takes, and reasons for those that cannot run here."""
    size = SIZES[setting.model.size].encoder
    problem = AttentionProblem(
        setting.device,
        product_dtype(precision),  # type: ignore[arg-type]
        grid_of(setting.model).num_tokens,
        size.width // size.num_heads,
        needs_grad=True,
    )
    chosen, _ = choose_attention(problem)
    names, skipped = [], {}
    for name in CPU_BACKENDS if setting.device.type == "cpu" else BACKENDS:
        if name == chosen:
            continue
        found, reasons = choose_attention(problem, name)
        if found is None:
            skipped[f"ours-none@{name}"] = f"not measured: {reasons}"
        else:
            names.append(name)
    return names, skipped


def builders(setting: Setting, plan: Plan) -> tuple[dict[str, Builder], Skipped]:
    """As :func:`bench.arms.builders`: published, its stand-in, tuned, compiled; ours by recompute and by attention."""
    state = initial_state(setting)
    build: dict[str, Builder] = {}
    share = setting.device.type == "cpu"
    backends, skipped = attention_arms(setting, plan.precision)
    for precision in plan.precisions:
        name = f"published-{precision}"
        if plan.checkout is None:
            skipped[name] = NOT_MEASURED
        elif plan.checkout.classifier is None:
            skipped[name] = f"not measured: the checkout has no {CLASSIFIER}"
        else:
            build[name] = partial(PublishedClassifierArm, name, setting, precision, plan.checkout, state)
    if plan.checkout is None or share:
        for precision in plan.precisions:
            name = f"published-like-{precision}"
            build[name] = partial(_plain, name, setting, precision, state, like_published=True)
    build["tuned"] = partial(_plain, "tuned", setting, plan.precision, state, like_published=False)
    build["tuned+compile"] = lambda: _plain("tuned", setting, plan.precision, state, like_published=False).compiled(
        "tuned+compile"
    )
    steppers: dict[str, FinetuneStepper] = {}

    def our_arm(name: str, attention: str, options: dict[str, Any]) -> Arm:
        config = config_of(setting, attention, precision=plan.precision, **options)
        stepper = steppers.get("ours") if share else None
        if stepper is None:
            with setting.device:
                stepper = FinetuneStepper(config, NUM_CLASSES, setting.device)
            stepper.model.load_state_dict(state)
            steppers.update({"ours": stepper} if share else {})
        return OurClassifierArm(name, setting, stepper, config)

    for name, options in our_options(setting.device).items():
        build[name] = partial(our_arm, name, "auto", options)
    for backend in backends:
        build[f"ours-none@{backend}"] = partial(our_arm, f"ours-none@{backend}", backend, {"recompute": "none"})
    return build, skipped


def _plain(name: str, setting: Setting, precision: str, state: Gradients, *, like_published: bool) -> PlainArm:
    kind: Callable[..., nn.Module] = PublishedLikeClassifier if like_published else TunedClassifier
    with setting.device:
        network = kind(setting.model, NUM_CLASSES, DROP_PATH)
    network.load_state_dict(state)
    return PlainClassifierArm(name, setting, precision, network, like_published=like_published)
