"""Whole-step measurements at tiny sizes: arms agree, and what is counted is what happened."""

import argparse
import gc
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from adamae_fast.cli import main as adamae_fast
from adamae_fast.config import ModelConfig
from adamae_fast.ops.registry import NAMESPACE
from adamae_fast.plan.work import classifier_flops
from bench import (
    arms,
    checkout,
    command,
    conditions,
    finetune_arms,
    memory,
    models,
    profile,
    saved,
    step,
)
from bench.parity import Parity, PretrainParity
from bench.timing import Plan

# torch's compiler looks at .grad of what crosses from one graph to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

CPU = torch.device("cpu")
ARGUMENTS = ["--quick", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "COMPILE_BACKEND", "eager")
    monkeypatch.setattr(step, "QUICK", Plan(warm_up=0, rounds=2, block=1))


def published_checkout() -> checkout.Checkout | None:
    folder = os.environ.get("ADAMAE_PUBLISHED")
    return checkout.Checkout.open(Path(folder)) if folder else None


@pytest.fixture(scope="module")
def built() -> tuple[dict[str, arms.Arm], arms.Skipped, Parity]:
    model, mask = command.TINY
    setting = arms.Setting(model=model, mask=mask, batch_size=2, device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "COMPILE_BACKEND", "eager")
        build, skipped = arms.builders(setting, arms.plan_for(CPU, published_checkout()))
        return {name: make() for name, make in build.items()}, skipped, PretrainParity(setting)


def test_every_arm_gives_the_loss_and_the_gradients_of_the_reference(built) -> None:
    all_arms, skipped, parity = built
    assert {"published-like-fp32", "tuned", "tuned+compile", "ours-none", "ours-fc1"} <= set(all_arms)
    assert {name: parity.fault(arm) for name, arm in all_arms.items()} == dict.fromkeys(all_arms)
    if "ADAMAE_PUBLISHED" not in os.environ:
        assert skipped["published-fp32"].startswith("not measured")


@pytest.fixture(scope="module")
def built_classifiers() -> tuple[dict[str, arms.Arm], arms.Skipped, Parity]:
    """All arms of fine-tuning."""
    model, mask = command.TINY
    setting = arms.Setting(model=model, mask=mask, batch_size=2, device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "COMPILE_BACKEND", "eager")
        build, skipped = finetune_arms.builders(setting, arms.plan_for(CPU, published_checkout()))
        return {name: make() for name, make in build.items()}, skipped, finetune_arms.FinetuneParity(setting)


def test_every_arm_of_fine_tuning_agrees_with_the_reference(built_classifiers) -> None:
    all_arms, skipped, parity = built_classifiers
    assert {"published-like-fp32", "tuned", "tuned+compile"} < set(all_arms)
    assert {f"ours-{policy}" for policy in ("none", "pointwise", "fc1", "block")} < set(all_arms)
    assert "ours-none@reference" in all_arms
    assert {name: parity.fault(arm) for name, arm in all_arms.items()} == dict.fromkeys(all_arms)
    if "ADAMAE_PUBLISHED" not in os.environ:
        assert skipped["published-fp32"].startswith("not measured")


def test_a_classifier_that_sees_other_clips_labels_or_positions_is_found(built_classifiers) -> None:
    """The head's first weights are large enough for the loss to depend on all of them."""
    all_arms, _, parity = built_classifiers
    arm = all_arms["tuned"]
    for holder, name in ((arm, "clips"), (arm, "_targets"), (arm.model, "positions_ND")):
        kept = getattr(holder, name)
        setattr(holder, name, kept.flip(0))
        assert "is off by" in parity.fault(arm)
        setattr(holder, name, kept)
    assert parity.fault(arm) is None


def test_arms_of_fine_tuning_keep_what_their_policy_says_and_run_their_attention(built_classifiers) -> None:
    all_arms, _, _ = built_classifiers
    rows = {
        name: step.memory_on_cpu(arm) | step.backends_of(arm, profile.profiled(arm.step, CPU))
        for name, arm in all_arms.items()
        if name.startswith(("ours", "published-like"))
    }
    kept = [rows[f"ours-{policy}"]["saved_bytes_per_clip"] for policy in ("none", "pointwise", "fc1", "block")]
    assert kept == sorted(set(kept), reverse=True)
    assert rows["published-like-fp32"]["saved_bytes_per_clip"] > rows["ours-none@reference"]["saved_bytes_per_clip"]
    assert rows["ours-none"]["attention"] == {"encoder": "sdpa"}
    assert rows["ours-none"]["attention_ran"]
    assert rows["ours-none@reference"]["attention"] == {"encoder": "reference"}
    assert rows["ours-none@reference"]["attention_ran"] == {}


