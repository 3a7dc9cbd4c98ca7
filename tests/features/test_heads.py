"""The heads against their formulas, and their training against hand-made steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from adamae_fast.features.heads import RECIPES, AttentiveHead, LinearHead, Recipe, score, train_heads

CPU = torch.device("cpu")


def sgd(groups):
    return torch.optim.SGD(groups, momentum=0.9)


def test_linear_head_is_batch_norm_and_a_matrix():
    torch.manual_seed(0)
    head, x_BD = LinearHead(6, 3).double(), torch.randn(8, 6, dtype=torch.float64) * 5 + 2
    mean, var = x_BD.mean(0), x_BD.var(0, unbiased=False)
    expected = (x_BD - mean) / (var + 1e-6).sqrt() @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x_BD), expected)
    # One step moved the running statistics a tenth of the way from 0 and 1; variance is the unbiased one there.
    other = torch.randn(3, 6, dtype=torch.float64)
    running = (other - 0.1 * mean) / (0.9 + 0.1 * x_BD.var(0) + 1e-6).sqrt()
    torch.testing.assert_close(head.eval()(other), running @ head.linear.weight.T + head.linear.bias)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]


def plain_layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def test_attentive_head_is_its_formula_and_every_parameter_learns():
    torch.manual_seed(0)
    head, tokens_BND = AttentiveHead(12, 5, num_heads=3).double(), torch.randn(4, 7, 12, dtype=torch.float64)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    expected = []
    for tokens in tokens_BND:
        keys_values = plain_layer_norm(tokens, head.norm1) @ head.kv.weight.T + head.kv.bias
        q, out = head.query @ head.q.weight.T + head.q.bias, []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
            k, v = keys_values[:, :12][:, part], keys_values[:, 12:][:, part]
            out.append((k @ q[part] / math.sqrt(4)).softmax(0) @ v)
        x = head.query + torch.cat(out) @ head.proj.weight.T + head.proj.bias
        hidden = plain_layer_norm(x, head.norm2) @ head.mlp.fc1.weight.T + head.mlp.fc1.bias
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + gelu @ head.mlp.fc2.weight.T + head.mlp.fc2.bias
        expected.append(x @ head.linear.weight.T + head.linear.bias)
    found_BK = head(tokens_BND)
    assert found_BK.shape == (4, 5)
    torch.testing.assert_close(found_BK, torch.stack(expected))
    found_BK.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    torch.testing.assert_close(head(tokens_BND[:, order]), found_BK)  # a set of tokens


def made_by_hand(x_VD, labels_V, lr, epochs, batch_size, seed):
    """SGD with momentum 0.9 and a cosine to 0, written out."""
    torch.manual_seed(seed)
    head = LinearHead(x_VD.shape[1], 3)
    parameters, order = list(head.parameters()), torch.Generator().manual_seed(seed)
    velocity = [torch.zeros_like(p) for p in parameters]
    per_epoch = len(x_VD) // batch_size
    step = 0
    for _ in range(epochs):
        rows_V = torch.randperm(len(x_VD), generator=order)
        for i in range(per_epoch):
            rows = rows_V[i * batch_size : (i + 1) * batch_size]
            gradients = torch.autograd.grad(F.cross_entropy(head(x_VD[rows]), labels_V[rows]), parameters)
            rate = lr * (1 + math.cos(math.pi * step / (epochs * per_epoch))) / 2
            for p, v, g in zip(parameters, velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.data.sub_(rate * v)
            step += 1
    return head.eval()


def test_heads_of_several_rates_are_trained_as_each_alone():
    torch.manual_seed(1)
    x_VD, labels_V = torch.randn(11, 6), torch.randint(0, 3, (11,))
    recipe = Recipe((0.1, 0.5), 3, sgd)
    settings = {"batch_size": 4, "seed": 7, "device": CPU}
    heads = train_heads(lambda: LinearHead(6, 3), lambda rows: x_VD[rows], labels_V.tolist(), recipe, **settings)
    state = torch.random.get_rng_state()
    for head, lr in zip(heads, recipe.lrs, strict=True):
        expected = made_by_hand(x_VD, labels_V, lr, 3, 4, 7)
        for (name, found), value in zip(head.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(found, value, msg=name)
    scores = score(heads[0], lambda rows: x_VD[rows], 11, 3, CPU)
    torch.testing.assert_close(scores, heads[0](x_VD).double().softmax(-1))
    assert score(heads[0], lambda rows: x_VD[rows], 0, 3, CPU).shape == (0, 3)
    torch.random.set_rng_state(state)
    train_heads(lambda: LinearHead(6, 3), lambda rows: x_VD[rows], labels_V.tolist(), recipe, **settings)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_recipes_learn_what_can_be_learned(kind):
    """Classes far apart in a few tokens of noise."""
    torch.manual_seed(0)
    labels_V = torch.arange(48) % 3
    x_VND = torch.randn(48, 4, 64)
    x_VND[:, 1, :3] += 6 * F.one_hot(labels_V)
    x_V = x_VND if kind == "attentive" else x_VND.mean(1)

    def build():
        return AttentiveHead(64, 3, 2) if kind == "attentive" else LinearHead(64, 3)

    heads = train_heads(
        build, lambda rows: x_V[rows], labels_V.tolist(), RECIPES[kind], batch_size=8, seed=0, device=CPU
    )
    right = [(score(h, lambda rows: x_V[rows], 48, 3, CPU).argmax(1) == labels_V).double().mean() for h in heads]
    assert max(right) == 1.0


def test_a_stop_signal_ends_training():
    x_VD = torch.randn(8, 6)
    recipe = Recipe((0.1,), 3, sgd)
    settings = {"batch_size": 4, "seed": 0, "device": CPU}
    read, epochs = (lambda rows: x_VD[rows]), []
    stop = []

    def advance():
        epochs.append(1)
        stop.append("SIGTERM")

    build = lambda: LinearHead(6, 2)  # noqa: E731
    assert train_heads(build, read, [0, 1] * 4, recipe, stop=stop, advance=advance, **settings) is None
    assert len(epochs) == 1
