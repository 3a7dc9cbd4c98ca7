"""Nearest neighbours and their votes, against loops over plain numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adamae_fast.features import neighbours
from adamae_fast.features.neighbours import nearest, vote


def brute_force(queries, features, labels, k, temperature, num_classes):
    """DINO's kNN as its paper says it, one query at a time, in fp64."""
    found, scores = [], []
    for query in queries:
        cosines = [query @ f / np.sqrt((query @ query) * (f @ f)) for f in features]
        best = sorted(range(len(features)), key=lambda i: -cosines[i])[:k]
        votes = np.zeros(num_classes)
        for i in best:
            votes[labels[i]] += np.exp(cosines[i] / temperature)
        found.append(best)
        scores.append(votes / votes.sum())
    return np.array(found), np.array(scores)


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_neighbours_vote_as_in_a_plain_loop(monkeypatch, k, temperature):
    monkeypatch.setattr(neighbours, "CHUNK", 4)  # 9 queries are three chunks
    rng = np.random.default_rng(k)
    queries, features, labels = rng.normal(size=(9, 12)), rng.normal(size=(40, 12)), rng.integers(0, 5, 40)
    rows, scores = brute_force(queries, features, labels, k, temperature, 5)
    similarities_Qk, rows_Qk = nearest(torch.tensor(queries), torch.tensor(features), k)
    assert rows_Qk.tolist() == rows.tolist()
    assert torch.all(similarities_Qk.diff(dim=1) <= 0)
    found = vote(similarities_Qk, torch.tensor(labels)[rows_Qk], 5, temperature)
    np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-6)


def test_votes_do_not_overflow_at_small_temperatures():
    found = vote(torch.tensor([[0.9, 0.8]]), torch.tensor([[1, 0]]), 2, 1e-4)
    assert found.tolist() == [[0.0, 1.0]]


def test_lengths_do_not_count_and_zeros_are_no_error():
    features = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    similarities, rows = nearest(torch.tensor([[100.0, 0.0]]), features, 3)
    assert rows[0, 0] == 0
    assert similarities.tolist() == [[1.0, 0.0, 0.0]]
    assert nearest(torch.empty(0, 2), features, 2)[1].shape == (0, 2)


def test_more_neighbours_than_videos_are_refused():
    with pytest.raises(ValueError, match="k=3: there are only 2 videos"):
        nearest(torch.ones(1, 4), torch.ones(2, 4), 3)
