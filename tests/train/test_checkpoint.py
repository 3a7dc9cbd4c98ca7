import dataclasses
import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from adamae_fast.config import CheckpointConfig, MaskConfig, ModelConfig, OptimConfig, PretrainConfig
from adamae_fast.model.adamae import AdaMAE
from adamae_fast.run_folder import RunFolder, find_weights
from adamae_fast.tensor_file import write_tensors_file
from adamae_fast.train.checkpoint import (
    CheckpointError,
    CheckpointSaver,
    RunState,
    differences,
    find_resume_point,
    load_checkpoint,
    save_checkpoint,
    set_aside_newer,
    verify_checkpoint,
)
from adamae_fast.train.optim import build_optimizer

CONFIG = PretrainConfig(
    model=ModelConfig(size="nano", num_frames=2, frame_size=32, patch_size=16),
    mask=MaskConfig(ratio=0.5),
    checkpoint=CheckpointConfig(keep=2),
)
ASYNCHRONOUS = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(keep=2, asynchronous=True))


def build(seed):
    torch.manual_seed(seed)
    model = AdaMAE(CONFIG.model, CONFIG.mask)
    optimizer = build_optimizer(model, OptimConfig())
    return model, optimizer


def train_a_step(model, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randint(0, 256, (2, 3, 2, 32, 32), dtype=torch.uint8, generator=generator)
    torch.manual_seed(seed)  # as the training loop does for each step: dropout must repeat
    loss = model(clip, visible_ids=torch.tensor([[0, 1], [1, 3]])).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def state(step, **changes):
    return RunState(**{"step": step, "num_videos": 5, "loss_scale": {}, **changes})


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


@pytest.fixture
def saved(run):
    model, optimizer = build(0)
    for step in (1, 2):
        train_a_step(model, optimizer)
        save_checkpoint(run, CONFIG, model, optimizer, state(step))
    return model, optimizer


def test_a_restored_run_continues_bit_for_bit(run, saved):
    model, optimizer = saved
    expected = [train_a_step(model, optimizer, seed) for seed in (1, 2)]
    other, other_optimizer = build(99)
    assert load_checkpoint(run.checkpoint(2), other, other_optimizer) == state(2)
    assert [train_a_step(other, other_optimizer, seed) for seed in (1, 2)] == expected
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_newest_are_kept(run, saved):
    model, optimizer = saved
    save_checkpoint(run, CONFIG, model, optimizer, state(3))
    assert run.list_checkpoints() == [run.checkpoint(2), run.checkpoint(3)]


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_previous_and_no_half_checkpoint(run, saved, monkeypatch):
    monkeypatch.setattr("adamae_fast.train.checkpoint.save_config", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run, CONFIG, *saved, state(3))
    assert run.list_checkpoints() == [run.checkpoint(1), run.checkpoint(2)]
    monkeypatch.undo()
    save_checkpoint(run, CONFIG, *saved, state(3))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000002", "step_00000003"]


@pytest.fixture
def saver(run):
    with CheckpointSaver(run, ASYNCHRONOUS) as saver:
        yield saver


def test_a_save_in_the_background_writes_the_same_bytes(run, saved, saver, monkeypatch):
    """It is listed only when it is whole, and what the next step does to the weights is not in it."""
    model, optimizer = saved
    released = threading.Event()

    def write_later(tensors, path):
        assert released.wait(60)
        write_tensors_file(tensors, path)

    monkeypatch.setattr("adamae_fast.train.checkpoint.write_tensors_file", write_later)
    folder = saver.save(model, optimizer, state(3))
    train_a_step(model, optimizer)
    assert not folder.exists()
    assert run.list_checkpoints() == [run.checkpoint(1), run.checkpoint(2)]
    released.set()
    saver.wait()
    assert run.list_checkpoints() == [run.checkpoint(2), folder]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (folder / name).read_bytes() == (run.checkpoint(2) / name).read_bytes()


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=f"^{tmp_path}: "):
        write_tensors_file({"a": torch.zeros(2)}, tmp_path)


def test_what_fails_in_the_background_is_raised_by_the_next_save(run, saved, saver, monkeypatch):
    monkeypatch.setattr("adamae_fast.train.checkpoint.save_config", fail)
    saver.save(*saved, state(3))
    with pytest.raises(OSError, match=r"step_00000003 could not be written .*No space left.* are kept"):
        saver.save(*saved, state(4))
    monkeypatch.undo()
    assert run.list_checkpoints() == [run.checkpoint(1), run.checkpoint(2)]
    saver.save(*saved, state(4))
    saver.wait()
    assert run.list_checkpoints() == [run.checkpoint(2), run.checkpoint(4)]


def test_the_end_of_the_block_raises_what_failed_in_the_background_but_hides_no_other_error(run, saved, monkeypatch):
    monkeypatch.setattr("adamae_fast.train.checkpoint.save_config", fail)

    def save_and(end):
        with CheckpointSaver(run, ASYNCHRONOUS) as saver:
            saver.save(*saved, state(3))
            return end[0]

    with pytest.raises(OSError, match="No space left"):
        save_and("an end")
    with pytest.raises(IndexError):
        save_and("")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["truncate", "delete", "flip a bit"])
