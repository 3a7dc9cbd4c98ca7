"""The step that a CUDA graph records. Without a GPU the recording is left out, and the same function called each time.

That proves everything but CUDA's part: the step reads and writes tensors that stay at their place, and nothing else.
"""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from adamae_fast.config import PretrainConfig
from adamae_fast.run_folder import RunFolder
from adamae_fast.train.checkpoint import RunState, load_checkpoint, save_checkpoint
from adamae_fast.train.finite import NonFiniteError
from adamae_fast.train.step_graph import WARM_UP_STEPS
from tests.train.test_step import build, clips, run_step

STEPS = 6
VARIANTS = [
    {"dropout": 0.1},
    {"dropout": 0.1, "precision": "bf16", "optim": {"clip_grad_norm": 0.1, "layer_decay": 0.9}},
    {"dropout": 0.1, "keep_ratio": 0.5},
    {"strategy": "tube"},
]


class CalledEachTime:
    """In place of StepGraph, where there is no GPU."""

    def __init__(self, step, device):
        self._step = step

    def __call__(self):
        self._step()


@pytest.fixture
def no_recording(monkeypatch):
    monkeypatch.setattr("adamae_fast.train.step.StepGraph", CalledEachTime)


def graphed(**options):
    return build(**options, batch_size=4, cuda_graph=True)


def take_steps(stepper, first=0, last=STEPS):
    """Each step has its own clips, rate and noise."""
    return [run_step(stepper, clips(seed=i), step=i, learning_rate=1e-3 / (1 + i)) for i in range(first, last)]


def parameters(stepper):
    return {name: p.detach().clone() for name, p in stepper.model.named_parameters()}


def assert_same_parameters(one, two):
    for name, p in parameters(one).items():
        assert torch.equal(p, two.model.get_parameter(name)), name


@pytest.mark.usefixtures("no_recording")
@pytest.mark.parametrize("options", VARIANTS)
def test_fixed_buffers_train_as_the_normal_step_does_bit_by_bit(options):
    normal, fixed = build(**options), graphed(**options)
    assert take_steps(normal) == take_steps(fixed)
    assert_same_parameters(normal, fixed)


@pytest.mark.usefixtures("no_recording")
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, first, second = (graphed(dropout=0.1) for _ in range(3))
    expected = take_steps(whole)
    take_steps(first, 0, 3)
    state = RunState(step=3, num_videos=1, loss_scale={})
    folder = save_checkpoint(RunFolder(tmp_path), PretrainConfig(), first.model, first.optimizer, state)
    load_checkpoint(folder, second.model, second.optimizer)
    assert take_steps(second, 3) == expected[3:]
    assert_same_parameters(second, whole)


