"""Worlds of forked processes, for the tests of what several of them do together.

A fork costs milliseconds, where a process of its own would import torch for seconds. Forking needs a parent in which
torch has not computed anything yet, so all of it happens in one program, ``python -m tests.distributed.scenarios``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAILED = 70
"""Exit status of a process in which a scenario went wrong; statuses of the command itself are 0, 2 and 130."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_world(size: int, work: Callable[[int], Any], folder: Path) -> None:
    """Call ``work(rank)`` in ``size`` processes; what rank r returns is in ``folder/rank_r.json`` afterwards."""
    folder.mkdir(parents=True)
    port = free_port()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _be_rank(rank, size, port, work, folder)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "statuses.json").write_text(json.dumps(statuses))


def _be_rank(rank: int, size: int, port: int, work: Callable[[int], Any], folder: Path) -> None:
    os.environ |= environment_of(rank, size, port)
    status = 0
    with (folder / f"stderr_{rank}.txt").open("w") as errors:
        os.dup2(errors.fileno(), 2)
        try:
            result = work(rank)
            (folder / f"rank_{rank}.json").write_text(json.dumps(result))
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        except BaseException:
            traceback.print_exc()
            status = FAILED
        sys.stderr.flush()
    os._exit(status)
