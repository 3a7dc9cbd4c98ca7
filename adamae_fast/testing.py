"""What tests and benchmarks of the operations share: inputs of every operation, and how large an error may be.

Letters: B clips, C channels, T frames, H, W pixels, N tokens, K visible, M masked, D width, P pixels a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload

from adamae_fast.ops import (
    assemble_decoder,
    gather_tokens,
    head_patch_loss,
    masked_patch_loss,
    patchify,
    registry,
    sample_visible,
    sampling_loss,
)
from adamae_fast.ops.masked_patch_loss import Error, Target
from adamae_fast.ops.patchify import IMAGENET_MEAN, IMAGENET_STD
from adamae_fast.ops.sample_visible import TokenSplit, split_tokens

OPERATIONS = (
    assemble_decoder,
    gather_tokens,
    head_patch_loss,
    masked_patch_loss,
    patchify,
    sample_visible,
    sampling_loss,
)
"""The modules of the operations."""


@contextmanager
def prefer(impl: registry.Impl) -> Iterator[None]:
    """The public functions called without ``impl`` run the reference, or with "auto" what the dispatcher prefers."""

    def choose(operation: OpOverload, asked: registry.Impl, device: torch.device) -> OpOverload:
        return registry.choose(operation, impl if asked == "auto" else asked, device)

    with ExitStack() as stack:
        for operation in OPERATIONS:
            stack.enter_context(patch.object(operation, "choose", choose))
        yield


@dataclass(frozen=True, kw_only=True)
class OpShape:
    """Sizes that the inputs of every operation follow from. The defaults are tiny, odd and all different."""

    batch_size: int = 2
    """B."""

    grid: tuple[int, int, int] = (3, 1, 5)
    """Tokens along time, height and width; their product is N."""

    tubelet_size: int = 2
    """Frames of one token."""

    patch_size: int = 3
    """Height and width of one token in pixels."""

    num_visible: int = 4
    """K."""

    width: int = 6
    """D, the channels of a token."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return prod(self.grid)

    @property
    def num_masked(self) -> int:
        """M."""
        return self.num_tokens - self.num_visible

    @property
    def pixels_per_token(self) -> int:
        """P."""
        return 3 * self.tubelet_size * self.patch_size**2

    @property
    def video_shape(self) -> tuple[int, int, int, int, int]:
        """(B, C, T, H, W)."""
        frames, rows, columns = self.grid
        return self.batch_size, 3, frames * self.tubelet_size, rows * self.patch_size, columns * self.patch_size


