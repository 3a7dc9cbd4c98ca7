"""Every implementation of every registered operation, whatever it computes.

Tracing, autograd and compilation know it, any strides will do, memory that it did not write never shows.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils import _pytree as pytree

import adamae_fast.ops
from adamae_fast.ops.assemble_decoder import assemble_decoder
from adamae_fast.ops.gather_tokens import gather_tokens
from adamae_fast.ops.head_patch_loss import head_patch_loss
from adamae_fast.ops.masked_patch_loss import masked_patch_loss, patch_targets
from adamae_fast.ops.patchify import embed_tubelets, patchify
from adamae_fast.ops.registry import registered_names
from adamae_fast.ops.sample_visible import sample_visible, split_tokens
from adamae_fast.ops.sampling_loss import sampling_loss
from adamae_fast.testing import ODD_SHAPES, OPERATION_INPUTS, InputFactory, OpShape, scattered_in_memory
from tests.ops.conftest import needs_cpp

for module in pkgutil.iter_modules(adamae_fast.ops.__path__):
    importlib.import_module(f"adamae_fast.ops.{module.name}")

every_operation = pytest.mark.parametrize("name", registered_names())
every_gradient = pytest.mark.parametrize("name", [n for n, inputs in OPERATION_INPUTS.items() if inputs.differentiable])

DEVICES = {"reference": "cpu", "cpp": "cpu", "triton": "cuda"}


SHAPE = OpShape(grid=(3, 1, 2), num_visible=2)
"""Few tokens: where Triton's interpreter runs these tests, each takes milliseconds."""

TRITON = pytest.param("triton", marks=pytest.mark.gpu)


