import io
import json
import re
import time

import pytest
import torch
from rich.console import Console

from adamae_fast.run_folder import RunFolder, read_json_lines
from adamae_fast.train.metrics import IntervalClock, MetricsLog, ProgressLine, keep_metrics_until


def figures(step):
    rates = {"clips_per_second": 3.0, "seconds_per_step": 7.0, "data_wait_share": 0.25, "batches_ready": 1.5}
    return {"step": step, "loss": 1.0 / step, "quarantined": 1, **rates}


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def test_lines_are_readable_at_once_and_survive_a_torn_end(run):
    with MetricsLog(run, 0, tensorboard=False) as log:
        for step in (1, 2, 3):
            log.write(figures(step))
        assert [entry["step"] for entry in read_json_lines(run.metrics)] == [1, 2, 3]
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [entry["step"] for entry in read_json_lines(run.metrics)] == [1, 2, 3]


def test_a_resumed_run_writes_its_steps_once(run):
    with MetricsLog(run, 0, tensorboard=False) as log:
        for step in (1, 2, 3):
            log.write(figures(step))
    run.metrics.write_text(run.metrics.read_text() + '{"torn')
    with MetricsLog(run, 2, tensorboard=False) as log:
        log.write(figures(3))
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]


def test_nothing_to_keep(run):
    assert read_json_lines(run.metrics) == []
    keep_metrics_until(run.metrics, 5)
    assert not run.metrics.exists()


def test_tensorboard_holds_the_same_figures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(run, 0, tensorboard=True) as log:
        log.write(figures(2))
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == {
        key: value for key, value in figures(2).items() if key != "step"
    }


def test_wait_share_counts_only_what_was_waited_for(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def produce():
        nonlocal now
        now += 1.0
        return "batch"

    clock = IntervalClock(torch.device("cpu"))
    assert clock.wait_for(produce) == "batch"
    now += 3.0
    assert clock.lap(2, 16) == {"clips_per_second": 8.0, "seconds_per_step": 2.0, "data_wait_share": 0.25}
    now += 1.0
    assert clock.lap(1, 16)["data_wait_share"] == 0


class Event:
    """A point in the stream of a GPU that is ``behind`` seconds of work behind the host."""

    now = behind = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = Event.now + Event.behind

    def elapsed_time(self, end):
        return (end.time - self.time) * 1000


def test_a_gpu_that_still_computes_does_not_wait(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(time, "perf_counter", lambda: Event.now)

    def produce():
        Event.now += 1.0
        Event.behind = max(0.0, Event.behind - 1.0)

    clock = IntervalClock(torch.device("cuda", 0))
    for behind, waited in ((5.0, 0.0), (0.25, 0.75), (0.0, 1.0)):
        Event.behind = behind
        clock.wait_for(produce)
        Event.now += 1.0
        assert clock.lap(1, 1)["data_wait_share"] == waited / 2


@pytest.mark.gpu
def test_gaps_of_a_real_gpu():
    clock = IntervalClock(torch.device("cuda"))
    shares = []
    for busy in (True, False):
        torch.cuda.synchronize()
        clock.lap(1, 1)
        if busy:
            torch.cuda._sleep(10**9)  # about half a second
        clock.wait_for(lambda: time.sleep(0.1))
        torch.cuda.synchronize()
        shares.append(clock.lap(1, 1)["data_wait_share"])
    assert shares[0] < 0.05
    assert shares[1] > 0.8


def test_values_that_are_not_finite_are_null(run):
    with MetricsLog(run, 0, tensorboard=False) as log:
        log.write({**figures(1), "grad_norm": float("inf")})
    assert "Infinity" not in run.metrics.read_text()
    assert read_json_lines(run.metrics)[0]["grad_norm"] is None


def test_progress_in_a_log_file_is_a_plain_line(run):
    text = io.StringIO()
    with ProgressLine(Console(file=text, width=200), 0, 2) as line:
        for step in (1, 2):
            line.advance(step)
            line.report(figures(step))
    assert text.getvalue().splitlines() == [
        f"step {step}/2 · loss {1 / step:.4f} · 3.0 clips/s · data wait 25% · quarantined 1 · "
        f"1.5 ready · ETA 0:00:{eta}"
        for step, eta in ((1, "07"), (2, "00"))
    ]


def test_progress_tells_what_decoding_costs_where_it_is_known():
    text = io.StringIO()
    with ProgressLine(Console(file=text, width=200), 0, 1) as line:
        line.report({**figures(1), "decode_seconds": 0.0124})
    assert "1.5 ready · decode 12 ms/clip · ETA" in text.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_progress_in_a_terminal_is_live_and_shows_where_it_is(width):
    text = io.StringIO()
    with ProgressLine(Console(file=text, width=width, force_terminal=True), 0, 2400) as line:
        line.advance(1200)
        line.report(figures(1200))
    shown = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).splitlines() if "loss" in line][-1]
    assert "1200/2400 ETA" in shown
    assert "loss 0.0008 · 3.0 clips/s" in shown
    assert len(shown) <= width
