"""The C++ library: asked for by name, missing, built for something else, or called with what it cannot take."""

import logging
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamae_fast import info
from adamae_fast.ops import library, registry
from adamae_fast.ops.patchify import embed_tubelets, patchify
from adamae_fast.ops.sample_visible import split_tokens
from adamae_fast.testing import OPERATION_INPUTS, InputFactory, OpShape

needs_cpp = pytest.mark.skipif(library.reason_missing is not None, reason=f"C++ operations: {library.reason_missing}")
VIDEO = torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8)
SIZES = {"tubelet_size": 2, "patch_size": 2}


def test_a_library_that_was_not_built_is_said_to_be_so(tmp_path: Path) -> None:
    assert "not built; with a compiler, build it again" in library.load(tmp_path / "_C.abi3.so", "a compiler")


def test_a_library_for_another_torch_is_named(tmp_path: Path) -> None:
    path = tmp_path / "_C.abi3.so"
    path.write_bytes(b"\x7fELF adamae_fast built for torch 2.10.0+cu130\0")
    reason = library.load(path, "a compiler")
    assert f"built for torch 2.10.0+cu130, running is torch {torch.__version__}" in reason


def test_a_library_for_a_newer_processor_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_C.abi3.so"
    path.write_bytes(b"adamae_fast needs AVX2\0")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in library.load(path, "a compiler")


@needs_cpp
def test_the_library_knows_what_it_was_built_for() -> None:
    assert torch.__version__.startswith(library.built_for(library.PATH))


@pytest.mark.parametrize(
    ("name", "attribute", "lost"),
    [("cpp", "reason_missing", "references"), ("cuda", "reason_missing_cuda", "impl='cuda' cannot be asked for")],
)
def test_info_says_what_is_lost(name: str, attribute: str, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, attribute, "not built")
    backends = {backend.name: backend for backend in info.collect()[1]}
    assert not backends[name].available
    assert backends[name].detail.startswith("not built")
    assert lost in backends[name].detail


@pytest.mark.parametrize(
    ("impl", "device", "message"),
    [
        ("fast", "cpu", "impl='fast': choose one of auto, triton, cuda, cpp, reference"),
        ("cpp", "meta", "it takes CPU tensors, these are on meta"),
        ("triton", "cpu", "it takes CUDA tensors, these are on cpu"),
        ("cuda", "cpu", "it takes CUDA tensors, these are on cpu"),
    ],
)
def test_an_implementation_that_cannot_run_is_an_error(impl: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patchify(VIDEO.to(device), **SIZES, impl=impl)


def test_an_explicit_request_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._reasons_no_cpp, torch.ops.adamae_fast.patchify.default, "not built")
    with pytest.raises(ValueError, match=r"impl='cpp' of adamae_fast\.patchify\.default cannot run: not built"):
        patchify(VIDEO, **SIZES, impl="cpp")


@needs_cpp
def test_the_product_of_the_tokenizer_has_no_implementation_in_cpp() -> None:
    with pytest.raises(ValueError, match="no C\\+\\+ implementation of its own"):
        embed_tubelets(VIDEO, torch.zeros(5, 3, 2, 2, 2), torch.zeros(5), impl="cpp")


@needs_cpp
def test_each_request_runs_what_it_names() -> None:
    """Only the library refuses float8."""
    low_precision = {"dtype": torch.float8_e4m3fn}
    with pytest.raises(ValueError, match=r"dtype is Float8_e4m3fn: .*impl='reference'"):
        patchify(VIDEO, **SIZES, **low_precision, impl="cpp")
    assert patchify(VIDEO, **SIZES, **low_precision, impl="reference").dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("name", [n for n, inputs in OPERATION_INPUTS.items() if inputs.differentiable])
def test_the_backward_of_a_reference_is_a_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched through the profiler, which sees each overload."""
    inputs = OPERATION_INPUTS[name]
    arguments = inputs.make_requiring_grad(InputFactory(OpShape()))[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = getattr(torch.ops.adamae_fast, name).reference(*arguments)
        (output if isinstance(output, Tensor) else output[0]).sum().backward()
    seen = {event.key for event in profile.key_averages() if event.key.startswith("adamae_fast::")}
    # Where the forward computes the gradients, the backward is a multiplication.
    backward = f"{name}_backward"
    assert seen == {f"adamae_fast::{x}" for x in (name, backward) if x in OPERATION_INPUTS}


def test_a_request_can_be_compiled(impl: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda video: patchify(video, **SIZES, impl=impl), fullgraph=True, backend="aot_eager", dynamic=False
    )
    assert torch.equal(compiled(VIDEO), patchify(VIDEO, **SIZES))


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_logged", set())
    with caplog.at_level(logging.DEBUG, "adamae_fast"):
        for _ in range(2):
            patchify(VIDEO, **SIZES)
    expected = "cpp" if library.reason_missing is None else "reference"
    assert caplog.messages == [f"adamae_fast.patchify.default on cpu: {expected}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_are_ordered_as_torch_sorts_them(dtype: torch.dtype, impl: str) -> None:
    """NaN of either sign above infinity, ties to the lower id, below the public function, which refuses all this."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, 2.0**60, nan, inf, -inf, -nan, 2.0**60, -(2.0**60), inf, nan]], dtype=dtype)
    packet = torch.ops.adamae_fast.sample_visible
    operation = packet.reference if impl == "reference" else packet.default
    for num_visible in range(1, logits.shape[1] + 1):
        visible_ids, *_, statistics = operation(logits, torch.tensor([4]), num_visible)
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :num_visible]
        assert torch.equal(visible_ids, order.sort(dim=1).values)
        assert statistics[0, 2].isnan()


