import torch

from adamae_fast import AdaMAE
from adamae_fast.config import ModelConfig, OptimConfig
from adamae_fast.train.optim import build_optimizer, set_learning_rate


def test_what_is_decayed():
    with torch.device("meta"):
        model = AdaMAE(ModelConfig(size="nano"))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.05))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(decay_of) == len(names)
    for name, parameter in names.items():
        is_free = name.endswith("bias") or "norm" in name or name == "mask_token"
        assert decay_of[id(parameter)] == (0.0 if is_free else 0.05), name
    assert decay_of[id(names["sampler.positions"])] == 0.05


def test_betas_and_rate():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimConfig())
    set_learning_rate(optimizer, 0.25)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