class InputFactory:
    """Draws inputs of one :class:`OpShape`, dtype and device; equal seeds draw equal inputs."""

    def __init__(
        self, shape: OpShape, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(size, device=self.device, generator=self._generator).to(self.dtype)

    def positive(self, *size: int) -> Tensor:
        """Errors: numbers in (0.1, 2.1)."""
        return torch.rand(size, device=self.device, generator=self._generator).mul(2).add(0.1).to(self.dtype)

    def video(self) -> Tensor:
        """Noise, uint8 (B, C, T, H, W)."""
        return torch.randint(
            256, self.shape.video_shape, dtype=torch.uint8, device=self.device, generator=self._generator
        )

    def seeds(self) -> Tensor:
        """Seeds of the clips' masks, int64 (B,)."""
        return torch.randint(
            -(2**63), 2**63 - 1, (self.shape.batch_size,), device=self.device, generator=self._generator
        )

    def tokens(self, num_tokens: int) -> Tensor:
        """Normal tokens (B, ``num_tokens``, D)."""
        return self.normal(self.shape.batch_size, num_tokens, self.shape.width)

    def positions(self) -> Tensor:
        """A position table (N, D)."""
        return self.normal(self.shape.num_tokens, self.shape.width)

    def split(self) -> TokenSplit:
        """Another random split of each clip's tokens."""
        order_BN = self.normal(self.shape.batch_size, self.shape.num_tokens).argsort(dim=1)
        return split_tokens(order_BN[:, : self.shape.num_visible], self.shape.num_tokens)

    def logits(self) -> Tensor:
        """Logits (B, N) of a peaked distribution."""
        return 3 * self.normal(self.shape.batch_size, self.shape.num_tokens)

    def prediction(self) -> Tensor:
        """A prediction (B, M, P)."""
        return self.normal(self.shape.batch_size, self.shape.num_masked, self.shape.pixels_per_token)

    def per_masked(self) -> Tensor:
        """An error (B, M)."""
        return self.positive(self.shape.batch_size, self.shape.num_masked)


Arguments = tuple[object, ...]
"""Positional arguments of one call."""


@dataclass(frozen=True, kw_only=True)
class OperationInputs:
    """How to call one registered operation."""

    make: Callable[[InputFactory], list[Arguments]]
    """Arguments of several calls that together reach every branch."""

    differentiable: tuple[int, ...] = ()
    """Which arguments get a gradient."""

    written: tuple[int, ...] = ()
    """Which arguments the operation writes to."""

    def results(self, function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
        """What a call returns, then what it wrote to its arguments, which get their values back."""
        written = [x for i, x in enumerate(arguments) if i in self.written and isinstance(x, Tensor)]
        before = [x.clone() for x in written]
        returned = function(*arguments)
        after = [x.clone(memory_format=torch.contiguous_format) for x in written]
        for x, values in zip(written, before, strict=True):
            x.copy_(values)
        return [*([returned] if isinstance(returned, Tensor) else returned), *after]

    def make_requiring_grad(self, factory: InputFactory) -> list[Arguments]:
        """The same arguments, with gradients recorded for the differentiable ones."""
        return [
            tuple(
                argument.detach().requires_grad_()
                if isinstance(argument, Tensor) and i in self.differentiable
                else argument
                for i, argument in enumerate(arguments)
            )
            for arguments in self.make(factory)
        ]


_EACH_TARGET_AND_ERROR = (("normalized", "mse"), ("raw", "l1"), ("mae_st", "mse"))


def _patchify(f: InputFactory) -> list[Arguments]:
    return [(f.video(), f.shape.tubelet_size, f.shape.patch_size, IMAGENET_MEAN, IMAGENET_STD, f.dtype)]


def _embed_tubelets(f: InputFactory) -> list[Arguments]:
    weight = f.normal(f.shape.width, 3, f.shape.tubelet_size, f.shape.patch_size, f.shape.patch_size)
    return [(f.video(), weight, f.normal(f.shape.width), IMAGENET_MEAN, IMAGENET_STD)]


def _embed_tubelets_backward(f: InputFactory) -> list[Arguments]:
    grad = f.tokens(f.shape.num_tokens)
    return [(grad, f.video(), f.shape.tubelet_size, f.shape.patch_size, IMAGENET_MEAN, IMAGENET_STD)]


def _gather_tokens(f: InputFactory) -> list[Arguments]:
    split = f.split()
    return [(f.tokens(f.shape.num_tokens), split.visible_ids_BK, split.slots_BN, f.positions())]


def _assemble_decoder(f: InputFactory) -> list[Arguments]:
    split = f.split()
    visible = f.tokens(f.shape.num_visible)
    return [(visible, f.normal(f.shape.width), f.positions(), split.visible_ids_BK, split.masked_ids_BM)]


def _patch_targets(f: InputFactory) -> list[Arguments]:
    sizes = f.shape.tubelet_size, f.shape.patch_size
    return [(f.video(), f.split().masked_ids_BM, *sizes, target, f.dtype) for target in get_args(Target)]


def _masked_patch_loss(f: InputFactory) -> list[Arguments]:
    sizes = f.shape.tubelet_size, f.shape.patch_size
    return [
        (f.prediction(), f.video(), f.split().masked_ids_BM, *sizes, target, error)
        for target, error in product(get_args(Target), get_args(Error))
    ]


def _masked_patch_loss_backward(f: InputFactory) -> list[Arguments]:
    return [(f.per_masked(), *arguments) for arguments in _masked_patch_loss(f)]


def _head_patch_loss(f: InputFactory) -> list[Arguments]:
    sizes = f.shape.tubelet_size, f.shape.patch_size
    p, width = f.shape.pixels_per_token, f.shape.width
    return [
        (
            *(f.tokens(f.shape.num_masked), f.normal(p, width), f.normal(p)),
            *(f.video(), f.split().masked_ids_BM, *sizes, target, error, True),
        )
        for target, error in _EACH_TARGET_AND_ERROR
    ]


def _patch_loss_step(f: InputFactory) -> list[Arguments]:
    sizes = f.shape.tubelet_size, f.shape.patch_size
    # From inside one clip to inside another.
    total = f.shape.batch_size * f.shape.num_masked
    first, last = total // 5, total - total // 7
    return [
        (
            *(f.normal(last - first, f.shape.pixels_per_token), f.video(), f.split().masked_ids_BM),
            *(first, *sizes, target, error),
        )
        for target, error in _EACH_TARGET_AND_ERROR
    ]


def _sampling_loss(f: InputFactory) -> list[Arguments]:
    return [(f.logits(), f.split().masked_ids_BM, f.per_masked())]


OPERATION_INPUTS = {
    "patchify": OperationInputs(make=_patchify),
    "embed_tubelets": OperationInputs(make=_embed_tubelets, differentiable=(1, 2)),
    "embed_tubelets_backward": OperationInputs(make=_embed_tubelets_backward),
    "sample_visible": OperationInputs(make=lambda f: [(f.logits(), f.seeds(), f.shape.num_visible)]),
    "split_tokens": OperationInputs(make=lambda f: [(f.split().visible_ids_BK, f.shape.num_tokens)]),
    "gather_tokens": OperationInputs(make=_gather_tokens, differentiable=(0,)),
    "gather_tokens_backward": OperationInputs(make=lambda f: [(f.tokens(f.shape.num_visible), f.split().slots_BN)]),
    "assemble_decoder": OperationInputs(make=_assemble_decoder, differentiable=(0, 1)),
    "assemble_decoder_backward": OperationInputs(
        make=lambda f: [(f.tokens(f.shape.num_tokens), f.shape.num_visible, f.dtype)]
    ),
    "patch_targets": OperationInputs(make=_patch_targets),
    "masked_patch_loss": OperationInputs(make=_masked_patch_loss, differentiable=(0,)),
    "masked_patch_loss_backward": OperationInputs(make=_masked_patch_loss_backward),
    "head_patch_loss": OperationInputs(make=_head_patch_loss, differentiable=(0, 1, 2)),
    "patch_loss_step": OperationInputs(make=_patch_loss_step, written=(0,)),
    "sampling_loss": OperationInputs(make=_sampling_loss, differentiable=(0,)),
}
"""Inputs of every operation that ``adamae_fast.ops`` registers, by name."""


def scattered_in_memory(tensor: Tensor) -> Tensor:
    """The same values with gaps between them and the dimensions in reverse order: nothing contiguous about it."""
    reverse = tuple(reversed(range(tensor.dim())))
    gappy = torch.stack([tensor.permute(reverse)] * 2, dim=-1)[..., 0]
    return gappy.permute(reverse)


def assert_within_budget(actual: Tensor, formula: Tensor, truth: Tensor, *, largest_term: float = 0.0) -> None:
    """Raise AssertionError unless ``actual`` is about as right as plain PyTorch would be in its dtype.

    ``truth`` is the formula in fp64; ``formula`` is the same formula in ``actual``'s dtype. Every element of ``actual``
    must be finite and within 2 × the largest error of ``formula``, plus one rounding step of its own size, or of
    ``largest_term`` where terms of that size may cancel. fp64 results have no truth here: use torch.testing.
    """
    actual, formula, truth = actual.detach(), formula.detach(), truth.detach()
    if truth.dtype != torch.float64 or actual.dtype == torch.float64:
        raise AssertionError(f"truth is {truth.dtype} and the result {actual.dtype}; only the truth may be fp64")
    for name, tensor in (("formula", formula), ("truth", truth)):
        if tensor.shape != actual.shape:
            raise AssertionError(f"shape {tuple(actual.shape)}, but {name} has {tuple(tensor.shape)}")
    if not actual.isfinite().all():
        raise AssertionError(f"{int((~actual.isfinite()).sum())} of {actual.numel()} elements are not finite")
    if actual.dtype != formula.dtype:
        raise AssertionError(f"dtype {actual.dtype}, but the formula gives {formula.dtype}")
    allowed = 2 * _largest((formula.double() - truth).abs())
    step = torch.finfo(actual.dtype).eps * truth.abs().clamp(min=largest_term)
    excess = _largest((actual.double() - truth).abs() - step)
    if excess > allowed:
        raise AssertionError(
            f"error exceeds one rounding step by {excess:.3e}, allowed is {allowed:.3e}, twice that of plain PyTorch"
        )


def _largest(tensor: Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0


ODD_SHAPES = (
    OpShape(grid=(7, 3, 3), num_visible=1, width=60),
    OpShape(grid=(257, 1, 1), tubelet_size=1, patch_size=2, num_visible=200, width=384),
    OpShape(grid=(1, 9, 7), tubelet_size=3, patch_size=1, num_visible=40, width=1, batch_size=1),
    OpShape(grid=(7, 3, 3), num_visible=63, width=60),
    OpShape(grid=(1, 1, 1), num_visible=1, width=384),
)
"""Sizes at which kernels break: N 63, 257 and 1, K 1 and N, widths that no power of two divides."""
