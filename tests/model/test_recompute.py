"""What the backward keeps, and that computing the rest again changes no result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adamae_fast import AdaMAE
from adamae_fast.config import MaskConfig, ModelConfig, PretrainConfig, Recompute, TrainConfig
from adamae_fast.device import arithmetic
from adamae_fast.model.adamae import AdaMAEOutput
from adamae_fast.model.block import Block
from adamae_fast.model.layers import Dropout, LayerNorm, norm_linear, norm_mlp
from adamae_fast.train.step import Stepper

POLICIES = get_args(Recompute)
TINY = ModelConfig(size="nano", num_frames=4, frame_size=24, patch_size=8)  # 18 tokens; dropout 0.1 in the sampler
CPU = torch.device("cpu")
every_policy = pytest.mark.parametrize("policy", POLICIES[1:])
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def build(device: str = "cpu", dtype: torch.dtype = torch.float32) -> AdaMAE:
    torch.manual_seed(0)
    return AdaMAE(TINY, MaskConfig(ratio=0.75)).to(device, dtype).train()


def video(batch_size: int = 2, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, 3, 4, 24, 24), dtype=torch.uint8, generator=generator).to(device)


def forward(model: AdaMAE, clips: Tensor, precision: str) -> AdaMAEOutput:
    torch.manual_seed(1)
    seeds = torch.arange(len(clips), device=clips.device)
    with nullcontext() if precision == "fp64" else arithmetic(clips.device, precision):
        return model(clips, seeds=seeds)


def gradients(model: AdaMAE, clips: Tensor, precision: str) -> tuple[AdaMAEOutput, tuple[Tensor, ...]]:
    output = forward(model, clips, precision)
    # fp16 needs a loss scale; a power of two changes no bit of what does not underflow.
    scaled = output.loss * 1024
    return output, torch.autograd.grad(scaled, tuple(model.parameters()))


@every_policy
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_loss_and_gradients_are_the_same_to_the_last_bit(policy: Recompute, precision: str) -> None:
    model = build(dtype=torch.float64 if precision == "fp64" else torch.float32)
    kept, expected = gradients(model, video(), precision)
    model.set_recompute(policy)
    output, actual = gradients(model, video(), precision)
    assert kept.loss.isfinite()
    assert torch.equal(output.loss, kept.loss)
    assert torch.equal(output.masked_ids, kept.masked_ids)
    for name, a, b in zip(dict(model.named_parameters()), actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


@every_policy
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss_and_gradients_on_a_gpu(policy: Recompute, precision: str) -> None:
    """Within rounding: whatever adds up in another order there may round otherwise."""
    model, clips = build("cuda"), video(device="cuda")
    kept, expected = gradients(model, clips, precision)
    model.set_recompute(policy)
    output, actual = gradients(model, clips, precision)
    tolerance = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}[precision]
    assert torch.equal(output.masked_ids, kept.masked_ids)
    torch.testing.assert_close(output.loss, kept.loss, rtol=tolerance, atol=0)
    for name, a, b in zip(dict(model.named_parameters()), actual, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-6, name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.gpu
def test_a_captured_block_repeats_itself(policy: Recompute) -> None:
    """Forward and backward in a CUDA graph: no host wait, no generator's state read; new dropout at every replay."""
    torch.manual_seed(0)
    block = Block(64, 2, dropout=0.5).cuda().train()
    block.recompute = policy
    x = torch.randn(2, 16, 64, device="cuda", requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            result = block(x)
        return result, *torch.autograd.grad(result.float().square().sum(), (x, *block.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    first = [r.clone() for r in results]
    graph.replay()
    assert all(r.isfinite().all() for r in (*first, *results))
    assert not torch.equal(first[0], results[0])


@every_policy
def test_the_backward_draws_no_random_number(policy: Recompute) -> None:
    model = build()
    model.set_recompute(policy)
    output = forward(model, video(), "fp32")
    state = torch.get_rng_state()
    output.loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


@every_policy
def test_a_graph_can_be_walked_twice(policy: Recompute) -> None:
    model = build()
    model.set_recompute(policy)
    loss = forward(model, video(), "fp32").loss
    first, second = (torch.autograd.grad(loss, tuple(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


# How many elements a block keeps for each token and channel, what its docstring promises.
ELEMENTS = {"none": 16, "pointwise": 10, "fc1": 6, "block": 2}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 18, 64, 2), (1, 63, 48, 4), (3, 1, 16, 1)])
def test_a_block_keeps_exactly_what_it_promises(
    policy: Recompute, precision: str, dropout: float, shape: tuple[int, int, int, int]
) -> None:
    batch_size, num_tokens, width, num_heads = shape
    block = Block(width, num_heads, dropout=dropout).train()
    block.recompute = policy
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    x = torch.randn(batch_size, num_tokens, width, dtype=dtype, requires_grad=True)
    weights = {tuple(sorted(p.shape)) for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Of parameters, casts are kept; they do not grow with the batch.
        if tuple(sorted(tensor.shape)) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), arithmetic(CPU, precision):
        result = block(x)
    num_rows = batch_size * num_tokens
    # fp32: mean and deviation of each LayerNorm, log Σ exp of each head.
    statistics = 4 * num_rows * ({"block": 2}.get(policy, 4) + (num_heads if policy != "block" else 0))
    masks = 2 * num_rows * width if dropout else 0
    elements = ELEMENTS[policy] * num_rows * width * dtype.itemsize
    assert result.dtype == dtype
    assert sum(kept.values()) == elements + statistics + masks


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recompute='all': choose one of none, pointwise, fc1, block"):
        build().set_recompute("all")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_reaches_every_block_and_no_weight(policy: Recompute) -> None:
    config = PretrainConfig(model=TINY, mask=MaskConfig(ratio=0.75), train=TrainConfig(recompute=policy))
    stepper = Stepper(config, CPU)
    blocks = [m for m in stepper.model.modules() if isinstance(m, Block)]
    assert len(blocks) == 1 + 4 + 2
    assert {block.recompute for block in blocks} == {policy}
    assert stepper.model.state_dict().keys() == build().state_dict().keys()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_residual_stream_is_as_short_as_the_products(policy: Recompute) -> None:
    """Under autocast no block, and no LayerNorm, takes or makes fp32."""
    model = build()
    model.set_recompute(policy)
    seen = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        seen.update((type(module).__name__, x.dtype) for x in (*inputs, result))

    for module in model.modules():
        if isinstance(module, Block | LayerNorm):
            module.register_forward_hook(note)
    forward(model, video(), "bf16")
    assert seen == {("Block", torch.bfloat16), ("LayerNorm", torch.bfloat16)}


def layers(dtype: torch.dtype, width: int = 6, hidden: int = 10) -> tuple[LayerNorm, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    norm, fc1, fc2 = LayerNorm(width, eps=1e-5), nn.Linear(width, hidden), nn.Linear(hidden, width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype), fc1.to(dtype), fc2.to(dtype)


def fused(kind: str, norm: LayerNorm, fc1: nn.Linear, fc2: nn.Linear) -> Callable[[Tensor], Tensor]:
    return {
        "linear": lambda x: norm_linear(x, norm, fc1.weight, fc1.bias),
        "linear without bias": lambda x: norm_linear(x, norm, fc1.weight, None),
        "mlp, hidden kept": lambda x: norm_mlp(x, norm, fc1, fc2, keep_hidden=True),
        "mlp": lambda x: norm_mlp(x, norm, fc1, fc2, keep_hidden=False),
    }[kind]


every_kind = pytest.mark.parametrize("kind", ["linear", "linear without bias", "mlp, hidden kept", "mlp"])


@every_kind
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    modules = layers(torch.float64)
    function = fused(kind, *modules)
    parameters = [p for module in modules for p in module.parameters()]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    used = torch.autograd.grad(function(x).sum(), parameters, allow_unused=True)
    parameters = [p for p, grad in zip(parameters, used, strict=True) if grad is not None]
    # The modules' own parameters are moved in place by gradcheck: what the function sees is what is checked.
    assert torch.autograd.gradcheck(lambda x, *_: function(x), (x, *parameters))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


# Matrix products of a backward that needs the gradient of one input alone.
PRODUCTS = {
    "linear": {"x": 1, "norm.weight": 1, "norm.bias": 1, "fc1.weight": 1, "fc1.bias": 0},
    "linear without bias": {"x": 1, "norm.weight": 1, "norm.bias": 1, "fc1.weight": 1},
    "mlp, hidden kept": {"x": 2, "norm.weight": 2, "norm.bias": 2, "fc1.weight": 2, "fc1.bias": 1}
    | {"fc2.weight": 1, "fc2.bias": 0},
    "mlp": {"x": 3, "norm.weight": 3, "norm.bias": 3, "fc1.weight": 3, "fc1.bias": 2, "fc2.weight": 2, "fc2.bias": 0},
}


@every_kind
def test_gradients_that_nobody_needs_are_not_computed(kind: str) -> None:
    norm, fc1, fc2 = layers(torch.float32)
    x = torch.randn(2, 3, 6)
    modules = (("norm", norm), ("fc1", fc1), ("fc2", fc2))
    inputs = {"x": x} | {f"{m}.{p}": value for m, module in modules for p, value in module.named_parameters()}
    function, names = fused(kind, norm, fc1, fc2), list(PRODUCTS[kind])
    for value in inputs.values():
        value.requires_grad_(True)
    expected = dict(
        zip(names, torch.autograd.grad(function(x).square().sum(), [inputs[n] for n in names]), strict=True)
    )
    for name in names:
        for key, value in inputs.items():
            value.requires_grad_(key == name)
        result = function(x).square().sum()
        with Products() as products:
            (actual,) = torch.autograd.grad(result, [inputs[name]])
        assert torch.equal(actual, expected[name]), name
        assert products.count == PRODUCTS[kind][name], name


@every_kind
@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_of_input_and_gradient(kind: str, device: str, dtype: torch.dtype) -> None:
    """Against the formula in fp64, with an input and a gradient that are views, and a gradient of stride 0."""
    norm, fc1, fc2 = (module.to(device) for module in layers(dtype))
    x = torch.randn(6, 3, 5, dtype=dtype, device=device).permute(2, 1, 0).requires_grad_()
    result = fused(kind, norm, fc1, fc2)(x)
    width = result.shape[2]
    views = (
        torch.randn(width, 3, 5, device=device).permute(2, 1, 0),
        torch.ones((), device=device).expand(5, 3, width),
    )
    double = [p.detach().double().requires_grad_() for p in (x, *norm.parameters(), *fc1.parameters())]
    wide, gamma, beta, weight, bias = double
    expected = F.linear(F.layer_norm(wide, (6,), gamma, beta, 1e-5), weight, None if "without" in kind else bias)
    if "mlp" in kind:
        expected = F.linear(F.gelu(expected), fc2.weight.double(), fc2.bias.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()
    checked = [(x, wide), (norm.weight, gamma), (norm.bias, beta), (fc1.weight, weight)]
    for grad in views:
        actual = torch.autograd.grad(result, [a for a, _ in checked], grad.to(dtype), retain_graph=True)
        truth = torch.autograd.grad(expected, [b for _, b in checked], grad.double(), retain_graph=True)
        for a, b in zip(actual, truth, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_compiles_in_one_piece(policy: Recompute) -> None:
    torch.manual_seed(0)
    block = Block(16, 2).train()
    block.recompute = policy
    x = torch.randn(2, 5, 16, requires_grad=True)
    leaves = (x, *block.parameters())
    expected = torch.autograd.grad(block(x).square().sum(), leaves)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(x).square().sum(), leaves)
    torch._dynamo.reset()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("policy", "elements"), [*ELEMENTS.items()])
def test_a_compiled_block_keeps_no_more(policy: Recompute, elements: int) -> None:
    """Where equal computations are not merged: otherwise the compiler keeps what was to be computed again."""
    block = Block(32, 2).train()
    block.recompute = policy
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # The compiler saves a generator's state for attention, which could have dropout.
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch._functorch.config.patch(cse=False, enable_autograd_cache=False),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        result = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)(
            torch.randn(2, 9, 32, requires_grad=True)
        )
    result.sum().backward()
    torch._dynamo.reset()
    statistics = 4 * 2 * 9 * (4 + 2)
    assert sum(kept.values()) <= 4 * 2 * 9 * 32 * elements + statistics


@every_device
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_layer_norm_gives_its_inputs_dtype_and_rounds_once(device: str, precision: str) -> None:
    """The formula in fp64, half a unit in the last place away, and fp32 arithmetic; on a GPU with rounded weights."""
    norm = layers(torch.float32, width=64)[0].to(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    x = torch.randn(50, 64, device=device).to(dtype) + 3
    with arithmetic(x.device, precision):
        result = norm(x)
    assert result.dtype == dtype
    weight, bias = (p.to(dtype) if device == "cuda" else p for p in (norm.weight, norm.bias))
    expected = F.layer_norm(x.double(), (64,), weight.double(), bias.double(), 1e-5)
    assert (
        (result - expected).abs() <= torch.finfo(dtype).eps / 2 * expected.abs() + 3e-6 * (1 + expected.abs())
    ).all()


@every_device
def test_dropout_is_as_pytorchs_and_keeps_one_byte(device: str) -> None:
    dropout, x = Dropout(0.25), torch.rand(200, 300, device=device).add(1).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = dropout.train()(x)
    assert [tensor.dtype for tensor in kept] == [torch.bool]
    is_kept = result != 0
    torch.testing.assert_close(result[is_kept], x[is_kept] / 0.75)
    share = is_kept.double().mean().item()
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / x.numel()) ** 0.5
    (grad,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(grad, is_kept / 0.75)
    assert dropout.eval()(x) is x
