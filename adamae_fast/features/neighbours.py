"""Nearest videos by cosine similarity, and what they vote for.

Shapes: Q queries, V videos that are searched, D width, k neighbours, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Queries that are compared at once, which bounds the memory to so many rows of V similarities."""


def nearest(queries_QD: Tensor, features_VD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities of the ``k`` nearest rows, highest first, and which rows they are: (Q, k) fp32 and int64.

    Raises ValueError for k above V.
    """
    if k > len(features_VD):
        raise ValueError(f"k={k}: there are only {len(features_VD)} videos to choose from; choose at most so many")
    directions_VD = F.normalize(features_VD.float(), dim=1)
    similarities, rows = [torch.empty(0, k)], [torch.empty(0, k, dtype=torch.int64)]
    for chunk_QD in F.normalize(queries_QD.float(), dim=1).split(CHUNK):
        top = (chunk_QD @ directions_VD.T).topk(k, dim=1)
        similarities.append(top.values.cpu())
        rows.append(top.indices.cpu())
    return torch.cat(similarities), torch.cat(rows)


def vote(similarities_Qk: Tensor, labels_Qk: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Each class's share of the votes, fp64 (Q, K): a neighbour of similarity s has exp(s / temperature) of them.

    Caron et al. 2021 (DINO), section 4.1.
    """
    weights_Qk = ((similarities_Qk - similarities_Qk.amax(1, keepdim=True)).double() / temperature).exp()
    votes_QK = torch.zeros(len(labels_Qk), num_classes, dtype=torch.float64).scatter_add(1, labels_Qk, weights_Qk)
    return votes_QK / votes_QK.sum(1, keepdim=True)
