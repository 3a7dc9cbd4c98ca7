"""The CUDA C++ kernel on a GPU, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from adamae_fast.ops import library
from adamae_fast.ops.sample_visible import sample_visible

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(library.reason_missing_cuda is not None, reason=f"CUDA C++: {library.reason_missing_cuda}"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "num_visible"), [(1568, 78), (63, 7), (1, 1), (257, 257), (8191, 410)])
def test_draws_as_the_reference_does(num_tokens: int, num_visible: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    logits_BN = torch.randn(5, 2 * num_tokens, generator=generator)[:, ::2].to(dtype)
    seeds_B = torch.randint(-(2**63), 2**63 - 1, (5,), generator=generator)
    drawn = sample_visible(logits_BN.cuda(), seeds_B.cuda(), num_visible, impl="cuda")
    expected = sample_visible(logits_BN, seeds_B, num_visible, impl="reference")
    for result, truth in zip(drawn[:3], expected[:3], strict=True):
        assert torch.equal(result.cpu(), truth)
    torch.testing.assert_close(drawn.statistics_B3.cpu(), expected.statistics_B3, rtol=1e-5, atol=1e-5)


def test_no_clip_is_no_launch() -> None:
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    split = sample_visible(torch.zeros(0, 9, device="cuda"), none, 2, impl="cuda")
    assert [tuple(result.shape) for result in split] == [(0, 2), (0, 7), (0, 9), (0, 3)]


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "message"),
    [(8193, torch.float32, "takes at most 8192"), (9, torch.float64, "takes Float, BFloat16 and Half")],
)
def test_what_it_cannot_take_is_an_error(num_tokens: int, dtype: torch.dtype, message: str) -> None:
    seeds = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match=message):
        sample_visible(torch.zeros(1, num_tokens, dtype=dtype, device="cuda"), seeds, 1, impl="cuda")
