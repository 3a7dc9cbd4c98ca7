import pytest
import torch

from adamae_fast.config import OptimConfig
from adamae_fast.train.finite import FiniteGuard, NonFiniteError
from adamae_fast.train.optim import build_optimizer


def step_with_gradient(guard, layer, optimizer, step, value):
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, value)
    guard.observe(torch.tensor(step), torch.tensor([1.0, value]))
    optimizer.found_inf = guard.found_inf()
    optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_and_all_later_ones_leave_parameters_and_moments_untouched(bad):
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimConfig())
    guard = FiniteGuard(("loss", "grad_norm"), torch.device("cpu"))
    step_with_gradient(guard, layer, optimizer, 0, 1.0)
    guard.check()
    before = [p.clone() for p in layer.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in layer.parameters()]
    step_with_gradient(guard, layer, optimizer, 1, bad)
    step_with_gradient(guard, layer, optimizer, 2, 1.0)
    for parameter, old, moment in zip(layer.parameters(), before, moments, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    with pytest.raises(NonFiniteError, match=rf"step 2: .*loss=1, grad_norm={bad}"):
        guard.check()


def test_the_loss_and_what_is_not_finite_are_told():
    guard = FiniteGuard(("loss", "entropy", "lift", "grad_norm"), torch.device("cpu"))
    guard.observe(torch.tensor(0), torch.tensor([1.0, 2.0, float("nan"), float("inf")]))
    with pytest.raises(NonFiniteError, match=r"\(loss=1, lift=nan, grad_norm=inf\)"):
        guard.check()


def test_good_steps_pass():
    guard = FiniteGuard(("loss",), torch.device("cpu"))
    for step in range(3):
        guard.observe(torch.tensor(step), torch.tensor([float(step)]))
    guard.check()
    assert guard.found_inf() == 0
