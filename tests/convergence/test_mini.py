"""Thirty steps of a miniature AdaMAE: kernels and compiled blocks train as plain PyTorch does, step by step.

In a process of its own, with ``-p tests.kernels.interpreter``, the same test compares the Triton kernels. The error is
squared: an absolute error has a slope that jumps, and any rounding becomes another curve.

What the backward computes again (train.recompute) is the same arithmetic, so there the curves are the same.
"""

import os
import shutil
from typing import get_args

import pytest
import torch

from adamae_fast.config import (
    AttentionConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    Recompute,
    SamplerConfig,
    TrainConfig,
)
from adamae_fast.testing import prefer
from adamae_fast.train.compile import compile_blocks
from adamae_fast.train.step import Stepper

STEPS = 30
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
SIZES = {"size": "nano", "num_frames": 4, "frame_size": 24, "tubelet_size": 2, "patch_size": 8}  # 18 tokens


def train(
    impl: str,
    dtype: torch.dtype,
    target: str,
    device: str,
    *,
    recompute: Recompute = "none",
    dropout: float = 0.0,
    compiler: str | None = None,
    attention: str = "auto",
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss of each step in fp64, and which tokens were visible."""
    config = PretrainConfig(
        model=ModelConfig(
            **SIZES,
            sampler=SamplerConfig(dropout=dropout),
            attention=AttentionConfig(encoder=attention, sampler=attention, decoder=attention),
        ),
        mask=MaskConfig(ratio=0.75),
        loss=LossConfig(target=target),
        optim=OptimConfig(),
        train=TrainConfig(precision="fp32", recompute=recompute),
    )
    stepper = Stepper(config, torch.device(device))
    stepper.model.to(dtype)
    if compiler:
        torch._dynamo.reset()
        compile_blocks(stepper.model, compiler)
    losses, visible_ids = [], []
    stepper.model.register_forward_hook(lambda _, __, output: losses.append(output.loss.detach().double().cpu()))
    stepper.model.register_forward_hook(lambda _, __, output: visible_ids.append(output.visible_ids.cpu()))
    generator = torch.Generator().manual_seed(0)
    videos = torch.randint(0, 256, (2, 3, 4, 24, 24), dtype=torch.uint8, generator=generator)
    with prefer(impl):
        for step in range(STEPS):
            stepper.begin(step, learning_rate=1e-3)
            stepper.accumulate(videos)
            stepper.finish(step)
    return torch.stack(losses), visible_ids


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("target", ["normalized", "mae_st"])
def test_kernels_train_as_the_references_do(target: str, device: str) -> None:
    assert_trains_as_the_reference(target, device)


# torch hides this one from its users, though not from a filter that makes errors of warnings.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# Inductor's advice on a GPU; fp32 is what is compared.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="compiled blocks hold no kernel that is interpreted")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiled_blocks_train_as_the_references_do(compiler: str, device: str) -> None:
    assert_trains_as_the_reference("normalized", device, compiler)


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("sdpa", "cpu"),
        ("sdpa_flash", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("sdpa", "sdpa_efficient")),
    ],
)
def test_attention_back_ends_train_as_the_formula_does(backend: str, device: str) -> None:
    """Those that take fp32."""
    assert_trains_as_the_reference("normalized", device, attention=backend, formula="reference")


def assert_trains_as_the_reference(
    target: str, device: str, compiler: str | None = None, attention: str = "auto", formula: str = "auto"
) -> None:
    """``formula``: the attention of the references."""
    truth, ids_of_truth = train("reference", torch.float64, target, device, attention=formula)
    reference, ids_of_reference = train("reference", torch.float32, target, device, attention=formula)
    kernels, ids_of_kernels = train("auto", torch.float32, target, device, compiler=compiler, attention=attention)
    assert truth[-5:].mean() < truth[:5].mean()
    # Masks are the same to the last token, or a loss would differ by more than rounding.
    for ids in (ids_of_reference, ids_of_kernels):
        assert all(map(torch.equal, ids, ids_of_truth))
    # Rounding adds up over the steps, for kernels no more than for plain PyTorch, but with other accidents.
    rounding = torch.finfo(torch.float32).eps * truth.abs()
    allowed = 4 * ((reference - truth).abs().cummax(0).values + rounding)
    assert ((kernels - truth).abs() <= allowed).all()


def test_recompute_policies_train_alike() -> None:
    """With dropout, whose masks must be those of the forward."""
    curves = {
        policy: train("auto", torch.float32, "normalized", "cpu", recompute=policy, dropout=0.1)
        for policy in get_args(Recompute)
    }
    kept, ids_of_kept = curves.pop("none")
    assert kept[-5:].mean() < kept[:5].mean()
    for policy, (losses, ids) in curves.items():
        assert torch.equal(losses, kept), policy
        assert all(map(torch.equal, ids, ids_of_kept)), policy
