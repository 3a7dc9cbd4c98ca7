"""Measure one operation: its tests first, then parity of every arm, then time and memory in every mode."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch._functorch.config
from torch import Tensor
from torch._inductor import config as inductor_config

from adamae_fast.ops.registry import Impl
from adamae_fast.testing import InputFactory, OpShape
from bench.conditions import ROOT
from bench.peak import peak_extra_bytes
from bench.registry import ENTRIES, KERNELS, Entry, Inputs, Mode, Outputs
from bench.timing import Call, Plan, Timing, time_in_turns

COMPILE_BACKEND = "inductor"
"""Of torch.compile, with its default options."""

COMPILED_TOGETHER: tuple[tuple[Mode, ...], ...] = (("forward", "full"), ("backward",))
"""Modes that take the same compiled code: a backward that is timed alone needs its own."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest error allowed of an arm, as a share of the largest value of the truth. The tests are far stricter with ours;
this tells a wrong arm from one that rounds differently."""


@dataclass(frozen=True)
class Figure:
    """One arm in one mode."""

    timing: Timing
    peak_bytes: int


@dataclass
class Measured:
    """What came out for one operation."""

    figures: dict[tuple[str, Mode], Figure] = field(default_factory=dict)
    """By arm and mode."""
    refused: dict[str, str] = field(default_factory=dict)
    """Arms that were not timed, and why; under "all" where the operation's tests are red."""


Gate = tuple[str, ...]
"""Arguments of a pytest run."""


@functools.cache
def run_gate(arguments: Gate) -> str | None:
    """Run pytest in a process of its own; return None if everything passed, otherwise its last line."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments]
    has_gpu = torch.cuda.is_available()
    if has_gpu and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # a rented minute costs more than cores, and each shape's kernel is compiled there
    # Where there is a GPU, a gate that skips its tests must not pass for a green one.
    environment = os.environ | {"ADAMAE_FAIL_WITHOUT_CUDA": str(int(has_gpu))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    lines = (result.stdout + result.stderr).strip().splitlines()
    return f"pytest {' '.join(arguments)}: {lines[-1] if lines else 'no output'}"


def gates_of(name: str, device: torch.device) -> tuple[Gate, ...]:
    """What must be green before the operation is timed; on a GPU, the contract of its kernels, too."""
    gates = ENTRIES[name].gates
    if device.type == "cpu":
        return gates
    return (
        *gates,
        ("tests/kernels/contract.py", "-k", KERNELS.get(name, name)),
        ("tests/kernels/test_on_gpu.py", "-k", name),
    )


def red_gates(gates: Iterable[Gate]) -> dict[Gate, str]:
    """Gates that are red, with pytest's last line.

    Starting pytest costs more than most of them: they run together first, and one by one only where that was red.
    """
    gates = list(dict.fromkeys(gates))
    files: list[Gate] = [gate for gate in gates if len(gate) == 1]
    selected: dict[str, list[Gate]] = {}
    for file, *options in gates:
        if options:
            selected.setdefault(file, []).append((file, *options))
    together: dict[Gate, list[Gate]] = {tuple(gate[0] for gate in files): files} if files else {}
    for file, of_file in selected.items():
        together[file, "-k", " or ".join(name for _, _, name in of_file)] = of_file
    suspects = [gate for joint, members in together.items() if run_gate(joint) for gate in members]
    return {gate: red for gate in suspects if (red := run_gate(gate))}


@dataclass(frozen=True)
class Arm:
    """A function, and which of the inputs it takes."""

    function: Callable[..., Any]
    names: tuple[str, ...]

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        """The bare call, which looks up no names."""
        return functools.partial(self.function, **{name: inputs[name] for name in self.names})

    def outputs(self, inputs: Inputs) -> Outputs:
        """The tensors that one call returns."""
        result = self.bind(inputs)()
        return (result,) if isinstance(result, Tensor) else tuple(x for x in result if x is not None)


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "impl")


def _implementation(entry: Entry, impl: str) -> Arm:
    return Arm(functools.partial(entry.operation, impl=impl), _parameters(entry.operation))


def our_arms(entry: Entry, inputs: Inputs) -> dict[str, Arm]:
    """The reference and every implementation that runs here; "auto" too, unless one of them is all it can choose."""
    arms = {impl: _implementation(entry, impl) for impl in get_args(Impl)}
    for impl in set(arms) - {"auto", "reference"}:
        if _cannot_run(arms[impl], inputs):
            del arms[impl]
    if len(arms) == 3:
        del arms["auto"]
    return arms


def _cannot_run(arm: Arm, inputs: Inputs) -> bool:
    """Whether this implementation says that it is not for this machine; any other fault shows in the parity."""
    try:
        arm.outputs(inputs)
    except Exception as error:
        return isinstance(error, ValueError) and str(error).startswith("impl=")
    return False


def ours(arms: Mapping[str, object]) -> str:
    """Which of the measured arms a user of the operation gets."""
    return next(impl for impl in ("auto", *sorted(set(arms) - {"published", "compiled", "reference"})) if impl in arms)


def all_arms(entry: Entry, inputs: Inputs) -> dict[str, Arm]:
    """The published form, the tuned one compiled, and ours."""
    compiled = torch.compile(entry.tuned, fullgraph=True, backend=COMPILE_BACKEND)
    return {
        "published": Arm(entry.published, _parameters(entry.published)),
        "compiled": Arm(compiled, _parameters(entry.tuned)),
        **our_arms(entry, inputs),
    }


def draw_inputs(entry: Entry, shape: OpShape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Inputs of one operation; those that get a gradient require it."""
    inputs = entry.inputs(InputFactory(shape, dtype=dtype, device=device))
    for name in entry.differentiable:
        inputs[name].requires_grad_()
    return inputs