def places(stepper):
    """Where every tensor lies that outlives a step."""
    owners = {"stepper": vars(stepper), "guard": vars(stepper.guard)}
    owners |= {f"group {i}": group for i, group in enumerate(stepper.optimizer.param_groups)}
    owners |= {name: stepper.optimizer.state[p] for name, p in stepper.model.named_parameters()}
    owners |= {"model": dict(stepper.model.named_parameters()) | dict(stepper.model.named_buffers())}
    return {
        (owner, name): value.data_ptr()
        for owner, values in owners.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.usefixtures("no_recording")
@pytest.mark.parametrize("options", VARIANTS)
def test_what_outlives_a_step_stays_at_its_place(options):
    stepper = graphed(**options)
    take_steps(stepper, 0, 1)  # makes the moments
    before = places(stepper)
    names = {name for _, name in before}
    assert {"_video_BCTHW", "_seeds_B", "_figures", "_found_inf", "_bad_step", "lr", "exp_avg", "step"} <= names
    assert "_sampler_grad_norm" in names
    take_steps(stepper, 1, 4)
    assert places(stepper) == before
    assert all(p.grad is None for p in stepper.model.parameters())


@pytest.mark.usefixtures("no_recording")
def test_the_recorded_part_is_the_whole_step_and_never_waits():
    stepper = graphed(dropout=0.1, optim={"clip_grad_norm": 0.1})
    take_steps(stepper, 0, 1)
    before = parameters(stepper)
    stepper.begin(1, 1e-3)
    with profile(activities=[ProfilerActivity.CPU]) as outside:
        stepper.accumulate(clips())
    assert "aten::addmm" not in {event.name for event in outside.events()}
    with profile(activities=[ProfilerActivity.CPU]) as inside:
        stepper.graph()
    called = [event for event in inside.events() if event.name.startswith("aten::")]
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
    # torch's fused AdamW for the CPU reads rate and step; the one for CUDA does not.
    callers = {event.cpu_parent.name for event in called if event.name in waiting} - {"aten::item"}
    assert callers <= {"aten::_fused_adamw_"}
    assert not torch.equal(before["mask_token"], stepper.model.mask_token)


@pytest.mark.usefixtures("no_recording")
def test_a_non_finite_value_is_named_with_its_step_and_changes_nothing():
    stepper = graphed()
    take_steps(stepper, 0, 1)
    with torch.no_grad():
        stepper.model.decoder.head.weight[0, 0] = float("inf")
    before = parameters(stepper)
    stepper.begin(1, 1e-3)
    stepper.accumulate(clips())
    stepper.finish(1)
    with pytest.raises(NonFiniteError, match="step 2: a value is not finite"):
        take_steps(stepper, 2, 3)
    assert all(torch.equal(p, before[name]) for name, p in stepper.model.named_parameters())


def test_a_device_without_graphs_is_refused():
    with pytest.raises(ValueError, match=r"train\.cuda_graph=True: the run computes on cpu.*cuda_graph=false"):
        graphed()


def watched(stepper, name="visible_ids"):
    """A tensor that each step, recorded or not, copies this part of the model's output into."""
    model = stepper.model
    size, dtype = (model.num_visible, torch.int64) if name == "visible_ids" else (model.grid.num_tokens, torch.float32)
    values = torch.zeros((4, size), dtype=dtype, device=stepper.device)

    def keep(module, arguments, output):
        values.copy_(getattr(output, name))

    model.register_forward_hook(keep)
    return values


@pytest.mark.gpu
@pytest.mark.parametrize("options", VARIANTS)
def test_a_replay_equals_the_step_that_was_not_recorded(options):
    """The same clips, rates and noise give the same masks to the last token, and the same figures."""
    normal, recorded = build(**options, device="cuda"), graphed(**options, device="cuda")
    ids_of_normal, ids_of_recorded = watched(normal), watched(recorded)
    tolerance = 1e-2 if options.get("precision") == "bf16" else 1e-4
    for i in range(WARM_UP_STEPS + STEPS):
        expected, actual = (run_step(s, clips(seed=i), step=i, learning_rate=1e-3) for s in (normal, recorded))
        assert actual == pytest.approx(expected, rel=tolerance, abs=1e-6), i
        if options.get("precision") != "bf16":
            assert torch.equal(ids_of_normal, ids_of_recorded), i
    assert recorded.graph.pool_bytes > 0


@pytest.mark.gpu
def test_a_run_resumed_on_a_gpu_goes_on_as_the_recorded_one(tmp_path):
    last = WARM_UP_STEPS + STEPS
    whole, second = (graphed(dropout=0.1, device="cuda") for _ in range(2))
    take_steps(whole, 0, last - 2)
    state = RunState(step=last - 2, num_videos=1, loss_scale={})
    folder = save_checkpoint(RunFolder(tmp_path), PretrainConfig(), whole.model, whole.optimizer, state)
    load_checkpoint(folder, second.model, second.optimizer)
    for expected, actual in zip(*(take_steps(s, last - 2, last) for s in (whole, second)), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.gpu
def test_replays_draw_fresh_ids_with_the_samplers_probabilities():
    """With one visible token and a rate of 0, its distribution is the softmax of the logits: Pearson's chi-square."""
    stepper = graphed(device="cuda", ratio=0.8)
    assert stepper.model.num_visible == 1
    with torch.no_grad():
        stepper.model.sampler.positions.normal_(generator=torch.Generator("cuda").manual_seed(0))
    ids, video, drawn = watched(stepper), clips(seed=0), []
    for i in range(WARM_UP_STEPS + 2000):
        stepper.begin(i, 0.0)
        stepper.accumulate(video)
        stepper.finish(i)
        drawn.append(ids.clone())
    stepper.check()
    ids_RB = torch.stack(drawn[WARM_UP_STEPS:]).squeeze(2)
    assert (ids_RB.diff(dim=0) != 0).float().mean() > 0.3
    with torch.no_grad():
        probability_BN = stepper.model(video.cuda()).logits.double().softmax(1)
    critical = (
        7 * (1 - 2 / 63 + 3.719 * math.sqrt(2 / 63)) ** 3
    )  # 7 degrees of freedom, 1e-4, as in test_sample_visible
    for clip, probability_N in enumerate(probability_BN):
        observed_N = ids_RB[:, clip].bincount(minlength=8)
        expected_N = probability_N * len(ids_RB)
        assert ((observed_N - expected_N) ** 2 / expected_N).sum() < critical


@pytest.mark.gpu
def test_dropout_is_fresh_at_each_replay_and_follows_from_seed_and_step():
    stepper = graphed(dropout=0.5, device="cuda")
    seen, logits = watched(stepper, "logits"), []
    for i in (*range(WARM_UP_STEPS), 10, 11, 10):
        stepper.begin(i, 0.0)
        stepper.accumulate(clips())
        stepper.finish(i)
        logits.append(seen.clone())
    first, other, again = logits[-3:]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.gpu
def test_a_replay_never_waits_and_allocates_nothing():
    stepper = graphed(dropout=0.1, optim={"clip_grad_norm": 0.1}, device="cuda")
    assert stepper.graph.pool_bytes == 0
    take_steps(stepper, 0, WARM_UP_STEPS + 1)
    video, allocated = clips().pin_memory(), torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")  # any host sync raises
        for i in range(10, 13):
            stepper.begin(i, 1e-3)
            stepper.accumulate(video)
            stepper.finish(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stepper.read_figures()["loss"] > 0
    assert torch.cuda.memory_allocated() == allocated