def test_damage_is_refused_by_name_and_the_previous_offered(run, saved, name, damage):
    file = run.checkpoint(2) / name
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[-20] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000002 is damaged .*--resume .*step_00000001"):
        load_checkpoint(run.checkpoint(2), *build(0))


@pytest.mark.parametrize("change", [{"step": 1}, {"files": {}}, {"num_videos": 6}])
def test_a_changed_state_is_refused(run, saved, change):
    file = run.checkpoint(2) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match="changed after it was written"):
        verify_checkpoint(run.checkpoint(2))


def test_the_offered_checkpoint_is_a_sound_one(run, saved):
    model, optimizer = saved
    save_checkpoint(run, dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(keep=3)), model, optimizer, state(3))
    for step in (2, 3):
        (run.checkpoint(step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step_00000003 is damaged.*--resume .*step_00000001"):
        verify_checkpoint(run.checkpoint(3))


@pytest.mark.parametrize(("moment", "newest"), [("rename", 2), ("rmtree", 3)])
def test_a_kill_while_saving_leaves_sound_checkpoints(run, saved, monkeypatch, moment, newest):
    """What is on disk before the new checkpoint has its name, and before the oldest one is removed."""

    class KilledError(BaseException):
        pass

    def kill(*_, **__):
        raise KilledError

    target = "pathlib.Path.rename" if moment == "rename" else "adamae_fast.train.checkpoint.shutil.rmtree"
    monkeypatch.setattr(target, kill)
    with pytest.raises(KilledError):
        save_checkpoint(run, CONFIG, *saved, state(3))
    monkeypatch.undo()
    assert verify_checkpoint(run.list_checkpoints()[-1]).step == newest
    save_checkpoint(run, CONFIG, *saved, state(4))
    assert [verify_checkpoint(folder).step for folder in run.list_checkpoints()] == [newest, 4]


def test_a_run_does_not_mix_with_another_ones_checkpoints(run, saved, tmp_path):
    other = RunFolder(tmp_path / "other")
    save_checkpoint(other, CONFIG, *saved, state(7))
    with pytest.raises(CheckpointError, match="already holds another run"):
        find_resume_point(str(run.checkpoint(2)), other)


def test_a_damaged_only_checkpoint_offers_a_fresh_start(run):
    save_checkpoint(run, CONFIG, *build(0), state(1))
    (run.checkpoint(1) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no earlier sound checkpoint"):
        verify_checkpoint(run.checkpoint(1))


def test_weights_of_another_model_are_refused(run, saved):
    model = AdaMAE(ModelConfig(size="nano", num_frames=2, frame_size=48, patch_size=16), CONFIG.mask)
    with pytest.raises(CheckpointError, match=r"(?s)do not fit.*sampler\.positions"):
        load_checkpoint(run.checkpoint(2), model, build_optimizer(model, OptimConfig()))


def test_resume_point(run, saved, tmp_path):
    assert find_resume_point("auto", run) == run.checkpoint(2)
    assert find_resume_point(str(run.checkpoint(1)), run) == run.checkpoint(1)
    assert find_resume_point(str(tmp_path), RunFolder(tmp_path / "other")) == run.checkpoint(2)
    assert find_resume_point("auto", RunFolder(tmp_path / "fresh")) is None
    assert find_resume_point("none", RunFolder(tmp_path / "fresh")) is None
    with pytest.raises(CheckpointError, match="already holds another run"):
        find_resume_point("none", run)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_resume_point(str(tmp_path / "nowhere"), run)


def test_going_back_sets_the_newer_branch_aside(run, saved):
    set_aside_newer(run, 1)
    assert find_resume_point("auto", run) == run.checkpoint(1)
    aside = run.checkpoints / "step_00000002.superseded_by_step_00000001"
    assert (aside / "model.safetensors").is_file()
    save_checkpoint(run, CONFIG, *saved, state(2))
    assert [path.name for path in set_aside_newer(run, 1)] == [f"{aside.name}_2"]
    with pytest.raises(CheckpointError, match="already holds another run"):
        find_resume_point(str(aside), run)


def test_what_changed_since_the_checkpoint(run, saved):
    changed = dataclasses.replace(CONFIG, optim=OptimConfig(base_lr=1e-3))
    assert differences(run.checkpoint(2), CONFIG) == {}
    assert differences(run.checkpoint(2), changed) == {"optim.base_lr": (1.5e-4, 1e-3)}


def test_from_pretrained_reads_checkpoint_or_run(run, saved):
    model, _ = saved
    for path in (run.path, run.checkpoint(2)):
        loaded = AdaMAE.from_pretrained(path)
        for one, two in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(one, two)
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        find_weights(run.path / "nothing")


def test_files_are_plain_tensors_and_json(run, saved):
    weights = load_file(run.checkpoint(2) / "model.safetensors")
    assert set(weights) == set(saved[0].state_dict())
    record = json.loads((run.checkpoint(2) / "state.json").read_text())
    assert (record["step"], record["num_videos"]) == (2, 5)
