"""The CUDA C++ kernel on the host: a block at a time, each thread a coroutine, against the reference."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamae_fast.ops import sample_visible
from tests.conftest import REPOSITORY

COMPILER = shutil.which("c++")
INF, NAN = float("inf"), float("nan")
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
"""Of the threads, between one meeting and the next."""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++) to emulate a block with")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("emulator") / "emulated_block.so"
    source = Path(__file__).with_name("emulated_block.cpp")
    flags = ["-O1", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-w", f"-I{REPOSITORY / 'csrc'}"]
    subprocess.run([str(COMPILER), *flags, "-o", str(path), str(source)], check=True)
    library = ctypes.CDLL(str(path))
    library.sample_visible.restype = ctypes.c_bool
    return library


def emulate(emulator: ctypes.CDLL, logits_BN: Tensor, seeds_B: Tensor, num_visible: int, order: str) -> list[Tensor]:
    batch_size, num_tokens = logits_BN.shape
    # Ids and numbers that are never written show.
    ids = [torch.full((batch_size, s), -7) for s in (num_visible, num_tokens - num_visible, num_tokens)]
    results = [*ids, torch.full((batch_size, 3), -7.0)]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (logits_BN, seeds_B, *results)]
    sizes = batch_size, num_tokens, num_visible
    assert emulator.sample_visible(*pointers[:2], *sizes, *pointers[2:], ORDERS[order]), "threads wait for ever"
    return results


def check(emulator: ctypes.CDLL, logits_BN: Tensor, num_visible: int, order: str) -> None:
    seeds_B = torch.randint(-(2**63), 2**63 - 1, logits_BN.shape[:1], generator=torch.Generator().manual_seed(7))
    results = emulate(emulator, logits_BN, seeds_B, num_visible, order)
    expected = torch.ops.adamae_fast.sample_visible.reference(logits_BN, seeds_B, num_visible)
    for result, truth in zip(results[:3], expected[:3], strict=True):
        assert torch.equal(result, truth)
    torch.testing.assert_close(results[3], expected[3], rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("num_tokens", "num_visible"),
    [(1568, 78), (1568, 1), (63, 7), (1, 1), (257, 257), (4096, 205), (4099, 4000), (8192, 410)],
)
def test_the_reference_draws_the_same(emulator: ctypes.CDLL, num_tokens: int, num_visible: int, order: str) -> None:
    logits_BN = torch.randn(2, num_tokens, generator=torch.Generator().manual_seed(num_tokens))
    check(emulator, logits_BN, num_visible, order)


@pytest.mark.parametrize("num_visible", [1, 5, 60, 199, 200])
def test_ties_go_to_the_lower_index(emulator: ctypes.CDLL, num_visible: int) -> None:
    """Beside logits as large as these the noise vanishes."""
    generator = torch.Generator().manual_seed(0)
    few_values = torch.randint(-2, 3, (3, 200), generator=generator) * 1e12
    few_values[0] = 1e12
    check(emulator, few_values, num_visible, "shuffled")


@pytest.mark.parametrize("num_visible", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("special", [[NAN], [-NAN, NAN, INF], [INF, INF, -INF], [-INF], [-0.0, 0.0]])
def test_special_logits_sort_and_show_in_the_entropy(
    emulator: ctypes.CDLL, special: list[float], num_visible: int
) -> None:
    logits_BN = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    logits_BN[0, 3 : 3 + 2 * len(special)] = torch.tensor(special * 2)
    check(emulator, logits_BN, num_visible, "shuffled")


def test_no_logit_at_all_is_finite(emulator: ctypes.CDLL) -> None:
    for value in (NAN, INF, -INF):
        check(emulator, torch.full((2, 70), value), 9, "ascending")


def test_the_largest_logits_lose_no_digits(emulator: ctypes.CDLL) -> None:
    """Σ exp would overflow, or vanish."""
    for value in (-3e38, -100.0, 100.0, 3e38):
        logits_BN = torch.full((1, 300), value)
        check(emulator, logits_BN, 30, "descending")
        results = emulate(emulator, logits_BN, torch.zeros(1, dtype=torch.int64), 30, "descending")
        assert results[3][0, 2].item() == pytest.approx(torch.log(torch.tensor(300.0)).item())


def test_noise_is_the_reference_s(emulator: ctypes.CDLL) -> None:
    """Keys differ in their last bits alone where logits are equal: every K asks for another place in their order."""
    for num_visible in range(1, 41):
        check(emulator, torch.zeros(4, 40), num_visible, "ascending")
    assert sample_visible.gumbel_noise(torch.zeros(1, dtype=torch.int64), 40).unique().numel() == 40