def test_arithmetic_of_a_classifier_is_what_torch_counts() -> None:
    model, mask = command.TINY
    setting = arms.Setting(model=model, mask=mask, batch_size=1, device=CPU)
    network = models.PublishedLikeClassifier(model, finetune_arms.NUM_CLASSES, 0.0)
    with FlopCounterMode(display=False) as counter:
        network(arms.normalize(setting.draw_video()), finetune_arms.draw_targets(setting)).backward()
    assert classifier_flops(model, finetune_arms.NUM_CLASSES) == counter.get_total_flops()


def test_another_loss_or_gradient_is_found(built, monkeypatch: pytest.MonkeyPatch) -> None:
    all_arms, _, parity = built
    arm = all_arms["tuned"]
    loss, gradients = arm.loss_and_gradients(parity.visible_ids)
    monkeypatch.setattr(arm, "loss_and_gradients", lambda ids: (1.001 * loss, gradients))
    assert parity.fault(arm).startswith("the loss is off by 1.0e-03")
    gradients["sampler.head.weight"] = 2 * gradients["sampler.head.weight"]
    monkeypatch.setattr(arm, "loss_and_gradients", lambda ids: (loss, gradients))
    assert parity.fault(arm).startswith("the gradient of sampler. is off")


def test_parity_is_parity_with_the_references() -> None:
    """Or ours would be compared with themselves."""
    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == NAMESPACE:
                seen.add(str(function))
            return function(*args, **(kwargs or {}))

    model, mask = command.TINY
    setting = arms.Setting(model=model, mask=mask, batch_size=2, device=CPU)
    with Watch():
        PretrainParity(setting)
    assert {f"{NAMESPACE}.{name}.reference" for name in ("sample_visible", "embed_tubelets_backward")} <= seen
    assert all(name.endswith(".reference") for name in seen)


def test_our_step_reads_no_tensor_on_the_host(built) -> None:
    all_arms, _, _ = built
    for name in ("ours-none", "ours-fc1"):
        all_arms[name].step()
        assert profile.count(profile.profiled(all_arms[name].step, CPU)).reads == 0
    published = profile.count(profile.profiled(all_arms["published-like-fp32"].step, CPU))
    assert published.reads > 10


def test_waits_of_the_profiler_are_not_those_of_a_step() -> None:
    """It waits for a GPU itself before it ends."""

    def event(name: str, start: int, end: int) -> argparse.Namespace:
        time_range = argparse.Namespace(start=start, end=end)
        return argparse.Namespace(name=name, time_range=time_range, device_type=DeviceType.CPU, cpu_parent=None)

    outside = [event(name, at, at + 1) for name in ("cudaDeviceSynchronize", "cudaLaunchKernel") for at in (5, 21, 25)]
    inside = [event(profile.STEP, 10, 20), event("cudaStreamSynchronize", 12, 13), event("cudaLaunchKernel", 19, 22)]
    counts = profile.count(argparse.Namespace(events=lambda: outside + inside))
    assert (counts.waits, counts.launches) == (1, 1)


def test_attention_that_ran_on_a_gpu_is_its_forward() -> None:
    """Kernels as cuDNN, flash, efficient and FlashAttention-3 name them; what the host calls is not counted again."""
    forward = [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>, false>(pytorch_flash::Flash_fwd_params)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<float> > >(Params)",
    ]
    backward = [
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true>(pytorch_flash::Flash_bwd_params)",
        "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention)",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<float> > >(Params)",
    ]
    kernels = [(name, DeviceType.CUDA) for name in (*forward, *backward, "layer_norm_kernel")]
    calls = [*kernels, ("aten::_scaled_dot_product_flash_attention", DeviceType.CPU)]
    events = [argparse.Namespace(name=name, device_type=where) for name, where in calls]
    ran = profile.attention_that_ran(argparse.Namespace(events=lambda: events), torch.device("cuda"))
    assert ran == {
        forward[0]: 1,
        "pytorch_flash::flash_fwd_kernel": 1,
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": 1,
        "cutlass::device_kernel": 1,
    }


