"""Steps and runs of several processes against those of one: the same clips, masks, losses and weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adamae_fast.run_folder import RunFolder, read_json_lines
from tests.distributed.scenarios import LEARNING_RATE, STEPS, TOTAL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scenarios(tmp_path_factory, tiny_videos) -> Path:
    """Folder with what each scenario has left."""
    folder = tmp_path_factory.mktemp("scenarios")
    broken = folder / "broken.mp4"
    broken.write_text("no video")
    manifest = folder / "manifest.txt"
    manifest.write_text("".join(f"{path} 0\n" for path in [*tiny_videos, broken]))
    command = [sys.executable, "-m", "tests.distributed.scenarios", str(folder), str(manifest)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def results(scenarios: Path, name: str, statuses: set[int] = frozenset({0})) -> list:
    """What each process has returned; its error is shown if its status is another one."""
    folder = scenarios / name
    found = json.loads((folder / "statuses.json").read_text())
    assert set(found) <= statuses, "".join(path.read_text() for path in sorted(folder.glob("stderr_*.txt")))
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]


def parameters(scenarios: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(scenarios / name / "parameters.safetensors")


def assert_close(scenarios: Path, name: str, expected: str, rtol: float, atol: float) -> None:
    """Moments within the tolerance; weights likewise, but for what AdamW makes of gradients that are next to nothing:
    it divides by their size, so that their rounding counts as much as they do."""
    one, two = (parameters(scenarios, n) for n in (name, expected))
    assert one.keys() == two.keys()
    for key, value in one.items():
        least = atol if key.startswith("moment.") else LEARNING_RATE / 20
        torch.testing.assert_close(value, two[key], rtol=rtol, atol=least, msg=lambda text, key=key: f"{key}: {text}")


def ids_by_clip(ranks: list, accumulate: int = 1) -> list:
    """Visible ids in the order of the step's clips: micro-batch a of rank r is the (a·W + r)-th."""
    ordered = []
    for number in range(STEPS):
        for place in range(accumulate):
            for rank in ranks:
                ordered += rank["ids"][number * accumulate + place]
    return ordered


@pytest.mark.parametrize("name", ["ddp_2", "ddp_4", "fsdp2_2", "fsdp2_4"])
def test_any_number_of_processes_takes_the_same_steps(scenarios, name):
    whole, ranks = results(scenarios, "whole"), results(scenarios, name)
    assert ids_by_clip(ranks) == ids_by_clip(whole)
    assert len(ids_by_clip(whole)) == STEPS * TOTAL
    for rank in ranks:
        assert rank["figures"] == ranks[0]["figures"]  # all know the means
        for mine, expected in zip(rank["figures"], whole[0]["figures"], strict=True):
            assert mine == pytest.approx(expected, rel=2e-5)
    assert_close(scenarios, name, "whole", rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["ddp_2x2", "ddp_4x1", "fsdp2_2x2"])
def test_accumulation_is_the_same_as_processes(scenarios, name):
    """With dropout, too: its numbers follow from the place of a micro-batch in the step."""
    whole, ranks = results(scenarios, "whole_x4"), results(scenarios, name)
    accumulate = 4 // len(ranks)
    assert ids_by_clip(ranks, accumulate) == ids_by_clip(whole, 4)
    for rank in ranks:
        assert rank["figures"] == ranks[0]["figures"]
        for mine, expected in zip(rank["figures"], whole[0]["figures"], strict=True):
            assert mine == pytest.approx(expected, rel=2e-5)
    assert_close(scenarios, name, "whole_x4", rtol=1e-4, atol=1e-7)


def test_gradients_travel_once_a_step(scenarios):
    one, two = (results(scenarios, name)[0]["exchanges"] for name in ("ddp_2", "ddp_2x2"))
    assert one
    assert len(one) == len(two)
    one, two = (results(scenarios, name)[0]["exchanges"] for name in ("fsdp2_2", "fsdp2_2x2"))
    reduced = [[name for name in names if "reduce" in name] for names in (one, two)]
    assert reduced[0]
    assert len(reduced[0]) == len(reduced[1])