PRODUCTS = ("embed_tubelets", "head_patch_loss")  # of PyTorch, which checks their factors
OPERATIONS_WITH_FLOATS = [
    name for name in OPERATION_INPUTS if name not in ("patchify", "split_tokens", "patch_targets")
]


@needs_cpp
@pytest.mark.parametrize("name", [n for n in OPERATIONS_WITH_FLOATS if not n.startswith(PRODUCTS)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e5m2, torch.complex64])
def test_other_dtypes_are_an_error_below_the_public_functions_too(name: str, dtype: torch.dtype) -> None:
    operation = getattr(torch.ops.adamae_fast, name).default
    arguments = list(OPERATION_INPUTS[name].make(InputFactory(OpShape()))[0])
    first = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.is_floating_point())
    # The gradient of an error is converted; the prediction decides.
    first += name == "masked_patch_loss_backward"
    arguments[first] = arguments[first].to(dtype)
    with pytest.raises(ValueError, match=r"the C\+\+ operations take Float, Double, BFloat16 and Half"):
        operation(*arguments)


@needs_cpp
@pytest.mark.parametrize("name", sorted(OPERATION_INPUTS))
@pytest.mark.parametrize("wrong", [-1, 2**40])
def test_ids_out_of_range_are_an_error_below_the_public_functions_too(name: str, wrong: int) -> None:
    operation = getattr(torch.ops.adamae_fast, name).default
    arguments = OPERATION_INPUTS[name].make(InputFactory(OpShape()))[0]
    for i, argument in enumerate(arguments):
        if name == "gather_tokens" and i == 2:
            continue  # the inverse map is read in the backward
        if isinstance(argument, Tensor) and argument.dtype == torch.int64 and argument.dim() == 2:  # not seeds
            ids = argument.clone()
            ids[-1, -1] = wrong
            with pytest.raises(ValueError, match=re.escape(str(wrong))):
                operation(*arguments[:i], ids, *arguments[i + 1 :])


@pytest.mark.parametrize(
    ("name", "position", "argument"),
    [
        ("gather_tokens", 1, "ids"),
        ("assemble_decoder", 3, "visible_ids"),
        ("assemble_decoder", 4, "masked_ids"),
        ("patch_targets", 1, "masked_ids"),
        ("masked_patch_loss", 2, "masked_ids"),
        ("masked_patch_loss_backward", 3, "masked_ids"),
        ("patch_loss_step", 2, "masked_ids"),
        ("sampling_loss", 1, "masked_ids"),
    ],
)
@pytest.mark.parametrize("place", [1, -1])
@pytest.mark.parametrize("step", [0, -1])
def test_ids_that_do_not_ascend_are_an_error(
    name: str, position: int, argument: str, place: int, step: int, impl: str
) -> None:
    packet = getattr(torch.ops.adamae_fast, name)
    arguments = list(OPERATION_INPUTS[name].make(InputFactory(OpShape(grid=(3, 10, 5), num_visible=70)))[0])
    ids = arguments[position] = arguments[position].clone()
    place %= ids.shape[1]
    ids[1] = torch.arange(1, ids.shape[1] + 1)
    ids[1, place] = ids[1, place - 1] + step
    message = (
        f"{argument} of clip 1 are not ascending: {ids[1, place]} at place {place} follows {ids[1, place - 1]}; "
        "pass ids as TokenSplit has them, ascending and distinct"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        (packet.reference if impl == "reference" else packet.default)(*arguments)


@needs_cpp
@pytest.mark.parametrize("name", [n for n in OPERATION_INPUTS if not n.startswith(PRODUCTS)])
def test_other_shapes_never_reach_memory(name: str) -> None:
    """Each tensor in turn loses a column, a row or a dimension: an error, or a smaller result."""
    operation = getattr(torch.ops.adamae_fast, name).default
    arguments = OPERATION_INPUTS[name].make(InputFactory(OpShape()))[0]
    for i, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            continue
        for smaller in (argument[..., :-1], argument[:-1], argument[0], argument[:0]):
            with suppress(ValueError):
                operation(*arguments[:i], smaller, *arguments[i + 1 :])


def test_distinct_ids_are_asked_for(impl: str) -> None:
    with pytest.raises(ValueError, match="visible_ids names a token twice"):
        split_tokens(torch.tensor([[0, 1], [2, 2]]), 7, impl=impl)