def test_time_on_a_gpu_is_told_once() -> None:
    """Not of a kernel, of the operator that launched it and of the ranges around both."""

    def average(key: str, micro: int, where: DeviceType, is_range: bool = False) -> argparse.Namespace:
        times = {"self_device_time_total": micro, "self_cpu_time_total": 7}
        return argparse.Namespace(key=key, count=2, device_type=where, is_user_annotation=is_range, **times)

    averages = [
        average("aten::mm", 3000, DeviceType.CPU),
        average("gemm", 3000, DeviceType.CUDA),
        average("Memcpy HtoD", 1000, DeviceType.CUDA),
        *(average(profile.STEP, 4000, where, is_range=True) for where in (DeviceType.CPU, DeviceType.CUDA)),
        average(f"{profile.OPTIMIZER}#AdamW.step", 4000, DeviceType.CUDA, is_range=True),
    ]
    top = profile.top_operators(argparse.Namespace(key_averages=lambda: averages), torch.device("cuda"))
    assert top == [
        {"operator": "gemm", "ms": 3.0, "calls": 2, "share": 0.75},
        {"operator": "Memcpy HtoD", "ms": 1.0, "calls": 2, "share": 0.25},
    ]


def test_layers_are_made_on_the_device_and_the_published_tables_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU."""
    model, mask = command.TINY
    meta = torch.device("meta")
    setting = arms.Setting(model=model, mask=mask, batch_size=2, device=meta)
    for task, arm in ((arms, "PlainArm"), (finetune_arms, "PlainClassifierArm")):
        monkeypatch.setattr(task, arm, lambda name, setting, precision, network, **_: network)
        state = task.initial_state(setting)
        published, tuned = (task._plain("", setting, "fp32", state, like_published=like) for like in (True, False))
        assert {p.device for p in (*published.parameters(), *tuned.parameters())} == {meta}
        for network in (published, tuned):
            network.to(meta)  # as an arm does
        tables = published._tables if task is arms else (published._table,)
        assert {table.device for table in tables} == {CPU}
        assert {table.device for table in tuned.buffers()} == {meta}
        others = [value for module in tuned.modules() for value in vars(module).values()]
        assert not any(isinstance(value, torch.Tensor) for value in others)


def test_what_the_parity_reserved_is_not_an_arms_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's allocator keeps what was freed; here it is a number of bytes."""
    reserved = 0

    def reserve(num_bytes: int) -> None:
        nonlocal reserved
        reserved = max(reserved, num_bytes)

    def empty_cache() -> None:
        nonlocal reserved
        reserved = 0

    class Arm:
        def step(self) -> None:
            reserve(100)

    def fault(arm: Arm) -> None:
        reserve(1000)

    in_place_of = {"empty_cache": empty_cache, "memory_reserved": lambda: reserved, "mem_get_info": lambda: (0, 0)}
    in_place_of |= {name: lambda: 0 for name in ("memory_allocated", "max_memory_allocated")}
    in_place_of |= {name: lambda: None for name in ("reset_peak_memory_stats", "synchronize")}
    for name, function in in_place_of.items():
        monkeypatch.setattr(torch.cuda, name, function)
    parity = argparse.Namespace(fault=fault)
    assert step.memory_on_gpu(Arm, parity)["reserved_bytes"] == 100


def test_an_option_that_this_version_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "our_options", lambda device: {"ours-tomorrow": {"tomorrow": True}})
    model, mask = command.TINY
    setting = arms.Setting(model=model, mask=mask, batch_size=2, device=CPU)
    build, skipped = arms.builders(setting, arms.plan_for(CPU, None))
    assert "ours-tomorrow" not in build
    assert skipped["ours-tomorrow"] == "this version has no option train.tomorrow"


def test_rearrange_is_einops() -> None:
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    actual = checkout.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=3)
    assert actual.shape == (2, 4, 18)
    for b, h, w, p, q, c in ((0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 2, 2), (1, 0, 1, 1, 0, 2)):
        assert actual[b, h * 2 + w, (p * 3 + q) * 3 + c] == x[b, c, h * 2 + p, w * 3 + q]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--published=.*optim_factory.py not found"):
        checkout.Checkout.open(tmp_path)


