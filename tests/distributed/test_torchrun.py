"""One run under torchrun that loses a process, is told to end, and goes on with another number of processes."""

from __future__ import annotations

import json
import os
import signal

from adamae_fast.run_folder import RunFolder, checkpoint_step
from tests.distributed import torchrun as tr

STEPS = 40


def test_a_killed_rank_and_a_signal_cost_nothing(tmp_path, tiny_videos):
    recipe, log = tr.write_run(tmp_path, tiny_videos), tmp_path / "log.txt"
    common = ("--train.steps", str(STEPS), "--checkpoint.every", "5", "--data.max_bad_share", "0.05")
    alone = (*common, "--train.accumulate", "2")
    expected, run = RunFolder(tmp_path / "expected"), RunFolder(tmp_path / "run")
    tr.run_alone(recipe, expected.path, *alone)

    launch = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--signals-to-handle", "SIGUSR1,SIGTERM")
    agent = tr.torchrun(launch, tr.options(recipe, run.path, *common, "--data.num_workers", "1"), log)
    try:
        tr.wait_until(lambda: tr.last_step(run) >= 7, agent, log)
        first = tr.workers(agent)
        os.kill(first[1], signal.SIGKILL)
        tr.wait_until(lambda: set(tr.workers(agent)) == {0, 1} and tr.workers(agent)[0] != first[0], agent, log)
        tr.wait_until(lambda: "continuing from" in log.read_text(), agent, log)
        reached = max(map(checkpoint_step, run.list_checkpoints()))  # the lines after it are written anew
        tr.wait_until(lambda: tr.last_step(run) > reached, agent, log)
        agent.send_signal(signal.SIGUSR1)
        assert agent.wait(60) != 0  # torchrun's own word for a signal
    finally:
        agent.kill()
    summary = json.loads(run.summary.read_text())
    assert summary["stopped_by"] == "SIGUSR1"
    assert run.list_checkpoints()[-1] == run.checkpoint(summary["step"])
    assert tr.last_step(run) == summary["step"] < STEPS
    tr.run_alone(recipe, run.path, *alone)
    tr.assert_same_run(run, expected)
