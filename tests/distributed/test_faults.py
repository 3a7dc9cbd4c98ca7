"""What machines do to a long run: ``make test-faults``, some minutes. Each run ends as an undisturbed one, to the bit.

What it is compared with is one process that accumulates: two processes take the same steps (test_processes.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adamae_fast.run_folder import RunFolder
from adamae_fast.train.checkpoint import verify_checkpoint
from tests.distributed import torchrun as tr

pytestmark = pytest.mark.faults

KILLS = 10
CONTACT_SECONDS = 10
HOSTS = ("10.213.77.1", "10.213.77.2")


def set_up(folder: Path, videos: list[Path], steps: int, every: int) -> tuple[Path, list[str], RunFolder]:
    """A recipe, options, and a run that nothing disturbed."""
    recipe = tr.write_run(folder, videos)
    common = ["--train.steps", str(steps), "--checkpoint.every", str(every)]
    expected = RunFolder(folder / "expected")
    tr.run_alone(recipe, expected.path, *common, "--train.accumulate", "2")
    return recipe, common, expected


def assert_sound(run: RunFolder, expected: RunFolder) -> None:
    tr.assert_same_run(run, expected)
    for checkpoint in run.list_checkpoints():
        verify_checkpoint(checkpoint)


def test_kill_9_of_a_random_rank_at_ten_random_moments(tmp_path, tiny_videos):
    recipe, common, expected = set_up(tmp_path, tiny_videos, steps=1500, every=7)
    run, log = RunFolder(tmp_path / "run"), tmp_path / "log.txt"
    launch = ("--standalone", "--nproc-per-node", "2", "--max-restarts", str(KILLS))
    agent = tr.torchrun(launch, tr.options(recipe, run.path, *common, "--data.num_workers", "1"), log)
    chance, seen = random.Random(20261121), set[int]()

    def new_workers() -> dict[int, int] | None:
        alive = tr.workers(agent)
        return alive if len(alive) == 2 and not seen & set(alive.values()) else None

    try:
        for _ in range(KILLS):
            alive = tr.wait_until(new_workers, agent, log)
            seen.update(alive.values())
            time.sleep(chance.uniform(0, 8))  # while it starts, takes steps, writes
            os.kill(alive[chance.randrange(2)], signal.SIGKILL)
        assert agent.wait(240) == 0, log.read_text()[-4000:]
    finally:
        agent.kill()
    assert log.read_text().count("(exitcode: -9)") >= KILLS
    assert_sound(run, expected)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and the command ip")
    names = [f"adamae{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
                pytest.skip("this machine does not allow network namespaces")
        ends = [f"cable{side}" for side in "ab"]
        ip("-n", names[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, HOSTS, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def kept_running(starts: list[Callable[[], subprocess.Popen[bytes]]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    agents = [start() for start in starts]
    try:
        yield agents
    finally:
        for agent in agents:
            for worker in tr.workers(agent).values():
                os.kill(worker, signal.SIGKILL)
            agent.kill()
            agent.wait()


def test_a_host_that_is_cut_off_and_comes_back(tmp_path, tiny_videos, hosts):
    """torchrun meets between two hosts; each host starts it again where it ends by an error, as a scheduler does."""
    recipe, common, expected = set_up(tmp_path, tiny_videos, steps=600, every=10)
    run, logs = RunFolder(tmp_path / "run"), [tmp_path / f"log_{side}.txt" for side in "ab"]
    options = tr.options(recipe, run.path, *common, "--distributed.timeout", str(CONTACT_SECONDS))

    def start_on(number: int) -> subprocess.Popen[bytes]:
        settings = "is_host=1" if number == 0 else "is_host=0"
        launch = (
            *("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "20"),
            *("--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"{HOSTS[0]}:29431"),
            *("--rdzv-conf", f"{settings},read_timeout=10", "--local-addr", HOSTS[number]),
        )
        cable = f"cable{'ab'[number]}"
        prefix = ("ip", "netns", "exec", hosts[number])
        return tr.torchrun(launch, options, logs[number], prefix, GLOO_SOCKET_IFNAME=cable)

    with kept_running([lambda n=n: start_on(n) for n in (0, 1)]) as agents:
        tr.wait_until(lambda: tr.last_step(run) >= 25, agents[0], logs[0])
        ip("-n", hosts[1], "link", "set", "cableb", "down")
        cut = tr.last_step(run)
        told = "another process of this run has ended, or could not be reached for 10 s"
        tr.wait_until(lambda: told in logs[0].read_text(), agents[0], logs[0], seconds=3 * CONTACT_SECONDS)
        assert tr.last_step(run) <= cut + 1  # no step without the other host
        time.sleep(5)
        ip("-n", hosts[1], "link", "set", "cableb", "up")
        deadline = time.monotonic() + 240
        while any(agent.poll() != 0 for agent in agents) and time.monotonic() < deadline:
            for number, agent in enumerate(agents):
                if agent.poll() not in (0, None):
                    agents[number] = start_on(number)
            if run.summary.exists() and json.loads(run.summary.read_text())["step"] == 600:
                break
            time.sleep(0.2)
    assert run.summary.exists(), "".join(log.read_text()[-4000:] for log in logs)
    assert_sound(run, expected)


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(tmp_path, tiny_videos):
    if os.geteuid() != 0:
        pytest.skip("a small file system takes root")
    recipe, disk = tr.write_run(tmp_path, tiny_videos), tmp_path / "disk"
    disk.mkdir()
    # A checkpoint has 17 MB: two fit, and the third is to be written beside them.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", disk], check=False).returncode:
        pytest.skip("this machine does not allow a small file system")
    try:
        options = tr.options(recipe, disk / "run", "--checkpoint.every", "2", "--train.steps", "20")
        command = [sys.executable, *tr.PRETRAIN, *options]
        done = subprocess.run(command, env=tr.ENVIRONMENT, capture_output=True, text=True, timeout=120)
        run = RunFolder(disk / "run")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "no space for another checkpoint" in done.stderr.splitlines()[-1]
        assert f"{run.checkpoint(4)} is kept" in done.stderr
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000002", "step_00000004"]
        for checkpoint in run.list_checkpoints():
            verify_checkpoint(checkpoint)
    finally:
        subprocess.run(["umount", disk], check=True)