def _in_fp64(inputs: Inputs) -> Inputs:
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return torch.float64 if isinstance(value, torch.dtype) else value

    return {name: convert(value) for name, value in inputs.items()}


def _with_gradients(entry: Entry, arm: Arm, inputs: Inputs, grad: Tensor | None) -> tuple[Outputs, Outputs]:
    """Outputs, and the gradients of the differentiable inputs."""
    outputs = arm.outputs(inputs)
    gradients: Outputs = ()
    if grad is not None:
        leaves = [inputs[name] for name in entry.differentiable]
        gradients = torch.autograd.grad(outputs[0], leaves, grad.to(outputs[0].dtype))
    return tuple(x.detach() for x in outputs), gradients


def _difference(actual: Outputs, truth: Outputs, dtype: torch.dtype, what: str) -> str | None:
    for i, (x, exact) in enumerate(zip(actual, truth, strict=False)):  # the published forms return no slots
        if x.shape != exact.shape:
            return f"{what} {i} has shape {tuple(x.shape)}, not {tuple(exact.shape)}"
        if not x.is_floating_point():
            if not torch.equal(x, exact):
                return f"{what} {i} holds other integers"
            continue
        error = float((x.double() - exact).abs().max() / exact.abs().max())
        if not error <= TOLERANCE[dtype]:  # NaN is refused, too
            return f"{what} {i} is off by {error:.1e} of the largest value, allowed is {TOLERANCE[dtype]:.0e}"
    return None


class _Parity:
    """Compares arms with the operation's reference in fp64, or checks what random outputs must hold."""

    def __init__(self, entry: Entry, inputs: Inputs, grad: Tensor | None, dtype: torch.dtype) -> None:
        self._entry, self._inputs, self._grad, self._dtype = entry, inputs, grad, dtype
        self._truth: tuple[Outputs, Outputs] = ((), ())
        if entry.check is None:
            grad_fp64 = None if grad is None else grad.double()
            self._truth = _with_gradients(entry, _implementation(entry, "reference"), _in_fp64(inputs), grad_fp64)

    def fault(self, arm: Arm, mode: Mode) -> str | None:
        """What is wrong with the arm's results; None: nothing."""
        if mode == "backward":
            # The second of two backwards: the first may have overwritten what the forward saved.
            call = prepare(self._entry, arm, self._inputs, self._grad, mode)
            call()
            return _difference(call(), self._truth[1], self._dtype, "gradient")
        outputs, gradients = _with_gradients(self._entry, arm, self._inputs, self._grad)
        if self._entry.check is not None:
            return self._entry.check(self._inputs, outputs)
        fault = _difference(outputs, self._truth[0], self._dtype, "result")
        return fault or _difference(gradients, self._truth[1], self._dtype, "gradient")


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def prepare(entry: Entry, arm: Arm, inputs: Inputs, grad: Tensor | None, mode: Mode) -> Callable[[], Any]:
    """What is timed in a mode."""
    forward = arm.bind(inputs)
    if mode == "forward":
        return forward
    assert grad is not None
    leaves = [inputs[name] for name in entry.differentiable]
    output = _first(forward())
    grad = grad.to(output.dtype)
    if mode == "backward":
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(_first(forward()), leaves, grad)


@contextmanager
def _compile_settings(mode: Mode) -> Iterator[None]:
    """A compiled backward may overwrite what its forward saved, but then it runs once: not if it is timed alone.

    The caches of compiled code do not tell the two kinds apart, so they are not used.
    """
    torch._dynamo.reset()
    with (
        torch._functorch.config.patch(donated_buffer=mode != "backward", enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False),
    ):
        yield


def measure(
    entry: Entry, shape: OpShape, dtype: torch.dtype, device: torch.device, plan: Plan, say: Callable[[str], None]
) -> Measured:
    """Measure every arm of one operation that is right; its gates are green. ``say`` hears what is being done."""
    measured = Measured()
    inputs = draw_inputs(entry, shape, dtype, device)
    grad = _draw_grad(entry, inputs) if entry.differentiable else None
    parity = _Parity(entry, inputs, grad, dtype)
    for modes in COMPILED_TOGETHER if entry.differentiable else (("forward",),):
        with _compile_settings(modes[0]):
            calls: dict[Mode, dict[str, Call]] = {mode: {} for mode in modes}
            for name, arm in all_arms(entry, inputs).items():
                if name in measured.refused:
                    continue
                say(f"{' and '.join(modes)}, {name}: parity")
                try:
                    if fault := parity.fault(arm, modes[0]):
                        measured.refused[name] = fault
                        continue
                    for mode in modes:
                        calls[mode][name] = prepare(entry, arm, inputs, grad, mode)
                except Exception as error:  # a compiler or a kernel may fail in any way; the others are measured
                    measured.refused[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            for mode in modes:
                say(f"{mode}: timing")
                timings = time_in_turns(calls[mode], device, plan)
                for name, timing in timings.items():
                    measured.figures[name, mode] = Figure(timing, peak_extra_bytes(calls[mode][name], device))
    order = entry.modes
    measured.figures = dict(sorted(measured.figures.items(), key=lambda figure: order.index(figure[0][1])))
    return measured


def _draw_grad(entry: Entry, inputs: Inputs) -> Tensor:
    """Random numbers of the shape of the first output."""
    output = _implementation(entry, "reference").outputs(inputs)[0]
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, device=output.device, generator=generator).to(output.dtype)
