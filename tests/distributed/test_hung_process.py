"""A process that hangs, which nothing announces: the other one gives up, and so does it where it comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adamae_fast.distributed.world import _is_loss_of_contact
from adamae_fast.run_folder import RunFolder
from tests.distributed import torchrun as tr
from tests.distributed.processes import environment_of, free_port

CONTACT_SECONDS = 5
"""distributed.timeout of the run."""

ENOUGH_SECONDS = 120
"""After which a process counts as one that does not end; it says nothing about speed."""

# What takes seconds to import is there before the two meet, which they must do within the timeout.
START = (
    "import sys, tests.distributed.scenarios as ready; print('ready', flush=True); sys.stdin.readline(); "
    "sys.exit(ready.main(sys.argv[1:]))"
)


@contextmanager
def two_processes(arguments: list[str], logs: list[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """The command in two processes, without torchrun, which would end what has not ended by itself."""
    port = free_port()
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            started = subprocess.Popen(
                [sys.executable, "-c", START, "pretrain", *arguments],
                env={**tr.ENVIRONMENT, **environment_of(rank, 2, port)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        processes.append(started)
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        yield processes
    finally:
        for process in processes:
            process.kill()  # SIGKILL ends a stopped one, too
            process.communicate()


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=pytest.mark.faults)])
def test_the_other_one_ends_and_says_what_it_waited_for(tmp_path, tiny_videos, mode):
    recipe, run = tr.write_run(tmp_path, tiny_videos), RunFolder(tmp_path / "run")
    logs = [tmp_path / f"stderr_{rank}.txt" for rank in (0, 1)]
    endless = ("--train.steps", "100000", "--distributed.timeout", str(CONTACT_SECONDS), "--distributed.mode", mode)
    with two_processes(tr.options(recipe, run.path, *endless), logs) as (first, second):
        tr.wait_until(lambda: tr.last_step(run) >= 3, first, logs[0])
        os.kill(second.pid, signal.SIGSTOP)
        first.communicate(timeout=ENOUGH_SECONDS)
        os.kill(second.pid, signal.SIGCONT)
        second.communicate(timeout=ENOUGH_SECONDS)
    assert (first.returncode, second.returncode) == (2, 2), "".join(log.read_text() for log in logs)
    for rank, log in enumerate(logs):
        told = log.read_text().splitlines()[-1]
        assert f"rank {rank}: another process of this run has ended, or could not be reached for 5 s" in told
        assert "(distributed.timeout)" in told
        # In gloo's words; the second one finds that the first one has left.
        assert "imed out" in told or "Application timeout" in told or rank == 1


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:21", True),
        ("Application timeout caused pair closure", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_gloo_says_of_a_lost_process(words, is_one):
    assert _is_loss_of_contact(RuntimeError(words)) == is_one
