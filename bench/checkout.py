"""The published AdaMAE code, run as it is from a checkout that the user has (github.com/wgcban/adamae, commit aa19850).

Nothing of it is copied here. What it imports and new machines lack (timm of its time, einops, tensorboardX, scipy,
torch._six) is stood in for while it is imported: small functions by their documented behaviour, empty classes for the
rest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import re
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from adamae_fast.ops.patchify import IMAGENET_MEAN, IMAGENET_STD
from bench import conditions

COMMIT = "aa198502f3da26a5ecb1999aeaf19a7a04bab272"
"""The only version that the stand-ins were tried with."""

CLASSIFIER = "models/finetune/vit.py"
"""The fine-tuning's model, which fine-tuning alone needs."""

NEEDED = ("models/pretrain/vit.py", "msc/engine_for_pretraining.py", "optim_factory.py")


class _StandIn(types.ModuleType):
    """A module in which every name that was not given is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """einops' function for patterns of names and brackets: split the axes, permute them, join them."""
    left, right = (re.findall(r"\(.*?\)|\S+", side) for side in pattern.split("->"))
    groups = [group.strip("()").split() for group in left]
    shape: list[int] = []
    for group, length in zip(groups, x.shape, strict=True):
        known = math.prod(sizes.get(name, 1) for name in group)
        unknown = sum(name not in sizes for name in group)
        assert unknown <= 1, pattern
        shape += [sizes[name] if name in sizes else length // known for name in group]
    names = [name for group in groups for name in group]
    length_of = dict(zip(names, shape, strict=True))
    order = [group.strip("()").split() for group in right]
    permuted = x.reshape(shape).permute([names.index(name) for group in order for name in group])
    return permuted.reshape([math.prod(length_of[name] for name in group) for group in order])


def _drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    if not drop_prob or not training:
        return x
    keep = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    return x * x.new_empty(shape).bernoulli_(keep).div_(keep)


def _stand_ins() -> dict[str, types.ModuleType]:
    given: dict[str, dict[str, Any]] = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {
            "drop_path": _drop_path,
            "to_2tuple": lambda x: x if isinstance(x, tuple) else (x, x),
            "trunc_normal_": nn.init.trunc_normal_,
        },
        "timm.models.registry": {"register_model": lambda function: function},
        "timm.data": {},
        "timm.data.constants": {"IMAGENET_DEFAULT_MEAN": IMAGENET_MEAN, "IMAGENET_DEFAULT_STD": IMAGENET_STD},
        "timm.utils": {},
        "timm.optim": {},
        **{
            f"timm.optim.{name}": {}
            for name in ("adafactor", "adahessian", "adamp", "lookahead", "nadam", "nvnovograd", "radam", "rmsprop_tf")
        },
        "timm.optim.sgdp": {},
        "einops": {"rearrange": rearrange},
        "scipy": {},
        "scipy.io": {},
        "tensorboardX": {},
        "torch._six": {"inf": math.inf},
    }
    modules: dict[str, types.ModuleType] = {}
    for name, content in given.items():
        modules[name] = module = _StandIn(name)
        module.__dict__.update(content)
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], child, module)
    return modules


@dataclass(frozen=True)
class Checkout:
    """The parts of the published code that a step needs."""

    vit: types.ModuleType
    engine: types.ModuleType
    utils: types.ModuleType
    optim_factory: types.ModuleType
    classifier: types.ModuleType | None
    """The fine-tuning's model; None for a checkout without it."""
    commit: str
    """Of the checkout, where git or the archive tells it."""

    @classmethod
    def open(cls, folder: Path) -> Checkout:
        """Import from ``folder``. Raises ValueError where it is no such checkout."""
        missing = [name for name in NEEDED if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"--published={str(folder)!r}: {', '.join(missing)} not found; give a checkout of the published code, "
                f"https://github.com/wgcban/adamae at commit {COMMIT[:7]}"
            )
        taken = {"models", "msc", "optim_factory"}
        with mock.patch.dict(sys.modules, _stand_ins()):
            for name in [name for name in sys.modules if name.partition(".")[0] in taken]:
                del sys.modules[name]
            with mock.patch.object(sys, "path", [str(folder), *sys.path]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                modules = {
                    "vit": importlib.import_module("models.pretrain.vit"),
                    "engine": importlib.import_module("msc.engine_for_pretraining"),
                    "utils": importlib.import_module("msc.utils"),
                    "optim_factory": importlib.import_module("optim_factory"),
                }
                has_classifier = (folder / CLASSIFIER).is_file()
                classifier = importlib.import_module("models.finetune.vit") if has_classifier else None
        return cls(**modules, classifier=classifier, commit=conditions.git(folder, "rev-parse", "HEAD") or "not told")

    def build(self, **sizes: Any) -> nn.Module:
        """The model, sizes by the names of its constructor."""
        with contextlib.redirect_stdout(io.StringIO()):
            return self.vit.PretrainVisionTransformer(**sizes)

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> Any:
        """Its AdamW, with its parameter groups."""
        options = argparse.Namespace(opt="adamw", opt_eps=1e-8, opt_betas=betas, weight_decay=weight_decay, lr=lr)
        with contextlib.redirect_stdout(io.StringIO()):
            return self.optim_factory.create_optimizer(options, model)

    def scaler(self, device: torch.device, precision: str) -> Any:
        """Its loss scaler; without one where the arithmetic needs none and the published class cannot run."""
        if device.type == "cuda" and precision != "fp32":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.utils.NativeScalerWithGradNormCount()
        return _NoScaler(self.utils.get_grad_norm_)

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        batches: Loader,
        device: torch.device,
        precision: str,
        patch_size: int,
    ) -> float:
        """Run its loop over ``batches``; return the mean loss. fp16 on a GPU is the published arithmetic."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if device.type == "cpu":
                stack.enter_context(mock.patch.object(torch.cuda, "synchronize", return_value=None))
            if device.type == "cpu" or precision != "fp16":
                stack.enter_context(mock.patch.object(torch.cuda.amp, "autocast", _autocast(device, precision)))
            averages = self.engine.train_one_epoch(
                model, batches, optimizer, device, 0, scaler, None, patch_size=patch_size, start_steps=0
            )
        return float(averages["loss"])


def _autocast(device: torch.device, precision: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


class _NoScaler:
    """Backward, norm of the gradients and update, as the published scaler does them, without a scale."""

    def __init__(self, norm: Callable[[Any], Tensor]) -> None:
        self._norm = norm

    def __call__(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, *, parameters: Iterator[Tensor], **_: object
    ) -> Tensor:
        loss.backward()
        norm = self._norm(parameters)
        optimizer.step()
        return norm

    def state_dict(self) -> dict[str, float]:
        return {"scale": 1.0}


class Loader:
    """The same batch several times; remembers how long the loop took with each, asking for the next one included."""

    def __init__(self, video_BCTHW: Tensor, num_batches: int) -> None:
        self._batch = (video_BCTHW, None)
        self._num_batches = num_batches
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for _ in range(self._num_batches):
            start, start_cpu = time.perf_counter(), time.process_time()
            yield self._batch
            self.seconds.append(time.perf_counter() - start)  # the loop itself waits for the GPU in every step
            self.cpu_seconds.append(time.process_time() - start_cpu)