@pytest.fixture(params=["reference", pytest.param("cpp", marks=needs_cpp), TRITON])
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation, on the device that it is for."""
    return request.param


def factory(impl: str, shape: OpShape, *, dtype: torch.dtype = torch.float32) -> InputFactory:
    if impl == "triton" and dtype == torch.float64:
        dtype = torch.float32  # in fp64 the dispatcher takes the reference, which is tested by itself
    return InputFactory(shape, dtype=dtype, device=DEVICES[impl])


def operation(name: str, impl: str):
    """The overload that runs the reference, or the one for which the dispatcher prefers C++ or, on CUDA, Triton."""
    packet = getattr(torch.ops.adamae_fast, name)
    return packet.reference if impl == "reference" else packet.default


def results(name: str, impl: str, arguments) -> list[Tensor]:
    return OPERATION_INPUTS[name].results(operation(name, impl), arguments)


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(function, arguments):
    return pytree.tree_map_only(Tensor, function, arguments)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    was_enabled, was_filling = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was_enabled)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling


def test_no_operation_escapes() -> None:
    assert registered_names() == sorted(OPERATION_INPUTS)


@every_operation
@pytest.mark.parametrize("layout", ["contiguous", "scattered"])
def test_opcheck(name: str, impl: str, layout: str) -> None:
    inputs = OPERATION_INPUTS[name]
    for arguments in inputs.make_requiring_grad(factory(impl, SHAPE)):
        if layout == "scattered":
            arguments = map_tensors(
                lambda x: scattered_in_memory(x.detach()).requires_grad_(x.requires_grad), arguments
            )
        torch.library.opcheck(operation(name, impl), arguments)


@every_gradient
def test_gradcheck(name: str, impl: str) -> None:
    if impl == "triton":
        pytest.skip("fp64 is not for these kernels; their gradients are compared with fp64 in the contract")
    small = OpShape(grid=(2, 1, 2), tubelet_size=1, patch_size=2, num_visible=2, width=3)
    for arguments in OPERATION_INPUTS[name].make_requiring_grad(factory(impl, small, dtype=torch.float64)):
        assert gradcheck(operation(name, impl), arguments)


@every_gradient
def test_has_no_second_derivative_and_says_so(name: str, impl: str) -> None:
    inputs = OPERATION_INPUTS[name]
    arguments = inputs.make_requiring_grad(factory(impl, SHAPE))[0]
    output = results(name, impl, arguments)[0]
    weights = torch.ones_like(output).requires_grad_()
    (grad, *_) = torch.autograd.grad(output, arguments[inputs.differentiable[0]], weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_operation
def test_compiles_into_one_graph(name: str, impl: str) -> None:
    inputs = OPERATION_INPUTS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: operation(name, impl)(*arguments), fullgraph=True, backend="aot_eager")
    arguments = inputs.make_requiring_grad(factory(impl, SHAPE))[0]
    expected, actual = results(name, impl, arguments), inputs.results(compiled, arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    leaves = [arguments[i] for i in inputs.differentiable]
    if leaves:
        gradients = [torch.autograd.grad(output[0].sum(), leaves) for output in (actual, expected)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_public_functions_compile_into_one_graph(dynamic: bool, impl: str, each_impl: None) -> None:
    """Their checks, too, can be traced."""
    shape = SHAPE
    sizes = {"tubelet_size": shape.tubelet_size, "patch_size": shape.patch_size}

    def step(video: Tensor, weight: Tensor, bias: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        tokens = embed_tubelets(video, weight, bias)
        logits = tokens.mean(2)
        split = sample_visible(logits, seeds, shape.num_visible)
        split = split_tokens(split.visible_ids_BK, shape.num_tokens)
        visible = gather_tokens(tokens, split.visible_ids_BK, split.slots_BN, positions)
        decoded = assemble_decoder(visible, bias, positions, split.visible_ids_BK, split.masked_ids_BM)
        prediction = decoded[:, shape.num_visible :] @ weight.flatten(1)
        loss = {"target": "normalized", "error": "mse"} | sizes
        error = masked_patch_loss(prediction, video, split.masked_ids_BM, **loss)
        hidden, head = decoded[:, shape.num_visible :], weight.flatten(1).T
        head_loss, _ = head_patch_loss(hidden, head, head.mean(1), video, split.masked_ids_BM, **loss)
        targets = patch_targets(video, split.masked_ids_BM, **sizes, target="mae_st")
        constant = patchify(video, **sizes).mean() + targets.mean()
        return error.mean() + sampling_loss(logits, split.masked_ids_BM, error).mean() + constant + head_loss

    drawn = factory(impl, shape)
    video, weight, bias, *_ = OPERATION_INPUTS["embed_tubelets"].make_requiring_grad(drawn)[0]
    inputs = video, weight, bias, drawn.seeds(), drawn.positions()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, actual = step(*inputs), compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(loss, (weight, bias)) for loss in (actual, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


@every_operation
def test_takes_any_strides(name: str, impl: str) -> None:
    for arguments in OPERATION_INPUTS[name].make(factory(impl, SHAPE, dtype=torch.float64)):
        scattered = map_tensors(scattered_in_memory, arguments)
        assert not any(x.is_contiguous() for x in tensors(scattered))
        expected, actual = results(name, impl, arguments), results(name, impl, scattered)
        assert all(x.is_contiguous() for x in expected + actual)
        torch.testing.assert_close(actual, expected)


@every_operation
def test_takes_a_tensor_that_is_one_number_many_times(name: str, impl: str) -> None:
    """The gradient of a sum is one number expanded; ids must stay distinct and keep their values.

    What is written to must have a place for each number.
    """

    def one_number(x: Tensor) -> Tensor:
        return x if x.dtype == torch.int64 else x.flatten()[0].expand(x.shape)

    inputs = OPERATION_INPUTS[name]
    for arguments in inputs.make(factory(impl, SHAPE, dtype=torch.float64)):
        expanded = [x if i in inputs.written else map_tensors(one_number, x) for i, x in enumerate(arguments)]
        copied = map_tensors(Tensor.contiguous, expanded)
        torch.testing.assert_close(results(name, impl, expanded), results(name, impl, copied))


@every_gradient
def test_gradient_of_a_sum(name: str, impl: str) -> None:
    inputs = OPERATION_INPUTS[name]
    for arguments in inputs.make_requiring_grad(factory(impl, SHAPE, dtype=torch.float64)):
        leaves = [arguments[i] for i in inputs.differentiable]
        output = results(name, impl, arguments)[0]
        from_sum = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
        torch.testing.assert_close(from_sum, torch.autograd.grad(output, leaves, torch.ones_like(output)))


@every_operation
def test_repeats_bit_by_bit_and_leaves_its_inputs_alone(name: str, impl: str) -> None:
    for arguments in OPERATION_INPUTS[name].make(factory(impl, SHAPE)):
        before = map_tensors(Tensor.clone, arguments)
        first, second = (results(name, impl, arguments) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(tensors(arguments), tensors(before), rtol=0, atol=0)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name: str, impl: str, dtype: torch.dtype) -> None:
    """Which dtype a model computes in is decided where the operation is called, once, and not inside."""
    for arguments in OPERATION_INPUTS[name].make(factory(impl, SHAPE, dtype=dtype)):
        expected = results(name, impl, arguments)
        with torch.autocast(DEVICES[impl], torch.bfloat16):
            torch.testing.assert_close(results(name, impl, arguments), expected, rtol=0, atol=0)


@every_operation
def test_reference_never_reads_a_value_back_from_the_device(name: str, impl: str) -> None:
    """Tensors on the meta device have no values: nonzero, a boolean index or .item() would raise."""
    no_kernel_but_the_reference = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    for arguments in OPERATION_INPUTS[name].make(factory(impl, SHAPE)):
        without_values = map_tensors(lambda x: x.to("meta"), arguments)
        run = partial(operation(name, impl).redispatch, no_kernel_but_the_reference)
        actual = OPERATION_INPUTS[name].results(run, without_values)
        for x, expected in zip(actual, results(name, impl, arguments), strict=True):
            assert (x.shape, x.dtype, x.stride()) == (expected.shape, expected.dtype, expected.stride())


@every_operation
def test_implementations_agree_at_odd_shapes(name: str, impl: str) -> None:
    """Ids and places exactly; numbers as closely as fp64 lets them."""
    if impl == "triton":
        pytest.skip("the contract compares with fp64 at odd shapes")
    # A loss over no token at all is an error of the public function.
    shapes = [shape for shape in ODD_SHAPES if shape.num_masked or not name.startswith("sampling_loss")]
    for shape in shapes:
        for arguments in OPERATION_INPUTS[name].make(factory(impl, replace(shape, batch_size=2), dtype=torch.float64)):
            expected, actual = (results(name, x, arguments) for x in ("reference", impl))
            for x, y in zip(actual, expected, strict=True):
                exact = {} if y.is_floating_point() else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(x, y, **exact, equal_nan=True)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_element_is_written(name: str, impl: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    """Memory that torch.empty hands out is full of NaN, or of the largest integer, and none of it may stay."""
    assert torch.empty(3).isnan().all()
    for arguments in OPERATION_INPUTS[name].make(factory(impl, SHAPE, dtype=dtype)):
        for x in results(name, impl, arguments):
            assert x.isfinite().all() if x.is_floating_point() else (x < 2**62).all()


@every_operation
def test_the_number_of_threads_changes_no_bit(name: str, impl: str) -> None:
    """The shape is large enough for every parallel loop to be split."""
    shape = OpShape(batch_size=4, grid=(8, 14, 14), patch_size=4, num_visible=78, width=96)
    arguments = OPERATION_INPUTS[name].make(factory(impl, shape))[0]
    if name.startswith(("embed_tubelets", "head_patch_loss")):
        pytest.skip("PyTorch's own matrix product depends on it")
    outputs = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        outputs.append(results(name, impl, arguments))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
