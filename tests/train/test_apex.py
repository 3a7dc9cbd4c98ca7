"""apex is not installed here: a stand-in with its interface, written from its documentation, shows how it is used."""

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from adamae_fast.config import PretrainConfig
from adamae_fast.info import collect
from adamae_fast.run_folder import RunFolder
from adamae_fast.train import apex
from adamae_fast.train.checkpoint import RunState, load_checkpoint, save_checkpoint
from adamae_fast.train.finite import NonFiniteError
from tests.train.test_step import build, clips, run_step

NUM_NORMS = 2 * (4 + 1 + 2) + 2  # two a block of nano; encoder's and decoder's last


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose steps are counted by group; skips where the scaler that it is given found an infinity."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, capturable=False
    ):
        assert adam_w_mode
        assert capturable
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def zero_grad(self):
        raise AssertionError("takes no set_to_none")

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            device = group["params"][0].device
            skip = grad_scaler._check_inf_per_device(self)[device]
            scale = grad_scaler._get_scale_async()
            assert skip.shape == scale.shape == (1,)
            group["step"] = group["step"] + 1 if "step" in group else torch.tensor([1], dtype=torch.int32)
            assert group["step"].dtype == torch.int32
            if skip.item() == 1:
                continue
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                beta1, beta2 = group["betas"]
                state["exp_avg"].lerp_(p.grad / scale, 1 - beta1)
                state["exp_avg_sq"].lerp_((p.grad / scale).square(), 1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** int(group["step"]))
                mean_square = state["exp_avg_sq"] / (1 - beta2 ** int(group["step"]))
                update = mean / (mean_square.sqrt() + group["eps"]) + group["weight_decay"] * p
                p.sub_(group["lr"] * update)


class FusedLayerNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5):
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight, self.bias = (nn.Parameter(torch.empty(normalized_shape)) for _ in range(2))

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def module(name, **contents):
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(contents)
    return made


@pytest.fixture
def installed(monkeypatch):
    for made in (
        module("apex"),
        module("apex.optimizers", FusedAdam=FusedAdam),
        module("apex.normalization", FusedLayerNorm=FusedLayerNorm),
        module("amp_C"),
        module("fused_layer_norm_cuda"),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)


@pytest.fixture
def anywhere(installed, monkeypatch):
    """The stand-in computes on the CPU, too."""
    monkeypatch.setattr(apex, "reason_no_cuda", lambda parameter: None)


def with_apex(optimizer="torch", layer_norm="torch"):
    return build(optim={"layer_decay": 0.9, "implementation": optimizer}, layer_norm=layer_norm)


def train(stepper, first, last):
    return [run_step(stepper, clips(seed=i), step=i)["loss"] for i in range(first, last)]


@pytest.mark.parametrize(
    ("key", "options"),
    [("optim.implementation", {"optimizer": "apex"}), ("model.layer_norm", {"layer_norm": "apex"})],
)
def test_apex_that_is_not_there_is_named_with_the_reason_and_the_remedy(key, options, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match=rf"{key}='apex' cannot be used \(ModuleNotFoundError.*choose {key}=torch"):
        with_apex(**options)


@pytest.mark.usefixtures("installed")
def test_apex_without_its_extension_or_a_gpu_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="on CUDA devices, and the run on cpu"):
        with_apex("apex")
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(ValueError, match=r"optim\.implementation='apex' cannot be used \(.*amp_C"):
        with_apex("apex")


@pytest.mark.usefixtures("anywhere")
def test_its_adamw_trains_as_torchs():
    assert train(with_apex("apex"), 0, 5) == pytest.approx(train(with_apex(), 0, 5), rel=1e-5)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("before", "after"), [("apex", "apex"), ("apex", "torch"), ("torch", "apex")])
def test_each_adamw_continues_the_others_checkpoints(before, after, tmp_path):
    first, second, whole = with_apex(before), with_apex(after), with_apex()
    train(first, 0, 3)
    state = RunState(step=3, num_videos=1, loss_scale={})
    folder = save_checkpoint(RunFolder(tmp_path), PretrainConfig(), first.model, first.optimizer, state)
    load_checkpoint(folder, second.model, second.optimizer)
    assert train(second, 3, 6) == pytest.approx(train(whole, 0, 6)[3:], rel=1e-5)


@pytest.mark.usefixtures("anywhere")
def test_its_adamw_leaves_the_parameters_alone_after_a_fault():
    stepper = with_apex("apex")
    train(stepper, 0, 1)
    with torch.no_grad():
        stepper.model.decoder.head.weight[0, 0] = float("inf")
    before = {name: p.clone() for name, p in stepper.model.named_parameters()}
    with pytest.raises(NonFiniteError, match="step 2"):
        train(stepper, 1, 2)
    assert all(torch.equal(p, before[name]) for name, p in stepper.model.named_parameters())


@pytest.mark.usefixtures("anywhere")
def test_its_layer_norm_has_the_same_weights_and_names():
    stepper, plain = with_apex(layer_norm="apex"), with_apex()
    norms = [m for m in stepper.model.modules() if isinstance(m, FusedLayerNorm)]
    assert len(norms) == NUM_NORMS
    assert {norm.eps for norm in norms} == {1e-5, 1e-6}
    assert list(stepper.model.state_dict()) == list(plain.model.state_dict())
    assert train(stepper, 0, 3) == train(plain, 0, 3)


def test_info_says_what_of_apex_can_be_used(monkeypatch):
    monkeypatch.setattr("adamae_fast.info.missing_parts", lambda: {"FusedLayerNorm": "not built"})
    (found,) = [backend for backend in collect()[1] if backend.name == "apex"]
    assert found.available
    assert found.detail == "FusedAdam usable; FusedLayerNorm not usable: not built"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"optim": {"implementation": "apex"}}, {"layer_norm": "apex"}])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_real_apex_trains_as_torch(options, cuda_graph):
    if apex.missing_parts():
        pytest.skip(f"apex: {apex.missing_parts()}")
    steppers = build(device="cuda"), build(**options, device="cuda", cuda_graph=cuda_graph, batch_size=4)
    expected, actual = (train(stepper, 0, 8) for stepper in steppers)
    assert actual == pytest.approx(expected, rel=1e-3)
