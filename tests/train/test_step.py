import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from adamae_fast.config import (
    DecoderConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    SamplerConfig,
    TrainConfig,
)
from adamae_fast.train.finite import NonFiniteError
from adamae_fast.train.sampler_figures import LOSSES, OF_SAMPLER
from adamae_fast.train.step import Stepper, micro_batch_seed

SIZES = {"size": "nano", "num_frames": 4, "frame_size": 32, "tubelet_size": 2, "patch_size": 16}  # 8 tokens


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def build(
    *,
    optim=None,
    strategy="adaptive",
    ratio=0.5,
    device="cpu",
    seed=0,
    dropout=0.0,
    keep_ratio=1.0,
    layer_norm="torch",
    **train,
):
    config = PretrainConfig(
        seed=seed,
        model=ModelConfig(
            **SIZES,
            sampler=SamplerConfig(dropout=dropout),
            decoder=DecoderConfig(keep_ratio=keep_ratio),
            layer_norm=layer_norm,
        ),
        mask=MaskConfig(ratio=ratio, strategy=strategy),
        optim=OptimConfig(**(optim or {})),
        train=TrainConfig(**{"precision": "fp32", **train}),
    )
    return Stepper(config, torch.device(device))


def clips(batch_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch_size, 3, 4, 32, 32), dtype=torch.uint8, generator=generator, device="cpu")


def run_step(stepper, *micro_batches, step=0, learning_rate=1e-3):
    stepper.begin(step, learning_rate)
    for video in micro_batches:
        stepper.accumulate(video)
    stepper.finish(step)
    return stepper.read_figures()


def test_two_accumulated_halves_equal_one_batch():
    """Their masks, too, do not depend on how the step is cut."""
    one, two = build(accumulate=1), build(accumulate=2)
    whole = run_step(one, clips())
    halves = run_step(two, clips()[:2], clips()[2:])
    for name in ("loss", "loss_reconstruction", "loss_sampling", "grad_norm"):
        assert halves[name] == pytest.approx(whole[name], rel=1e-5), name
    for first, second in zip(one.model.parameters(), two.model.parameters(), strict=True):
        gradients = (stepper.optimizer.state[p]["exp_avg"] for stepper, p in ((one, first), (two, second)))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_gradient_clipping_limits_the_update_and_reports_the_norm_before():
    free, clipped = build(), build(optim={"clip_grad_norm": 1e-3})
    assert run_step(clipped, clips())["grad_norm"] == run_step(free, clips())["grad_norm"] > 1e-3


def test_reported_entropy_and_maximum():
    figures = run_step(build(), clips())
    in_time = {"visible_in_time/0", "visible_in_time/1"}
    assert set(figures) == {*LOSSES, *OF_SAMPLER, *in_time, "grad_norm", "sampler_grad_norm"}
    assert 0 < figures["probability_entropy"] <= torch.log(torch.tensor(8.0))
    assert 1 / 8 <= figures["probability_max"] <= 1


def masks_of_step(step, seed):
    stepper, seen = build(seed=seed), []
    stepper.model.register_forward_hook(lambda module, arguments, output: seen.append(output.visible_ids))
    torch.rand(5)  # what was drawn before must not matter
    run_step(stepper, clips(64), step=step)
    return seen[0]


@pytest.mark.parametrize("seed", [0, 1, 20260101, 2**40 + 1])
def test_masks_depend_on_seed_and_step_only(seed):
    first = masks_of_step(3, seed)
    assert torch.equal(first, masks_of_step(3, seed))
    assert not torch.equal(first, masks_of_step(4, seed))


def test_every_bit_of_seed_step_and_place_counts():
    triples = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (2**32, 0, 0), (2**40, 0, 0), (0, 2**33, 0), (0, 0, 1), (0, 1, 1)]
    assert len({micro_batch_seed(*triple) for triple in triples}) == len(triples)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["decoder.head.weight", "sampler.head.weight"])
def test_a_non_finite_value_is_named_with_its_step_and_changes_nothing(weights, device):
    stepper = build(device=device)
    run_step(stepper, clips(), step=0)
    with torch.no_grad():
        stepper.model.get_parameter(weights)[0, 0] = float("inf")
    before = {name: p.clone() for name, p in stepper.model.named_parameters()}
    with pytest.raises(NonFiniteError, match="step 2: a value is not finite"):
        run_step(stepper, clips(), step=1)
    for name, parameter in stepper.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains(precision, device):
    stepper = build(precision=precision, device=device)
    losses = [run_step(stepper, clips(), step=step)["loss"] for step in range(30)]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("options", [{}, {"optim": {"clip_grad_norm": 0.1, "layer_decay": 0.9}}, {"keep_ratio": 0.5}])
def test_the_step_never_waits_for_the_device(options):
    stepper = build(**options)
    run_step(stepper, clips())
    stepper.begin(1, 1e-3)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        stepper.accumulate(clips())
        stepper.finish(1)
    called = [event for event in trace.events() if event.name.startswith("aten::")]
    assert "aten::addmm" in {event.name for event in called}
    waiting = {"aten::item", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
    # torch's fused AdamW for the CPU reads its own step counter; the one for CUDA does not.
    callers = [event.cpu_parent.name for event in called if event.name in waiting]
    assert set(callers) <= {"aten::_fused_adamw_"}


@pytest.mark.parametrize("strategy", ["adaptive", "tube", "random", "frame"])
@pytest.mark.parametrize(
    "options",
    [{"recompute": "fc1", "accumulate": 2}, {"recompute": "block", "precision": "bf16"}, {"precision": "fp16"}],
)
def test_a_step_makes_its_tensors_where_its_inputs_are(strategy, options):
    """One made on the default device, here the meta device, would be on another one than the model is on a GPU."""
    stepper = build(strategy=strategy, keep_ratio=0.5, dropout=0.1, optim={"clip_grad_norm": 0.1}, **options)
    with torch.device("meta"):
        stepper.begin(0, 1e-3)
        for _ in range(options.get("accumulate", 1)):
            stepper.accumulate(clips())
        stepper.finish(0)
    assert stepper.read_figures()["loss"] > 0


def test_fp16_whose_gradients_always_overflow_is_an_error():
    stepper = build(precision="fp16")
    stepper.model.decoder.head.weight.register_hook(lambda gradient: gradient + float("inf"))
    for step in range(16):  # from 2^16 down to 1
        run_step(stepper, clips(), step=step)
    with pytest.raises(NonFiniteError, match="overflow even at a loss scale"):
        run_step(stepper, clips(), step=16)


def test_fp16_leaves_the_parameters_alone_after_a_fault():
    stepper = build(precision="fp16")
    with torch.no_grad():
        stepper.model.sampler.head.bias.fill_(float("-inf"))
    before = {name: p.clone() for name, p in stepper.model.named_parameters()}
    with pytest.raises(NonFiniteError, match="step 1"):
        run_step(stepper, clips())
    assert all(torch.equal(p, before[name]) for name, p in stepper.model.named_parameters())


@pytest.mark.gpu
def test_a_step_on_the_gpu_never_waits_for_it():
    stepper = build(device="cuda")
    run_step(stepper, clips())
    stepper.begin(1, 1e-3)
    video = clips()  # not pinned: the step sees to that
    try:
        torch.cuda.set_sync_debug_mode("error")  # any host sync raises
        stepper.accumulate(video)
        stepper.finish(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stepper.read_figures()["loss"] > 0