def test_rows_of_another_batch_size_stay_where_all_else_is_the_same(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path, quick=True, task="pretrain")

    def measured(batch: int, ms: float, published: str | None = None, **other: str) -> dict:
        taken = {"device": "cpu", "cores": "2", "commit": "abc", "date": f"day {batch}", "load": "0", **other}
        rows = [
            {"arm": arm, "batch": batch, "ms": ms / i} for i, arm in enumerate(("published-fp32", "tuned"), start=1)
        ]
        what = {"conditions": taken, "model": "nano", "published_checkout": published}
        return {**what, "rows": rows, "skipped": {f"arm-{batch}": "none"}}

    command.finish("step", step.with_other_batches(measured(32, 10), options), options)
    both = step.with_other_batches(measured(16, 6), options)
    assert [(row["batch"], row["ms"]) for row in both["rows"]] == [(16, 6), (16, 3), (32, 10), (32, 5)]
    assert both["speedup"] == {batch: {"published-fp32": 1.0, "tuned": 2.0} for batch in ("16", "32")}
    assert set(both["skipped"]) == {"arm-16", "arm-32"}
    again = step.with_other_batches(measured(32, 8), options)
    assert [row["ms"] for row in again["rows"]] == [8, 4]
    for other in (measured(16, 6, commit="def"), measured(16, 6, published="aa19850")):
        assert {row["batch"] for row in step.with_other_batches(other, options)["rows"]} == {16}


def test_an_arm_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="--arm: none cannot be measured here; choose from"):
        step.main([*ARGUMENTS, "--arm", "none"])


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_round_at_all_is_refused(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"--rounds {rounds}: choose at least 1 round"):
        step.main([*ARGUMENTS, "--rounds", str(rounds)])


def test_bisection_finds_the_largest() -> None:
    for limit in (1, 5, 63, 100):
        found = memory.largest(lambda batch, limit=limit: batch <= limit, 64)
        assert 0 <= limit - found <= limit // memory.PRECISION
    assert memory.largest(lambda batch: False, 64) == 0


def test_no_arm_of_another_case_is_there_while_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """At ViT-B each has gigabytes. What the published code leaves, with ADAMAE_PUBLISHED, the collector alone frees."""
    models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def count_alone(model: torch.nn.Module, call: Callable[[], object]) -> Counter[str]:
        models.add(model)
        assert len(models) == 1
        return saved.saved_bytes(model, call)

    monkeypatch.setattr(memory, "saved_bytes", count_alone)
    setting = command.setting_of(argparse.Namespace(device="cpu", quick=True), 1)
    cases = [memory.shrunk(case) for case in memory.CASES if case.name in memory.QUICK_CASES]
    gc.disable()
    try:
        for case in cases:
            assert memory.on_cpu(case, memory.setting_of(case, setting, 1), published_checkout())["published"] > 0
    finally:
        gc.enable()


def test_quick_cases_are_among_the_papers() -> None:
    assert {case.part for case in memory.CASES} == {"(a) masking", "(b) ratio", "(c) decoder", "(f) sampler"}
    assert set(memory.QUICK_CASES) <= {case.name for case in memory.CASES}
    assert memory.CASES[0].model == ModelConfig()


def test_a_machine_without_the_command_lines_packages_can_measure() -> None:
    modules = [path.stem for path in (conditions.ROOT / "bench").glob("*.py") if path.stem != "__init__"]
    code = (
        "import sys\nmissing = ['jsonargparse', 'av', 'decord', 'transformers', 'tensorboard']\n"
        "sys.modules.update(dict.fromkeys(missing))\n"
        f"import importlib\nfor name in {modules!r}: importlib.import_module(f'bench.{{name}}')\n"
        "from bench import profile; profile.main(['--quick', '--device', 'cpu'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=conditions.ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_command_line_forwards(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adamae_fast(["bench", "report", "--help"]) == 0
    assert "usage: python -m bench.report" in capfd.readouterr().out
    assert adamae_fast(["bench", "nothing"]) == 2
    assert "there is no measurement 'nothing'" in capfd.readouterr().err
