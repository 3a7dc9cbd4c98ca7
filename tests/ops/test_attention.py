import importlib
import logging
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from adamae_fast.ops import attention as module
from adamae_fast.ops import attention_backends
from adamae_fast.ops.attention import attention, choose_attention, generation, preferred
from adamae_fast.ops.attention_backends import BACKENDS, PACKAGES, AttentionBackend, AttentionProblem, reason_missing
from adamae_fast.testing import assert_within_budget, scattered_in_memory

CUDA = torch.device("cuda", 0)
RUNS_HERE = [
    name for name, backend in BACKENDS.items() if not backend.reasons_unsupported(*[torch.ones(1, 2, 1, 8)] * 3)
]
every_backend = pytest.mark.parametrize("backend", RUNS_HERE)


@pytest.fixture(autouse=True)
def _no_remembered_choice() -> Iterator[None]:
    choose_attention.cache_clear()
    reason_missing.cache_clear()
    yield
    choose_attention.cache_clear()
    reason_missing.cache_clear()


def make(
    num_tokens: int = 7, head_dim: int = 5, dtype: torch.dtype = torch.float64, num_heads: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, num_tokens, num_heads, head_dim, generator=generator).to(dtype).requires_grad_()
        for _ in range(3)
    )
    return q, k, v


def make_packed(num_tokens: int, head_dim: int, dtype: torch.dtype, num_heads: int = 1) -> tuple[Tensor, list[Tensor]]:
    """One projection to q, k and v, as the model makes it, and its three views."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, num_tokens, 3 * num_heads * head_dim, generator=generator).to(dtype).requires_grad_()
    return qkv, list(qkv.unflatten(-1, (3, num_heads, head_dim)).unbind(2))


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Clip by clip and head by head."""
    outputs = torch.empty_like(q, requires_grad=False)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T / q.shape[3] ** 0.5
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            outputs[b, :, h] = weights @ v[b, :, h]
    return outputs


def with_gradients(function, inputs, grad: Tensor) -> list[Tensor]:
    output = function(*inputs)
    return [output, *torch.autograd.grad(output, inputs, grad)]


# ---- what is computed


def test_what_runs_on_this_cpu() -> None:
    assert RUNS_HERE == ["sdpa_flash", "sdpa", "reference"]


