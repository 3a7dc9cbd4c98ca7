import os
from contextlib import contextmanager

import pytest
import torch

from adamae_fast import device as device_module
from adamae_fast.device import Uploader


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    """torch.cuda.set_device refuses it, also where there is no GPU."""
    device_module.make_current(torch.device("cuda"))
    device_module.make_current(torch.device("cpu"))
    made_current = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    device_module.make_current(torch.device("cuda", 3))
    assert made_current == [torch.device("cuda", 3)]


def test_on_a_cpu_nothing_is_copied():
    video = torch.zeros(3, dtype=torch.uint8)
    assert Uploader(torch.device("cpu"))(video) is video


def test_a_gpu_copies_in_a_stream_of_its_own(monkeypatch):
    """In this order: copy in the side stream, then the current one waits for it and shares the memory."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    class Copy:
        def record_stream(self, stream):
            calls.append(f"copy is used by {stream.name}")

    @contextmanager
    def within(stream):
        calls.append(f"in {stream.name}")
        yield
        calls.append(f"out of {stream.name}")

    def upload(tensor, device):
        calls.append(f"copy of {tensor.shape[0]} to {device}")
        return Copy()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(device_module, "upload", upload)
    assert isinstance(Uploader(torch.device("cuda", 1))(torch.zeros(5)), Copy)
    assert calls == ["in side", "copy of 5 to cuda:1", "out of side", "main waits for side", "copy is used by main"]


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_a_real_copy_overtakes_the_step_under_way(pinned):
    device = torch.device("cuda")
    video = torch.randint(256, (4, 3, 16, 64, 64), dtype=torch.uint8)
    video = video.pin_memory() if pinned else video
    uploader = Uploader(device)
    uploader(video)  # the first allocation may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # half a second: a thousand times the copy
    busy_until = torch.cuda.Event()
    busy_until.record()
    copy = uploader(video)
    uploader._stream.synchronize()
    assert not busy_until.query()
    assert torch.equal(copy.cpu(), video)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    assert device_module.num_usable_cores() == 2
