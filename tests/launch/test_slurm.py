"""configs/launch/slurm.sbatch with stand-ins for srun and scontrol: what is started, what a signal leads to."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "configs" / "launch" / "slurm.sbatch"

SRUN = """#!{python}
# Takes the place of srun and of the training: notes what it was given, and ends as the test says.
import json, os, pathlib, signal, sys, time

folder, how = pathlib.Path(os.environ["FOLDER"]), os.environ["HOW"]
(folder / "srun.json").write_text(json.dumps({{"arguments": sys.argv[1:], "cpus": os.environ["SRUN_CPUS_PER_TASK"]}}))
summary = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1], "summary.json")
summary.parent.mkdir(exist_ok=True)


def end(stopped_by, step, status):
    summary.write_text(json.dumps({{"stopped_by": stopped_by, "step": step, "steps": 10}}))
    sys.exit(status)


def stop(number, frame):
    time.sleep(0.3)  # saving
    if how == "finishes while it is told to stop":
        end(None, 10, 1)
    end(signal.Signals(number).name, 4, 1)  # torchrun's own status, after a signal, is 1


signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
if how == "finishes":
    end(None, 10, 0)
if how == "fails":
    sys.exit(3)
time.sleep(30)
"""

SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> "$FOLDER/scontrol.txt"; fi
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder of stand-ins, and what SLURM sets."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "96",
    }
    return {**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}", "FOLDER": str(tmp_path)}


def run(cluster, how, send=None):
    """Run the script, send it a signal once training is under way, and return its exit status."""
    folder = Path(cluster["FOLDER"])
    arguments = [str(folder / "run"), "--config", "configs/pretrain_k400_vitb.yaml", "--train.epochs", "5"]
    process = subprocess.Popen(["bash", SCRIPT, *arguments], env={**cluster, "HOW": how})
    if send is not None:
        deadline = time.monotonic() + 20
        while not (folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(send)
    return process.wait(timeout=20)


def requeued(cluster):
    path = Path(cluster["FOLDER"], "scontrol.txt")
    return path.read_text().splitlines() if path.exists() else []


def test_it_starts_one_torchrun_on_each_node(cluster):
    assert run(cluster, "finishes") == 0
    assert requeued(cluster) == []
    started = json.loads(Path(cluster["FOLDER"], "srun.json").read_text())
    assert started["cpus"] == "96"
    words = started["arguments"]
    torchrun = words.index("torchrun")
    assert words[:torchrun] == ["--kill-on-bad-exit=0"]
    module = words.index("-m")
    options = dict(zip(words[torchrun + 1 : module : 2], words[torchrun + 2 : module : 2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "8",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node7:22345",
        "--rdzv-id": "12345-0",
        "--max-restarts": "3",
        "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    }
    assert words[module + 1 : module + 3] == ["adamae_fast", "pretrain"]
    assert words[-2:] == ["--output_dir", f"{cluster['FOLDER']}/run"]


def test_torchrun_knows_every_option_it_is_given(cluster):
    """PyTorch's own parser reads the line."""
    from torch.distributed.run import get_args_parser

    run(cluster, "finishes")
    words = json.loads(Path(cluster["FOLDER"], "srun.json").read_text())["arguments"]
    parsed = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts, parsed.module) == ("2", "8", 3, True)
    assert (parsed.training_script, parsed.training_script_args[0]) == ("adamae_fast", "pretrain")


def test_out_of_time_it_saves_and_is_queued_again(cluster):
    assert run(cluster, "trains", signal.SIGUSR1) == 0
    summary = json.loads(Path(cluster["FOLDER"], "run", "summary.json").read_text())
    assert summary["stopped_by"] == "SIGUSR1"  # the script waited until it was saved
    assert requeued(cluster) == ["requeue 12345"]


def test_a_finished_run_is_not_queued_again(cluster):
    assert run(cluster, "finishes while it is told to stop", signal.SIGUSR1) == 0
    assert requeued(cluster) == []


def test_a_cancelled_run_saves_and_is_not_queued_again(cluster):
    """SLURM sends SIGTERM to the steps, too; the shell must not die before they have saved."""
    folder = Path(cluster["FOLDER"])
    process = subprocess.Popen(["bash", SCRIPT, str(folder / "run")], env={**cluster, "HOW": "trains"})
    while not (folder / "ready").exists():
        time.sleep(0.02)
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    process.wait(timeout=20)
    assert json.loads((folder / "run" / "summary.json").read_text())["stopped_by"] == "SIGTERM"
    assert requeued(cluster) == []


def test_a_failure_is_the_jobs_own(cluster):
    assert run(cluster, "fails") == 3
    assert requeued(cluster) == []


def test_without_a_folder_it_says_how_it_is_called(cluster):
    finished = subprocess.run(["bash", SCRIPT], env=cluster, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "RUN_FOLDER" in finished.stderr


def test_nothing_in_the_script_is_suspicious():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", SCRIPT], check=True)


def test_the_image_installs_what_the_project_pins():
    lines = (SCRIPT.parent / "Dockerfile").read_text()
    assert "NEVER BUILT" in lines
    assert "--constraint constraints.txt" in lines
    assert (REPOSITORY / "constraints.txt").is_file()


PASS_ON = """#!/bin/bash
shift
exec "$@"
"""


def test_a_real_training_saves_when_time_is_up(cluster, tiny_videos):
    """PyTorch's torchrun and two processes of the training; srun only passes on the line, and the signal to it."""
    folder = Path(cluster["FOLDER"])
    (folder / "bin" / "srun").write_text(PASS_ON)
    (folder / "bin" / "scontrol").write_text(SCONTROL.replace("node7\\nnode8\\n", "localhost\\n"))
    tools = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**cluster, "PATH": tools, "PYTHONPATH": str(REPOSITORY), "SLURM_GPUS_ON_NODE": "2"}
    environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    options = {
        "data.manifest": tiny_videos[0].parent, "data.num_workers": 0, "data.stride": 1, "data.crop": "center",
        "model.size": "nano", "model.num_frames": 4, "model.frame_size": 32, "mask.ratio": 0.8,
        "train.batch_size": 2, "train.device": "cpu", "train.precision": "fp32", "train.steps": 1_000_000,
        "log.every": 1, "log.tensorboard": "false",
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in options.items()]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            ["bash", SCRIPT, str(folder / "run"), *words],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, (folder / "output.txt").read_text()
            assert time.monotonic() < deadline, (folder / "output.txt").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == 0, (folder / "output.txt").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of them have ended, unless the test has failed
            os.killpg(process.pid, signal.SIGKILL)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["stopped_by"] == "SIGUSR1"
    assert summary["checkpoint"].endswith(f"step_{summary['step']:08d}")
    assert requeued(cluster) == [f"requeue {os.getpid()}"]