def test_fsdp2_keeps_a_share(scenarios):
    whole, shares = (sum(rank["share"] for rank in results(scenarios, name)) for name in ("whole", "fsdp2_4"))
    assert shares == whole
    assert max(rank["share"] for rank in results(scenarios, "fsdp2_4")) < 0.3 * whole


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_recomputing_and_compiling_come_first(scenarios, mode):
    """Blocks that compute again and are compiled (by a back end that only traces) give the same."""
    results(scenarios, f"{mode}_ordered")
    assert_close(scenarios, f"{mode}_ordered", "whole", rtol=1e-4, atol=1e-7)


def test_ddp_and_fsdp2_agree_in_bf16(scenarios):
    """Both multiply in bf16; fsdp2 lets the blocks' weights travel in it, which rounds norms and biases, too."""
    whole, ddp, fsdp2 = (results(scenarios, name)[0] for name in ("whole_bf16", "ddp_bf16", "fsdp2_bf16"))
    for number in range(STEPS):
        expected = whole["figures"][number]["loss_reconstruction"]
        for found in (ddp, fsdp2):
            assert found["figures"][number]["loss_reconstruction"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_compressed_gradients_are_rounded_to_bf16(scenarios, mode):
    results(scenarios, f"{mode}_compressed")
    plain, compressed = (parameters(scenarios, name) for name in (f"{mode}_2", f"{mode}_compressed"))
    moments = [name for name in plain if name.startswith("moment.")]
    distance = torch.cat([(plain[n] - compressed[n]).flatten() for n in moments]).norm()
    size = torch.cat([plain[n].flatten() for n in moments]).norm()
    assert 2**-14 < distance / size < 2**-6  # bf16 keeps 8 bits


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_loss_that_is_no_number_on_one_rank_stops_all_and_names_it(scenarios, mode):
    first, second = results(scenarios, f"{mode}_bad_loss")
    assert first["unchanged"]
    assert second["unchanged"]
    assert (first["error"], second["error"]) == ("NonFiniteError", "ToldByFirstError")
    assert "step 2: a value is not finite (rank 1: loss=nan" in first["text"]
    assert "rank 0" not in first["text"]


def run(scenarios: Path, name: str) -> RunFolder:
    return RunFolder(scenarios / "runs" / name)


def curve(folder: RunFolder) -> list:
    names = ("step", "loss", "loss_reconstruction", "loss_sampling", "grad_norm", "lr", "quarantined")
    return [[line[name] for name in names] for line in read_json_lines(folder.metrics)]


def final(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.list_checkpoints()[-1] / "model.safetensors")


def in_order(ranks: list, accumulate: int) -> list:
    """Videos shown, in the order of the stream."""
    steps = len(ranks[0]) // accumulate
    places = range(accumulate)
    return [v for s in range(steps) for a in places for rank in ranks for v in rank[s * accumulate + a]]


def test_two_processes_are_one_that_accumulates_to_the_last_bit(scenarios):
    one, two = results(scenarios, "run_1x2"), results(scenarios, "run_2")
    assert in_order(two, 1) == in_order(one, 2)
    assert curve(run(scenarios, "run_2")) == curve(run(scenarios, "run_1x2"))
    expected, found = final(run(scenarios, "run_1x2")), final(run(scenarios, "run_2"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_batch_of_a_step_may_be_cut_otherwise(scenarios):
    """Four processes against one: without dropout the same but for rounding."""
    one, four = results(scenarios, "run_1_tube"), results(scenarios, "run_4")
    assert in_order(four, 1) == in_order(one, 1)
    for found, expected in zip(curve(run(scenarios, "run_4")), curve(run(scenarios, "run_1_tube")), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_quarantine_is_one_list(scenarios):
    for name in ("run_1x2", "run_2", "run_4"):
        lines = read_json_lines(run(scenarios, name).quarantine)
        assert [Path(line["path"]).name for line in lines] == ["broken.mp4"]
        assert read_json_lines(run(scenarios, name).metrics)[-1]["quarantined"] == 1


def test_too_many_unreadable_videos_end_all_processes(scenarios):
    results(scenarios, "run_too_bad", {2})
    told, silent = ((scenarios / "run_too_bad" / f"stderr_{rank}.txt").read_text() for rank in (0, 1))
    assert "more than data.max_bad_share=0.1 allows" in told
    assert told.count("\n") == 1
    assert silent == ""


def test_an_error_of_one_rank_s_data_ends_all_and_saves(scenarios):
    results(scenarios, "run_2_begins", {2})
    told, silent = ((scenarios / "run_2_begins" / f"stderr_{rank}.txt").read_text() for rank in (0, 1))
    assert told == "adamae-fast pretrain: rank 1: a data worker died\n"
    assert silent == ""


def test_another_number_of_processes_goes_on(scenarios):
    """Two processes took three steps; one that accumulates takes the rest, as if nothing had happened."""
    before, after = results(scenarios, "run_2_begins", {2}), results(scenarios, "run_1_goes_on")
    assert before == []
    assert len(after[0]) == 6  # three steps of two micro-batches
    assert curve(run(scenarios, "stopped"))[-3:] == curve(run(scenarios, "run_1x2"))[-3:]
    expected, found = final(run(scenarios, "run_1x2")), final(run(scenarios, "stopped"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_twice_as_many_processes_go_on(scenarios):
    """Two processes took three steps with two clips each; four with one clip each take the rest of the same curve.

    Masks are those of tubes, which need no sampler: its dropout would draw other numbers for batches that are cut
    otherwise.
    """
    whole, before = results(scenarios, "run_1_tube"), results(scenarios, "run_2_tube_begins", {2})
    after = results(scenarios, "run_4_goes_on")
    assert before == []
    assert [[len(shown) for shown in rank] for rank in after] == [[1, 1, 1]] * 4
    assert in_order(after, 1) == in_order(whole, 1)[3 * 4 :]  # without those of three steps
    expected, found = run(scenarios, "run_1_tube"), run(scenarios, "stopped_tube")
    for mine, other in zip(curve(found), curve(expected), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    weights, continued = final(expected), final(found)
    assert continued.keys() == weights.keys()
    for key, value in continued.items():
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["run_fsdp2", "stopped_fsdp2"])
def test_a_run_in_shares_is_the_same(scenarios, name):
    """From beginning to end, and where ddp goes on from its checkpoint."""
    for one in ("run_fsdp2", "run_ddp_goes_on"):
        results(scenarios, one)
    expected, found = run(scenarios, "run_2"), run(scenarios, name)
    for mine, other in zip(curve(found), curve(expected), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    weights = final(expected)
    for key, value in final(found).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["finetune_2", "finetune_fsdp2"])
def test_fine_tuning_and_its_validation_are_the_same(scenarios, name):
    """Augmentation and the average of the weights, too; the validation's videos are shared, and none is lost."""
    for one in ("finetune_1x2", name):
        results(scenarios, one)
    expected, found = run(scenarios, "finetune_1x2"), run(scenarios, name)
    lines = [read_json_lines(folder.validation) for folder in (found, expected)]
    assert lines[0] == lines[1]
    assert [(line["videos"], line["unreadable"]) for line in lines[0]] == [(5, 1)] * 2
    quarantined = [[line["path"] for line in read_json_lines(f.quarantine_val)] for f in (found, expected)]
    assert quarantined[0] == quarantined[1]
    assert len(quarantined[0]) == 1
    losses = [[line["loss"] for line in read_json_lines(folder.metrics)] for folder in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    weights = final(expected)
    for key, value in final(found).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-4)


def test_another_total_batch_is_another_experiment(scenarios):
    results(scenarios, "run_other_batch", {2})
    told = (scenarios / "run_other_batch" / "stderr_0.txt").read_text()
    assert "processes = 8 clips a step, but" in told
    assert "was trained with 4; choose a product of 4" in told


def test_a_slow_rank_is_named(scenarios):
    results(scenarios, "run_slow")
    lines = read_json_lines(run(scenarios, "run_slow").metrics)
    assert len(lines) == 3
    for line in lines[::2]:  # in the second step, DDP's forward waits for the others: it arranges its buckets anew
        assert line["slowest_rank"] == 1
        assert 0.2 < line["slowest_rank_share"] < 1
    assert all(not math.isnan(line["loss"]) for line in lines)


def test_a_full_disk_keeps_the_checkpoint_before(scenarios):
    results(scenarios, "run_full_disk", {2})
    told, silent = ((scenarios / "run_full_disk" / f"stderr_{rank}.txt").read_text() for rank in (0, 1))
    folder = run(scenarios, "run_full_disk")
    assert "no space for another checkpoint" in told
    assert f"{folder.checkpoint(2)} is kept" in told
    assert silent == ""
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000002"]
