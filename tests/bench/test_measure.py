"""What the benchmark claims about its own figures; nothing here looks at how long anything took."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adamae_fast.ops.registry import registered_names
from adamae_fast.testing import InputFactory, OpShape
from bench import measure, registry, results, run
from bench.peak import peak_extra_bytes
from bench.registry import ENTRIES, STEPS, Goal
from bench.timing import QUICK, Plan, copy_roof, summarize, time_in_turns

CPU = torch.device("cpu")
TINY = OpShape(grid=(2, 3, 2), tubelet_size=2, patch_size=4, num_visible=3, width=8)
every_entry = pytest.mark.parametrize("name", ENTRIES)


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without its C++ compiler: the same graph, without a minute of building."""
    monkeypatch.setattr(measure, "COMPILE_BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def gate(folder: Path, body: str) -> tuple[str, ...]:
    file = folder / "test_gate.py"
    file.write_text(f"def test_gate():\n    {body}\n")
    return (str(file),)


def measure_tiny(entry: registry.Entry) -> measure.Measured:
    return measure.measure(entry, TINY, torch.float32, CPU, Plan(warm_up=0, rounds=2, block=1), lambda what: None)


def test_every_operation_is_measured() -> None:
    assert {name.removesuffix("_backward") for name in registered_names()} - set(STEPS) == set(ENTRIES)
    assert set(STEPS.values()) <= set(ENTRIES)


@every_entry
def test_gates_are_the_operations_own_tests(name: str) -> None:
    (own,), (of_all, option, selected), *_ = ENTRIES[name].gates
    assert name in (run.conditions.ROOT / own).read_text()
    assert (of_all, option, selected) == ("tests/ops/test_registry.py", "-k", name)


@every_entry
def test_every_arm_computes_the_operation_and_is_measured_in_every_mode(name: str) -> None:
    entry = replace(ENTRIES[name], gates=())
    measured = measure_tiny(entry)
    assert measured.refused == {}
    arms = {arm for arm, _ in measured.figures}
    assert {"published", "compiled", "reference"} < arms
    assert set(measured.figures) == {(arm, mode) for arm in arms for mode in entry.modes}
    for figure in measured.figures.values():
        assert 0 < figure.timing.p20 <= figure.timing.median <= figure.timing.p80
        assert figure.timing.num_calls == 2
        assert figure.peak_bytes > 0


def test_a_gpu_has_gates_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that breaks its contract keeps no other operation from being timed."""
    red = ("tests/kernels/contract.py", "-k", "gather_tokens")
    monkeypatch.setattr(measure, "run_gate", lambda gate: "red" if gate[0] == red[0] and red[2] in gate[2] else None)
    names = ("gather_tokens", "sampling_loss", "head_patch_loss")
    cuda = [measure.gates_of(name, torch.device("cuda")) for name in names]
    assert measure.red_gates(gate for gates in cuda for gate in gates) == {red: "red"}
    assert [red in gates for gates in cuda] == [True, False, False]
    assert measure.red_gates(measure.gates_of("gather_tokens", CPU)) == {}
    assert {registry.KERNELS.get(name, name) for name in ENTRIES} <= set(registered_names())
    assert all((run.conditions.ROOT / file).is_file() for gates in cuda for file, *_ in gates)


def test_green_gates_run_together_and_red_ones_are_found_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    red: set[tuple[str, ...]] = set()

    def run_gate(gate: tuple[str, ...]) -> str | None:
        asked.append(gate)
        return f"{gate} is red" if any(set(each) <= set(gate) for each in red) else None

    monkeypatch.setattr(measure, "run_gate", run_gate)
    gates = [("a.py",), ("all.py", "-k", "a"), ("b.py",), ("all.py", "-k", "b"), ("a.py",)]
    assert measure.red_gates(gates) == {}
    assert asked == [("a.py", "b.py"), ("all.py", "-k", "a or b")]
    red.add(("b.py",))
    asked.clear()
    assert measure.red_gates(gates) == {("b.py",): "('b.py',) is red"}
    assert asked == [("a.py", "b.py"), ("all.py", "-k", "a or b"), ("a.py",), ("b.py",)]


def test_an_arm_that_is_wrong_is_refused_and_the_others_are_measured() -> None:
    entry = ENTRIES["gather_tokens"]

    def forgets_positions(tokens_BND, positions_ND, mask_BN):
        return entry.published(tokens_BND, torch.zeros_like(positions_ND), mask_BN)

    def wrong_gradient(tokens_BND, ids_BK, positions_ND):
        out = entry.tuned(tokens_BND, ids_BK, positions_ND)
        return 2 * out - out.detach()

    measured = measure_tiny(replace(entry, gates=(), published=forgets_positions, tuned=wrong_gradient))
    assert measured.refused["published"].startswith("result 0 is off by")
    assert measured.refused["compiled"].startswith("gradient 0 is off by")
    assert {arm for arm, _ in measured.figures}.isdisjoint({"published", "compiled"})
    assert ("reference", "full") in measured.figures


def test_a_split_that_is_none_is_refused() -> None:
    entry = ENTRIES["sample_visible"]

    def descending(logits_BN, num_visible):
        return tuple(ids.flip(1) for ids in registry.published.sample_visible(logits_BN, num_visible))

    def forgets_the_last(logits_BN, num_visible):
        visible, masked = registry.published.sample_visible(logits_BN, num_visible)
        return visible, masked[:, :-1]

    for arm, reason in ((descending, "ids do not ascend"), (forgets_the_last, "visible and masked ids are not all")):
        assert measure_tiny(replace(entry, gates=(), published=arm)).refused["published"].startswith(reason)


@pytest.fixture
def tiny_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command at a tiny shape, with a gate that passes."""
    monkeypatch.setattr(run, "TINY", TINY)
    set_gate(monkeypatch, gate(tmp_path, "assert True"))
    return tmp_path


def set_gate(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setitem(ENTRIES, "gather_tokens", replace(ENTRIES["gather_tokens"], gates=(arguments,)))


ARGUMENTS = ["--device", "cpu", "--quick", "--operation", "gather_tokens"]


def test_the_command_prints_writes_and_ends_with_one_line_of_json(tiny_run: Path, capsys) -> None:
    assert run.main([*ARGUMENTS, "--out", str(tiny_run)]) == 0
    output = capsys.readouterr().out
    line = json.loads(output.splitlines()[-1])
    backward = line["operations"]["gather_tokens"]["backward"]
    ours, published = (backward["median_us"][arm] for arm in (backward["ours"], "published"))
    assert backward["x_published"] == pytest.approx(published / ours, rel=1e-2)
    assert [goal["goal"] for goal in line["goals"]["each"]] == ["× published ≥ 3", "× torch.compile ≥ 0.909"]
    assert line["refused"] == {}
    (path,) = tiny_run.glob("*.csv")
    text = path.with_suffix(".md").read_text()
    rows = path.read_text().splitlines()
    assert len(rows) == 1 + 3 * len(backward["median_us"])
    assert text.count("| gather_tokens |") == len(rows) - 1
    run.main([*ARGUMENTS, "--out", str(tiny_run)])
    assert len(path.read_text().splitlines()) == len(rows)  # the same operation again replaces its rows


def test_a_command_goes_on_with_what_is_missing(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Of a tree whose commit is told: where it differs from its commit, nothing says what was measured."""
    arguments = [*ARGUMENTS, "--out", str(tiny_run), "--missing"]
    measured = []
    for commit in ("first", "first", "second"):
        monkeypatch.setenv("ADAMAE_COMMIT", commit)
        assert run.main(arguments) == 0
        measured.append(list(json.loads(capsys.readouterr().out.splitlines()[-1])["operations"]))
    assert measured == [["gather_tokens"], [], ["gather_tokens"]]
    (path,) = tiny_run.glob("*.csv")
    taken = {"commit": "second", "dirty": "not told", "quick": "yes"}
    assert run.measured_before(path, taken) == {"gather_tokens"}
    for other in ({"quick": ""}, {"dirty": "yes"}, {"commit": "not told"}):
        assert run.measured_before(path, {**taken, **other}) == set()


def test_red_tests_are_refused(tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tiny_run / "red").mkdir()
    set_gate(monkeypatch, gate(tiny_run / "red", "assert False"))
    assert run.main([*ARGUMENTS, "--out", str(tiny_run)]) == 1
    output = capsys.readouterr().out
    assert "refused: its tests are red" in output
    line = json.loads(output.splitlines()[-1])
    assert line["operations"] == {}
    assert "1 failed" in line["refused"]["gather_tokens"]["all"]
    assert not list(tiny_run.glob("*.csv"))


def test_a_gate_without_tests_is_red(tmp_path: Path) -> None:
    (tmp_path / "test_none.py").touch()
    assert "no tests ran" in (measure.run_gate((str(tmp_path / "test_none.py"),)) or "")


def test_an_unknown_device_is_named(capsys) -> None:
    assert run.main(["--device", "tpu"]) == 2
    assert "--device='tpu'" in capsys.readouterr().err


def test_arms_take_turns() -> None:
    order: list[str] = []
    calls = {arm: lambda arm=arm: order.append(arm) for arm in "ab"}
    timings = time_in_turns(calls, CPU, Plan(warm_up=3, rounds=2, block=2))
    assert "".join(order) == "aaabbb" + 2 * "aaabbb"  # warm-up; in each round one call that is not timed, then two
    assert {timing.num_calls for timing in timings.values()} == {4}


def test_statistics() -> None:
    timing = summarize([float(i) for i in (5, 1, 3, 2, 4, 6)], "calls")
    assert (timing.p20, timing.median, timing.p80, timing.num_calls) == (2.0, 3.5, 5.0, 6)


def test_the_roof_counts_bytes_read_and_written() -> None:
    assert results.roof_share(3_000_000, 0.5, 12e6) == pytest.approx(0.5)
    assert copy_roof(CPU, num_bytes=1000, repetitions=3) > 0


def test_peak_memory_is_that_of_tensors_alive_at_once() -> None:
    x = torch.zeros(1000)

    def call() -> None:
        y = x + 1  # 4000 bytes
        z = y + 1  # 8000
        del y
        _ = torch.cat([z, z])  # 12000
        del z

    assert peak_extra_bytes(call, CPU) == 12000
    assert peak_extra_bytes(lambda: x.add_(1), CPU) <= 16  # the scalar


def test_least_traffic_is_that_of_the_tensors() -> None:
    def check(name: str, mode: str, *read_or_written: torch.Tensor) -> None:
        expected = sum(x.nbytes for x in read_or_written)
        assert results.minimal_bytes(ENTRIES[name], TINY, 4, mode) == expected, (name, mode)

    f = InputFactory(TINY)
    split, video, weight, bias = f.split(), f.video(), f.normal(8, 96), f.normal(8)
    masked_video, prediction, error = f.prediction().to(torch.uint8), f.prediction(), f.per_masked()
    tokens, shown, logits = f.tokens(12), f.tokens(3), f.logits()
    check("patchify", "forward", video, video.float())
    check("embed_tubelets", "forward", video, weight, bias, tokens)
    check("embed_tubelets", "backward", video, weight, bias, tokens)
    check("sample_visible", "forward", logits, f.seeds(), *split[:3], torch.zeros(TINY.batch_size, 3))
    check("split_tokens", "forward", split.visible_ids_BK, *split[:3])
    check("gather_tokens", "forward", split.visible_ids_BK, shown, shown, shown)
    check("gather_tokens", "backward", shown, split.slots_BN, tokens)
    check("assemble_decoder", "forward", shown, bias, f.positions(), *split[:2], tokens)
    check("assemble_decoder", "backward", tokens, shown, bias)
    check("patch_targets", "forward", masked_video, split.masked_ids_BM, prediction)
    check("masked_patch_loss", "forward", prediction, masked_video, split.masked_ids_BM, error)
    check("masked_patch_loss", "backward", prediction, prediction)
    hidden, head, head_bias = f.tokens(9), f.normal(96, 8), f.normal(96)
    read = (hidden, head, head_bias, masked_video, split.masked_ids_BM)
    check("head_patch_loss", "forward", *read, error, torch.zeros(()))
    check("head_patch_loss", "backward", *[hidden, head, head_bias] * 2)
    check("sampling_loss", "forward", logits, split.masked_ids_BM, error)
    check("sampling_loss", "backward", logits, logits)
    forward, backward = (results.minimal_bytes(ENTRIES["sampling_loss"], TINY, 4, m) for m in ("forward", "backward"))
    assert results.minimal_bytes(ENTRIES["sampling_loss"], TINY, 4, "full") == forward + backward


def row(arm: str, median: float, peak: int) -> results.Row:
    row = {"operation": "masked_patch_loss", "impl": arm, "mode": "full", "median_us": str(median)}
    return {**row, "peak_bytes": str(peak), "roof_share": "0.5"}


def test_goals_are_judged() -> None:
    rows = [row("published", 100, 90), row("compiled", 20, 50), row("reference", 1, 1), row("cpp", 25, 31)]
    verdicts = results.judge(results.by_operation(rows), "cpu")
    assert [(v.goal, v.measured, v.met) for v in verdicts] == [
        ("× published ≥ 4", 4.0, True),
        ("memory / published ≤ 0.333", 0.344, False),
        ("× torch.compile ≥ 0.909", 0.8, False),
    ]
    assert results.judge(results.by_operation(rows[:3]), "cpu") == []  # nothing of ours, no verdict


def test_goals_of_a_gpu_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = Goal(device="cuda", mode="full", roof=0.75, microseconds=8, saved_bytes=20)
    monkeypatch.setitem(ENTRIES, "masked_patch_loss", replace(ENTRIES["masked_patch_loss"], goals=(goal,)))
    rows = [row("published", 9, 22), row("auto", 7, 1), row("triton", 9, 1), row("cuda", 6, 1)]
    verdicts = results.judge(results.by_operation(rows), "cuda")
    assert [(v.goal, v.measured, v.met) for v in verdicts] == [
        ("bytes saved ≥ 20", 21, True),
        ("share of copy roof ≥ 0.75", 0.5, False),
        ("µs ≤ 8", 7.0, True),
    ]


def test_quick_is_quick() -> None:
    assert QUICK.rounds * QUICK.block < Plan().rounds * Plan().block / 10
    assert Plan().warm_up >= 20
    assert Plan().rounds * Plan().block >= 100
