"""The C++ library: asked for by name, missing, built for something else, or asked for what it cannot do."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamae_fast import info
from adamae_fast.ops import library, registry
from adamae_fast.ops.patchify import embed_tubelets, patchify
from adamae_fast.ops.sample_visible import sample_visible, split_tokens
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
        pytest.param("cpp", "meta", "it takes CPU tensors, these are on meta", marks=needs_cpp),
        ("triton", "cpu", "it takes CUDA tensors, these are on cpu"),
        ("cuda", "cpu", r"it has no CUDA C\+\+ implementation of its own"),
    ],
)
def test_an_implementation_that_cannot_run_is_an_error(impl: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patchify(VIDEO.to(device), **SIZES, impl=impl)


def test_cuda_is_for_tensors_on_cuda_devices() -> None:
    with pytest.raises(ValueError, match="it takes CUDA tensors, these are on cpu"):
        sample_visible(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 2, impl="cuda")


@pytest.mark.parametrize(("impl", "name"), [("triton", "Triton"), ("cuda", r"CUDA C\+\+")])
def test_an_implementation_that_does_not_exist_is_not_asked_for_its_device(impl: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot run: it has no {name} implementation of its own; pass impl='auto'"):
        registry.choose(torch.ops.adamae_fast.head_patch_loss.default, impl, torch.device("cpu"))


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
    assert torch.equal(compiled(VIDEO), patchify(VIDEO, **SIZES, impl=impl))


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


def test_distinct_ids_are_asked_for(impl: str) -> None:
    with pytest.raises(ValueError, match="visible_ids names a token twice"):
        split_tokens(torch.tensor([[0, 1], [2, 2]]), 7, impl=impl)
