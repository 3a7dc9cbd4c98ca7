"""Loss, soft labels and the moving average, against arithmetic of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adamae_fast.config import ModelConfig
from adamae_fast.config_finetune import AugmentConfig, ClassifierConfig, FinetuneConfig, FinetuneTrainConfig
from adamae_fast.train.finetune_step import FinetuneStepper, soft_cross_entropy
from tests.train.labelled_videos import MODEL

CPU = torch.device("cpu")
NO_AUGMENT = {"layers": 0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
NUM_CLASSES = 4


def build(augment=None, drop_path=0.0, **train):
    config = FinetuneConfig(
        model=ModelConfig(**MODEL),
        classifier=ClassifierConfig(drop_path=drop_path),
        augment=AugmentConfig(**{**NO_AUGMENT, **(augment or {})}),
        train=FinetuneTrainConfig(**{"precision": "fp32", "batch_size": 2, **train}),
    )
    return FinetuneStepper(config, NUM_CLASSES, CPU)


def black_and_white():
    """Two clips of one colour each."""
    return torch.stack([torch.full((3, 4, 32, 32), value, dtype=torch.uint8) for value in (0, 255)])


def noise(num_clips=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_clips, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)


def run_step(stepper, *micro_batches, step=0, learning_rate=1e-3):
    stepper.begin(step, learning_rate)
    for video, labels in micro_batches:
        stepper.accumulate(video, labels)
    stepper.finish(step)
    return stepper.read_figures()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cross_entropy(dtype):
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(5, 7)) * 30).to(dtype)
    targets = rng.dirichlet(np.ones(7), size=5)
    z = logits.double().numpy()
    log_sum = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) + z.max(1, keepdims=True)
    expected = -(targets * (z - log_sum)).sum(1).mean()
    loss = soft_cross_entropy(logits, torch.tensor(targets))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def observe(stepper):
    """Let the logits tell clips apart; what the model sees and answers is kept."""
    torch.manual_seed(5)
    torch.nn.init.normal_(stepper.model.head.weight, std=0.5)
    seen = []
    stepper.model.register_forward_hook(lambda module, arguments, output: seen.append((arguments[0], output.detach())))
    return seen


def expected_loss(logits, labels, weight, smoothing):
    """Both clips have ``weight`` of themselves. Their logits differ, so that no sum over them hides an error."""
    smooth = np.eye(NUM_CLASSES)[labels] * (1 - smoothing) + smoothing / NUM_CLASSES
    targets = weight * smooth + (1 - weight) * smooth[::-1]
    z = logits.double().numpy()
    return -(targets * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_a_cutmix_from_pixels_to_loss(smoothing):
    """The weight of each label is the share of the pixels that its clip has in the mixture."""
    stepper = build({"cutmix": 1.0, "label_smoothing": smoothing})
    seen, labels, weights = observe(stepper), [1, 2], []
    for step in range(3):
        batch = (black_and_white(), torch.tensor(labels))
        loss = run_step(stepper, batch, step=step, learning_rate=0.0)["loss"]
        video, logits = seen.pop()
        own = [(video[0] == 0).double().mean().item(), (video[1] == 255).double().mean().item()]
        assert own[0] == own[1]
        assert loss == pytest.approx(expected_loss(logits, labels, own[0], smoothing), rel=1e-5)
        if 0.1 < own[0] < 0.9:
            assert abs(loss - expected_loss(logits, labels, 1.0, smoothing)) > 1e-3
        weights.append(own[0])
    assert len(set(weights)) == 3


def test_labels_of_a_mixup_from_pixels_to_loss():
    stepper = build({"mixup": 0.8, "label_smoothing": 0.1})
    seen, labels, clips = observe(stepper), [1, 2], noise(2)
    first, second = clips.double()
    for step in range(3):
        loss = run_step(stepper, (clips, torch.tensor(labels)), step=step, learning_rate=0.0)["loss"]
        video, logits = seen.pop()
        # Least squares over 12288 rounded pixels.
        weight = ((video[0] - second) * (first - second)).sum() / (first - second).square().sum()
        assert loss == pytest.approx(expected_loss(logits, labels, weight.item(), 0.1), rel=1e-3)


def test_two_accumulated_halves_equal_one_batch():
    one, two = build(batch_size=4), build(accumulate=2)
    video, labels = noise(), torch.tensor([0, 1, 2, 3])
    whole = run_step(one, (video, labels))
    halves = run_step(two, (video[:2], labels[:2]), (video[2:], labels[2:]))
    for name in ("loss", "grad_norm"):
        assert halves[name] == pytest.approx(whole[name], rel=1e-5)


def test_micro_batches_and_steps_are_augmented_differently():
    stepper = build({"mixup": 0.8}, accumulate=2)
    seen = []
    stepper.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    batch = (black_and_white(), torch.tensor([0, 1]))
    run_step(stepper, batch, batch, step=0)
    run_step(stepper, batch, batch, step=1)
    again = build({"mixup": 0.8}, accumulate=2)
    again.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    run_step(again, batch, batch, step=1)
    assert len({clips.numpy().tobytes() for clips in seen[:4]}) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen[2:4], seen[4:], strict=True))


def test_the_moving_average_follows_its_recursion():
    decay = 0.7
    stepper = build(ema_decay=decay)
    expected = {name: p.detach().double().clone() for name, p in stepper.model.named_parameters()}
    for step in range(4):
        run_step(stepper, (noise(2, step), torch.tensor([0, 1])), step=step, learning_rate=1e-2)
        for name, p in stepper.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, value in expected.items():
        torch.testing.assert_close(stepper.averaged[name].double(), value, rtol=1e-5, atol=1e-7)
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    with stepper.validated_model() as model:
        assert not model.training
        assert all(torch.equal(p, stepper.averaged[name]) for name, p in model.named_parameters())
    assert stepper.model.training
    assert all(torch.equal(p, before[name]) for name, p in stepper.model.named_parameters())
    assert not torch.equal(before["tokenizer.weight"], stepper.averaged["tokenizer.weight"])


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_no_weight():
    stepper = build()
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters() if name != "head.bias"}
    with torch.no_grad():
        stepper.model.head.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"step 6: a value is not finite \(loss=nan"):
        run_step(stepper, (noise(2), torch.tensor([0, 1])), step=5)
    assert all(torch.equal(stepper.model.get_parameter(name), value) for name, value in before.items())


@pytest.mark.parametrize("augment", [{"mixup": 0.8}, {"cutmix": 1.0, "layers": 2}, {"erase": 0.9}])
def test_a_step_makes_its_tensors_where_its_inputs_are(augment):
    """One made on the default device, here the meta device, would be on another one than the model is on a GPU."""
    stepper = build(augment, drop_path=0.1, recompute="fc1", ema_decay=0.9)
    video, labels = noise(2), torch.tensor([1, 3])
    with torch.device("meta"):
        stepper.begin(0, 1e-3)
        stepper.accumulate(video, labels)
        stepper.finish(0)
    assert stepper.read_figures()["loss"] > 0
