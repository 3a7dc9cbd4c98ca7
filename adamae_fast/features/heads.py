"""Heads on frozen features, and their training: several learning rates at once, on the same batches.

Shapes: B videos of a batch, V of the training set, N tokens, D width, K classes, X either (D,) or (N, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamae_fast.model.block import Mlp
from adamae_fast.model.layers import LayerNorm

MOMENTUM = 0.9
WEIGHT_DECAY = 0.01
"""Of the attentive head's AdamW; SGD on the linear head has none."""

SCORED = 64
"""Rows that a trained head sees at once."""


class LinearHead(nn.Module):
    """Linear(BatchNorm(x)), BatchNorm without weights (He et al. 2022, MAE, appendix A.1).

    BatchNorm brings every channel to mean 0 and variance 1, so that one learning rate suits any encoder.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.linear = _classes(width, num_classes)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return logits (B, K)."""
        return self.linear(self.norm(features_BD))


class AttentiveHead(nn.Module):
    """A learned query looks at all tokens (Bardes et al. 2024, V-JEPA, section 4.2).

    q ← q + attention(q, LayerNorm(tokens)), q ← q + MLP(LayerNorm(q)), logits = Linear(q); one query, multi-head.
    """

    def __init__(self, width: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(width))
        self.norm1, self.norm2 = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)
        self.q, self.kv, self.proj = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.mlp = Mlp(width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.query, std=0.02)
        self.linear = _classes(width, num_classes)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x_B1D = self.query.expand(len(tokens_BND), 1, -1)
        k_BND, v_BND = self.kv(self.norm1(tokens_BND)).chunk(2, dim=-1)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.q(x_B1D), k_BND, v_BND)]
        x_B1D = x_B1D + self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        x_B1D = x_B1D + self.mlp(self.norm2(x_B1D))
        return self.linear(x_B1D[:, 0])


def _classes(width: int, num_classes: int) -> nn.Linear:
    linear = nn.Linear(width, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True)
class Recipe:
    """How a kind of head is trained: from which rates, with which optimizer, for how long."""

    lrs: tuple[float, ...]
    epochs: int
    optimizer: Callable[[list[dict[str, object]]], torch.optim.Optimizer]


RECIPES = {
    "linear": Recipe((0.01, 0.03, 0.1, 0.3, 1.0), 100, partial(torch.optim.SGD, momentum=MOMENTUM)),
    "attentive": Recipe((1e-4, 3e-4, 1e-3, 3e-3), 20, partial(torch.optim.AdamW, weight_decay=WEIGHT_DECAY)),
}
"""Defaults of head.lrs and head.epochs for each probe."""


def train_heads(
    build: Callable[[], nn.Module],
    read: Callable[[Sequence[int]], Tensor],
    labels: Sequence[int],
    recipe: Recipe,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    stop: Sequence[str] = (),
    advance: Callable[[], None] = lambda: None,
) -> list[nn.Module] | None:
    """Train one head for each learning rate; all start alike and see the same batches. The rate falls as a cosine to 0.

    Args:
        build: makes a head.
        read: features (B, X) of rows of the training set.
        labels: class of each row.
        recipe: rates, epochs, optimizer.
        batch_size: rows of a step, or all of them if they are fewer; the rest of an epoch's last batch is left out.
        seed: of the first weights and of the order.
        device: where the heads are trained.
        stop: receives the name of a stop signal.
        advance: is called after each epoch.

    Returns:
        The heads in eval mode, in the order of ``recipe.lrs``; None once ``stop`` is not empty.
    """
    heads = []
    for _ in recipe.lrs:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            heads.append(build().to(device))
    groups = [{"params": list(h.parameters()), "lr": lr} for h, lr in zip(heads, recipe.lrs, strict=True)]
    optimizer = recipe.optimizer(groups)
    batch_size = min(batch_size, len(labels))
    per_epoch = len(labels) // batch_size
    total = recipe.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    labels_V = torch.tensor(labels, device=device)
    order = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        rows_V = torch.randperm(len(labels), generator=order)
        for rows_B in rows_V[: per_epoch * batch_size].split(batch_size):
            if stop:
                return None
            features_BX = read(rows_B.tolist()).to(device)
            targets_B = labels_V[rows_B.to(device)]
            optimizer.zero_grad()
            # Each head's loss depends on its own weights alone, so the sum gives each its own gradient.
            torch.stack([F.cross_entropy(head(features_BX), targets_B) for head in heads]).sum().backward()
            optimizer.step()
            schedule.step()
        advance()
    return [head.eval() for head in heads]


@torch.no_grad()
def score(
    head: nn.Module, read: Callable[[Sequence[int]], Tensor], num_rows: int, num_classes: int, device: torch.device
) -> Tensor:
    """Return the probability of each class for each row, fp64 (V, K) on the CPU."""
    nothing = torch.empty(0, num_classes, dtype=torch.float64)
    batches = [list(range(i, min(i + SCORED, num_rows))) for i in range(0, num_rows, SCORED)]
    return torch.cat([nothing, *(head(read(rows).to(device)).double().softmax(-1).cpu() for rows in batches)])