@every_backend
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 8), (63, 60), (257, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients_equal_the_formula(
    backend: str, num_tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    inputs = make(num_tokens, head_dim, dtype)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
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


@pytest.mark.parametrize(("backend", "dynamic"), [("auto", True), *((name, None) for name in RUNS_HERE)])
def test_compiles_into_one_graph_for_each_number_of_tokens(backend: str, dynamic: bool | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *qkv: attention(*qkv, backend=backend), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for num_tokens in (7, 9):  # blocks of encoder and decoder share their code
        inputs = make(num_tokens)
        torch.testing.assert_close(compiled(*inputs), attention(*inputs, backend=backend))


def test_a_compiled_graph_holds_the_fused_kernel() -> None:
    torch.compiler.reset()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        compiled = torch.compile(lambda *qkv: attention(*qkv), fullgraph=True, backend="aot_eager")
        compiled(*make()).sum().backward()
        compiled(*make()).sum().backward()
    called = [event.key for event in seen.key_averages()]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert "aten::_scaled_dot_product_attention_math" not in called


def test_reference_stays_exact_under_autocast() -> None:
    inputs = make(dtype=torch.float32)
    expected = attention(*inputs, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*inputs, backend="reference"), expected)
        assert attention(*inputs).dtype == torch.bfloat16  # PyTorch's own rule for its fused attention


# ---- what is stored


def largest_allocation(function) -> int:
    """Bytes of the largest single allocation during a call, kernels' scratch that PyTorch allocates among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = seen.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("head_dim", "strides"), [(8, "packed"), (8, "any"), (1, "any")])
def test_no_n_by_n_matrix_on_the_cpu(dtype: torch.dtype, head_dim: int, strides: str) -> None:
    num_tokens = 1568
    _, inputs = make_packed(num_tokens, head_dim, dtype)
    if strides == "any":
        inputs = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
        assert all(x.stride(-1) != 1 for x in inputs)
    n_by_n = num_tokens**2 * dtype.itemsize
    for backend in ("auto", "sdpa", "sdpa_flash"):
        assert largest_allocation(lambda b=backend: attention(*inputs, backend=b).sum().backward()) < n_by_n / 2


def test_the_search_for_n_by_n_finds_the_references() -> None:
    _, inputs = make_packed(1568, 8, torch.float32)
    assert largest_allocation(lambda: attention(*inputs, backend="reference").sum().backward()) >= 1568**2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_keeps_the_projection_itself_and_no_copy(dtype: torch.dtype) -> None:
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        qkv, inputs = make_packed(130, 8, dtype, num_heads=2)
        out = attention(*inputs)
    log_sum_exp = 130 * 2 * 4
    assert qkv.untyped_storage().data_ptr() in saved
    assert sum(saved.values()) <= qkv.nbytes + out.nbytes + log_sum_exp


# ---- which one is chosen


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], torch_takes: bool = True) -> None:
    """A CUDA device 0 of this compute capability, with a PyTorch that is built for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(attention_backends, "_torch_takes", lambda kind, problem: torch_takes)


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Packages of these back ends that hold their function, whatever is installed; the others are absent."""
    modules: dict[str, types.ModuleType | None] = {}
    for name, package in PACKAGES.items():
        modules[package.module] = stub = types.ModuleType(package.module) if name in names else None
        if stub:
            setattr(stub, package.function, formula)
            monkeypatch.setitem(sys.modules, package.module, stub)

    def import_module(module: str) -> types.ModuleType | None:
        top = module.partition(".")[0]
        if modules.get(module, sys) is None:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
        return importlib_import(module)

    monkeypatch.setattr(attention_backends.importlib, "import_module", import_module)


importlib_import = importlib.import_module


def problem(
    num_tokens: int = 1568,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CUDA,
    needs_grad: bool = True,
) -> AttentionProblem:
    return AttentionProblem(device, dtype, num_tokens, head_dim, needs_grad)


ENCODER, SAMPLER, DECODER = problem(78, 64), problem(1568, 96), problem(1568, 64)


@pytest.mark.parametrize(
    ("capability", "encoder", "long"),
    [
        ((8, 0), "sdpa_flash", "sdpa_flash"),
        ((8, 9), "sdpa_flash", "sdpa_flash"),
        ((9, 0), "sdpa_flash", "sdpa_cudnn"),
        ((10, 0), "sdpa_flash", "sdpa_cudnn"),
        ((12, 0), "sdpa", "sdpa"),
        ((7, 5), "reference", "reference"),  # bf16 before Ampere
    ],
)
def test_the_table_picks_for_each_part_of_the_model(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], encoder: str, long: str
) -> None:
    pretend(monkeypatch, capability)
    install(monkeypatch)
    assert [choose_attention(part)[0] for part in (ENCODER, SAMPLER, DECODER)] == [encoder, long, long]


def test_what_is_installed_is_taken_where_the_table_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *PACKAGES)
    pretend(monkeypatch, (8, 0))
    assert choose_attention(DECODER)[0] == "flash_attn_2"
    assert choose_attention(ENCODER)[0] == "sdpa_flash"
    choose_attention.cache_clear()
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert choose_attention(SAMPLER)[0] == "flash_attn_3"


def test_fp32_and_wide_or_odd_heads_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    install(monkeypatch)
    assert choose_attention(problem(dtype=torch.float32))[0] == "sdpa_efficient"
    assert choose_attention(problem(head_dim=160))[0] == "sdpa_flash"
    assert choose_attention(problem(head_dim=49))[0] == "sdpa_flash"


def test_rows_name_back_ends_and_the_general_ones_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in module.PREFERENCES:
        assert set(row.order) <= set(BACKENDS)
        assert len(set(row.order)) == len(row.order)
    assert preferred(problem(device=torch.device("cpu"))) == ("sdpa", "reference")
    assert preferred(problem(device=torch.device("meta"))) == ("sdpa", "reference")
    pretend(monkeypatch, (8, 6))
    assert generation(CUDA) == "ampere"
    assert preferred(DECODER)[-2:] == ("sdpa", "reference")


def test_other_devices_take_the_reference() -> None:
    q, k, v = (x.detach().to("meta") for x in make())
    assert attention(q, k, v).device.type == "meta"


def test_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backend = BACKENDS["sdpa"]
    counting = AttentionBackend(name="sdpa", reasons=lambda p: asked.append(p) or [], run=backend.run)
    monkeypatch.setitem(module.BACKENDS, "sdpa", counting)
    for _ in range(3):
        attention(*make())
    attention(*make(num_tokens=9))
    assert [p.num_tokens for p in asked] == [7, 9]


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="adamae_fast"):
        for dtype in (torch.float64, torch.float32, torch.float64):
            attention(*make(dtype=dtype))
        attention(*make(), backend="reference")
    assert [record.message for record in caplog.records] == [
        f"attention of 7 tokens of 5 channels a head, {dtype}, cpu: sdpa" for dtype in (torch.float64, torch.float32)
    ]


def test_auto_warns_where_only_the_reference_is_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, (9, 0))
    install(monkeypatch)
    assert choose_attention(problem(dtype=torch.float64))[0] == "reference"
    (record,) = caplog.records
    assert "stores N × N" in record.message
    assert "sdpa_efficient: it takes float16 or bfloat16 or float32, these are torch.float64" in record.message


def refuse(name: str) -> AttentionBackend:
    def run(*_: Tensor) -> Tensor:
        raise AssertionError("a back end that refuses was run")

    return AttentionBackend(name=name, reasons=lambda _: [f"no {name} here"], run=run)


def test_auto_passes_over_back_ends_that_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make()
    monkeypatch.setitem(module.BACKENDS, "sdpa", refuse("sdpa"))
    assert torch.equal(attention(*inputs), attention(*inputs, backend="reference"))


def test_an_explicit_request_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.BACKENDS, "sdpa", refuse("sdpa"))
    with pytest.raises(
        ValueError, match=r"q of shape \(2, 7, 3, 5\), torch.float64, cpu. sdpa: no sdpa here; choose auto$"
    ):
        attention(*make(), backend="sdpa")


# ---- why not


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_absent_broken_or_too_new(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch, (9, 0))
    install(monkeypatch)
    (reason,) = BACKENDS[name].reasons(DECODER)
    assert reason == f"not installed: {PACKAGES[name].install}"
    reason_missing.cache_clear()

    install(monkeypatch, name)
    assert BACKENDS[name].reasons(DECODER) == []
    reason_missing.cache_clear()

    delattr(sys.modules[PACKAGES[name].module], PACKAGES[name].function)
    monkeypatch.setattr(attention_backends.metadata, "version", lambda distribution: "9.9")
    (reason,) = BACKENDS[name].reasons(DECODER)
    assert reason.startswith(f"{PACKAGES[name].distribution} 9.9 has no {PACKAGES[name].function}: ")
    reason_missing.cache_clear()

    def broken(module: str) -> None:
        raise OSError("undefined symbol: _ZN2at4_ops")

    monkeypatch.setattr(attention_backends.importlib, "import_module", broken)
    assert BACKENDS[name].reasons(DECODER) == ["not usable: OSError: undefined symbol: _ZN2at4_ops"]


@pytest.mark.parametrize(
    ("name", "capability", "asked", "reasons"),
    [
        ("flash_attn_2", (7, 5), DECODER, ["it needs compute capability 8.0, cuda:0 has 7.5"]),
        ("flash_attn_3", (8, 0), DECODER, ["it needs compute capability 9.0, cuda:0 has 8.0"]),
        ("flash_attn_3", (10, 0), DECODER, ["it ends at compute capability 9.0, cuda:0 has 10.0"]),
        ("flash_attn_2", (9, 0), problem(head_dim=320), ["the head width 320 is above 256"]),
        ("flash_attn_3", (9, 0), problem(head_dim=60), ["the head width 60 is not a multiple of 8"]),
        (
            "flash_attn_2",
            (9, 0),
            problem(dtype=torch.float32),
            ["it takes float16 or bfloat16, these are torch.float32"],
        ),
        ("xformers", (10, 0), DECODER, []),
        (
            "xformers",
            (10, 0),
            problem(dtype=torch.float32),
            ["it ends at compute capability 9.0, cuda:0 has 10.0"],
        ),
        (
            "xformers",
            (9, 0),
            problem(dtype=torch.float64),
            ["it takes float16 or bfloat16 or float32, these are torch.float64"],
        ),
        ("xformers", (9, 0), problem(dtype=torch.float32, head_dim=6), ["the head width 6 is not a multiple of 4"]),
        ("sdpa_cudnn", (9, 0), problem(num_tokens=1), ["it takes 2 tokens or more, these are 1"]),
        ("sdpa_cudnn", (9, 0), SAMPLER, []),
        ("sdpa_flash", (9, 0), problem(head_dim=60), []),  # PyTorch pads it
        ("sdpa_flash", (7, 5), problem(head_dim=257), ["it needs compute capability 8.0, cuda:0 has 7.5"]),
        ("sdpa_efficient", (9, 0), problem(head_dim=60), ["the head width 60 is not a multiple of 8"]),
        ("sdpa_efficient", (9, 0), problem(head_dim=60, dtype=torch.float32), []),
    ],
)
def test_reasons_carry_the_value_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    asked: AttentionProblem,
    reasons: list[str],
) -> None:
    pretend(monkeypatch, capability)
    install(monkeypatch, *PACKAGES)
    found = BACKENDS[name].reasons(asked)
    assert found[: len(reasons)] == reasons
    assert bool(found) == bool(reasons)


def test_reasons_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *PACKAGES)
    inputs = [x.bfloat16() for x in make(head_dim=8)]
    for name in (*PACKAGES, "sdpa_efficient"):
        assert BACKENDS[name].reasons_unsupported(*inputs) == ["it takes CUDA tensors, these are on cpu"], name
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert BACKENDS["sdpa_cudnn"].reasons_unsupported(*inputs) == [
        "it takes CUDA tensors, these are on cpu",
        f"torch {torch.__version__} is built without cuDNN",
    ]


def test_pytorch_has_the_last_word_about_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), torch_takes=False)
    for name, kind in (("sdpa_cudnn", "cudnn"), ("sdpa_flash", "flash"), ("sdpa_efficient", "efficient")):
        (reason,) = BACKENDS[name].reasons(SAMPLER)
        assert reason.startswith(
            f"torch.backends.cuda.can_use_{kind}_attention of torch {torch.__version__} with cuDNN"
        )
        assert reason.endswith("refuses 1568 tokens of 96 channels a head, torch.bfloat16, cuda:0")
    assert [reason.partition(":")[0] for reason in BACKENDS["sdpa"].reasons(SAMPLER)] == ["cudnn", "flash", "efficient"]


def test_a_forced_back_end_gives_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    inputs = make(dtype=torch.float32)
    words = (
        r"q of shape \(2, 7, 3, 5\), torch.float32, cpu. flash_attn_2: not installed: .*; it takes CUDA tensors, these "
        r"are on cpu; it takes float16 or bfloat16, these are torch.float32; the head width 5 is not a multiple of 8; "
        r"choose auto$"
    )
    with pytest.raises(ValueError, match=words):
        attention(*inputs, backend="flash_attn_2")


def test_inputs_that_do_not_belong_together() -> None:
    q, k, v = (x.detach() for x in make())
    reasons = (
        r"k is torch.float32 but q is torch.float64; v is on meta but q is on cpu; "
        r"pass floating-point tensors of one dtype on one device$"
    )
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=rf"torch.float64, cpu. {reasons}"):
            attention(q, k.float(), v.to("meta"), backend=backend)
    with pytest.raises(ValueError, match=r"q is torch.int64, attention needs a floating-point dtype"):
        attention(q.long(), k.long(), v.long(), backend="sdpa")


def test_names_what_is_wrong() -> None:
    q, k, v = make()
    with pytest.raises(ValueError, match=r"backend='flash': choose auto or one of flash_attn_3, .*, sdpa, reference$"):
        attention(q, k, v, backend="flash")
    with pytest.raises(ValueError, match=r"shapes \(2, 7, 3, 5\), \(2, 6, 3, 5\), \(2, 7, 3, 5\)"):
        attention(q, k[:, 1:], v)


# ---- how packages are called


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("with_log_sum_exp", [False, True])
def test_packages_get_rows_in_the_dtype_of_the_products(
    monkeypatch: pytest.MonkeyPatch, name: str, with_log_sum_exp: bool
) -> None:
    if with_log_sum_exp and name != "flash_attn_3":
        pytest.skip("only FlashAttention-3 may return more than its result")
    install(monkeypatch, *PACKAGES)
    seen = []

    def record(q: Tensor, k: Tensor, v: Tensor):
        seen.extend((q, k, v))
        out = formula(q, k, v)
        return (out, torch.zeros(2, 3, 7)) if with_log_sum_exp else out

    setattr(sys.modules[PACKAGES[name].module], PACKAGES[name].function, record)
    inputs = [x.detach() for x in make(head_dim=8, dtype=torch.float32)]
    result = BACKENDS[name].run(*inputs)
    torch.testing.assert_close(result, attention(*inputs, backend="reference"))
    assert all(got is given for got, given in zip(seen, inputs, strict=True))
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        BACKENDS[name].run(*(scattered_in_memory(x) for x in inputs))
    assert [(x.shape, x.dtype, x.stride(-1)) for x in seen] == [(inputs[0].shape, torch.bfloat16, 1)] * 3


# ---- on a GPU

MODEL_SHAPES = [
    pytest.param(78, 12, 64, id="encoder"),
    pytest.param(1568, 8, 96, id="sampler"),
    pytest.param(1568, 6, 64, id="decoder"),
]


def gpu_inputs(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """One projection to q, k and v, and its three views, but as leaves of their own.

    A graph from the projection would bind its gradient to the stream that made it: no other one could capture it.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(2, num_tokens, 3 * num_heads * head_dim, generator=generator, device="cuda").to(dtype)
    qkv.requires_grad_()
    return qkv, [x.requires_grad_() for x in qkv.detach().unflatten(-1, (3, num_heads, head_dim)).unbind(2)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in the inputs' own dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3) @ v).transpose(1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), MODEL_SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_gpu_at_the_models_shapes(
    backend: str, num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    qkv, inputs = gpu_inputs(num_tokens, num_heads, head_dim, dtype)
    if backend != "auto" and (reasons := BACKENDS[backend].reasons_unsupported(*inputs)):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    grad = torch.randn_like(inputs[0])

    def forward_backward(function, qkv: Tensor, grad: Tensor) -> list[Tensor]:
        out = function(*qkv.unflatten(-1, (3, num_heads, head_dim)).unbind(2))
        return [out, *torch.autograd.grad(out, qkv, grad)]

    actual = forward_backward(lambda *x: attention(*x, backend=backend), qkv, grad)
    in_dtype = forward_backward(plain, qkv, grad)
    truth = forward_backward(plain, qkv.detach().double().requires_grad_(), grad.double())
    for x, formula_result, exact in zip(actual, in_dtype, truth, strict=True):
        assert_within_budget(x, formula_result, exact, largest_term=float(grad.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name != "reference")])
@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), MODEL_SHAPES)
def test_on_the_gpu_nothing_of_n_by_n_in_a_graph_of_its_own(
    backend: str, num_tokens: int, num_heads: int, head_dim: int
) -> None:
    """Captured into a CUDA graph, forward and backward stay below the memory of one N × N matrix a head."""
    qkv, inputs = gpu_inputs(num_tokens, num_heads, head_dim, torch.bfloat16)
    if backend != "auto" and (reasons := BACKENDS[backend].reasons_unsupported(*inputs)):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    grad = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        out = attention(*qkv.unflatten(-1, (3, num_heads, head_dim)).unbind(2), backend=backend)
        return out, *torch.autograd.grad(out, qkv, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [x.detach().clone() for x in step()]  # with its graph the gradient would stay on this stream
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    torch.cuda.current_stream().wait_stream(stream)
    if num_tokens == 1568:
        assert extra < 2 * num_heads * num_tokens**2 * 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, exact in zip(captured, expected, strict=True):
        torch.testing.assert_close(x, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_on_the_gpu_pytorch_is_asked_about_each_kernel() -> None:
    for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        assert isinstance(attention_backends._torch_takes(kind, DECODER), bool)
    assert attention_backends._torch_takes(SDPBackend.FLASH_ATTENTION, problem(dtype=torch.float64)) is False
