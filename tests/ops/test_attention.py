import logging

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from adamae_fast.ops import attention as module
from adamae_fast.ops.attention import BACKENDS, AttentionBackend, attention
from adamae_fast.testing import assert_within_budget, scattered_in_memory

NAMES = [backend.name for backend in BACKENDS]
every_backend = pytest.mark.parametrize("backend", NAMES)


def make(num_tokens: int = 7, head_dim: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, num_tokens, 3, head_dim, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    )
    return q, k, v


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Clip by clip and head by head."""
    outputs = torch.empty_like(q, requires_grad=False)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T / q.shape[3] ** 0.5
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            outputs[b, :, h] = weights @ v[b, :, h]
    return outputs


@every_backend
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 8), (63, 60), (257, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients_equal_the_formula(
    backend: str, num_tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    inputs = make(num_tokens, head_dim, dtype)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def with_gradients(function, inputs, grad: Tensor) -> list[Tensor]:
        output = function(*inputs)
        return [output, *torch.autograd.grad(output, inputs, grad)]

    in_double = [x.detach().double().requires_grad_() for x in inputs]
    truth, plain = with_gradients(formula, in_double, grad.double()), with_gradients(formula, inputs, grad)
    actual = with_gradients(lambda *qkv: attention(*qkv, backend=backend), inputs, grad)
    for x, in_dtype, exact in zip(actual, plain, truth, strict=True):
        assert x.shape == inputs[0].shape
        if dtype == torch.float64:
            torch.testing.assert_close(x, exact)
        else:
            # Inside a softmax's gradient, numbers of the incoming gradient's size cancel.
            assert_within_budget(x, in_dtype, exact, largest_term=float(grad.abs().max()))


@every_backend
def test_gradcheck_and_any_strides(backend: str) -> None:
    inputs = make(4, 3)
    assert gradcheck(lambda *qkv: attention(*qkv, backend=backend), inputs)
    expected = attention(*inputs, backend=backend)
    torch.testing.assert_close(attention(*(scattered_in_memory(x) for x in inputs), backend=backend), expected)
    packed = torch.stack(inputs, dim=2)  # as one projection to q, k and v gives them
    torch.testing.assert_close(attention(*packed.unbind(2), backend=backend), expected)


@pytest.mark.parametrize("backend", ["auto", *NAMES])
def test_compiles_into_one_graph(backend: str) -> None:
    inputs = make()
    compiled = torch.compile(lambda *qkv: attention(*qkv, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), attention(*inputs, backend=backend))


def test_reference_stays_exact_under_autocast() -> None:
    inputs = make(dtype=torch.float32)
    expected = attention(*inputs, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*inputs, backend="reference"), expected)
        assert attention(*inputs).dtype == torch.bfloat16  # PyTorch's own rule for its fused attention


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_logged", set())
    with caplog.at_level(logging.DEBUG, logger="adamae_fast"):
        for dtype in (torch.float64, torch.float32, torch.float64):
            attention(*make(dtype=dtype))
        attention(*make(), backend="reference")
    assert [record.message for record in caplog.records] == [
        f"attention on cpu, {dtype}, head dim 5: sdpa" for dtype in (torch.float64, torch.float32)
    ]


def refuse(reason: str) -> AttentionBackend:
    def run(*_: Tensor) -> Tensor:
        raise AssertionError("a back end that refuses was run")

    return AttentionBackend(name=reason, reasons_unsupported=lambda *_: [f"no {reason} here"], run=run)


def test_auto_passes_over_back_ends_that_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make()
    monkeypatch.setattr(module, "BACKENDS", (refuse("flash"), *BACKENDS))
    assert torch.equal(attention(*inputs), attention(*inputs, backend="sdpa"))


def test_an_explicit_request_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKENDS", (refuse("flash"), *BACKENDS))
    with pytest.raises(ValueError, match=r"q of shape \(2, 7, 3, 5\), torch.float64, cpu. flash: no flash here$"):
        attention(*make(), backend="flash")


def test_error_gives_every_back_ends_reasons() -> None:
    q, k, v = (x.detach() for x in make())
    reasons = r"k is torch.float32 but q is torch.float64; v is on meta but q is on cpu"
    with pytest.raises(ValueError, match=rf"sdpa: {reasons}. reference: {reasons}"):
        attention(q, k.float(), v.to("meta"))
    with pytest.raises(ValueError, match=r"q is torch.int64, attention needs a floating-point dtype"):
        attention(q.long(), k.long(), v.long(), backend="sdpa")


def test_names_what_is_wrong() -> None:
    q, k, v = make()
    with pytest.raises(ValueError, match=r"backend='flash': choose auto or one of sdpa, reference"):
        attention(q, k, v, backend="flash")
    with pytest.raises(ValueError, match=r"shapes \(2, 7, 3, 5\), \(2, 6, 3, 5\), \(2, 7, 3, 5\)"):
        attention(q, k[:, 1:], v)
