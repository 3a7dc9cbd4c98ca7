"""Compiles every kernel ahead of time for GPUs that are not here, as its launcher launches it, and reads its resources.

``python -m tests.kernels.compiled`` writes the table that the tests hold the kernels to.
"""

from __future__ import annotations

import csv
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import triton
from adamae_kernels import LAUNCHERS
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from adamae_fast.testing import OpShape

TABLE = Path(__file__).with_name("resources.csv")
COLUMNS = ("kernel", "dtype", "arch", "registers", "shared_bytes", "stack_bytes", "triton")
ARCHITECTURES = (80, 90, 100)
PAPER = OpShape(batch_size=32, grid=(8, 14, 14), patch_size=16, num_visible=78, width=768)

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def calls(dtype: torch.dtype, shape: OpShape = PAPER, decoder_width: int = 384) -> dict[str, tuple[object, ...]]:
    """Arguments of every launcher, by default at the paper's shapes: values in ``dtype``, tables and errors in fp32."""

    def values(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    s = shape
    b, n, k, m, p = s.batch_size, s.num_tokens, s.num_visible, s.num_masked, s.pixels_per_token
    ids_bk, ids_bm, slots = (values(b, size, dtype=torch.int64) for size in (k, m, n))
    video = values(*s.video_shape, dtype=torch.uint8)
    error = values(b, m, dtype=torch.float32)
    mean_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    cut = s.tubelet_size, s.patch_size
    loss = values(b, m, p), video, ids_bm, *cut, "normalized", "mse"
    e = decoder_width
    return {
        "patchify": (video, *cut, *mean_std, dtype),
        "sample_visible": (values(b, n), values(b, dtype=torch.int64), k),
        "split_tokens": (ids_bk, n),
        "gather_tokens": (values(b, n, s.width), ids_bk, slots, values(n, s.width, dtype=torch.float32)),
        "gather_tokens_backward": (values(b, k, s.width), slots),
        "assemble_decoder": (values(b, k, e), values(e), values(n, e, dtype=torch.float32), ids_bk, ids_bm),
        "assemble_decoder_backward": (values(b, n, e), k, torch.float32),
        "patch_targets": (video, ids_bm, *cut, "normalized", dtype),
        "masked_patch_loss": loss,
        "masked_patch_loss_backward": (error, *loss),
        "patch_loss_step": (values(8192, p), video, ids_bm, 8192, *loss[3:]),
        "sampling_loss": (values(b, n), ids_bm, error),
    }


class Recorder:
    """Stands for a kernel: keeps how it is launched instead of launching it."""

    def __init__(self, kernel: JITFunction, launches: list[tuple[JITFunction, tuple, dict]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        assert all(0 < size < 2**31 for size in grid)
        return lambda *arguments, **settings: self.launches.append((self.kernel, arguments, settings))


def record(launcher, arguments: tuple[object, ...]) -> list[tuple[JITFunction, tuple, dict]]:
    """Call ``launcher`` with every kernel of its file replaced, and return what it would have launched."""
    module: ModuleType = importlib.import_module(launcher.__module__)
    launches: list[tuple[JITFunction, tuple, dict]] = []
    with ExitStack() as stack:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                stack.enter_context(patch.object(module, name, Recorder(value, launches)))
        launcher(*arguments)
    return launches


def compile_for(arch: int, kernel: JITFunction, arguments: tuple, settings: dict):
    """Compile with the specialisation that a launch would choose: sizes that 16 divides, 1 as a constant."""
    options = {key: settings[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in settings}
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    named |= {key: value for key, value in settings.items() if key not in options}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, float), parameter.name
            signature[parameter.name] = "fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, shared memory of a program, and stack of a thread, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(re.search(rf"\b{name}:(\d+)", line)[1]) for name in ("REG", "STACK", "LOCAL")}


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[dict[str, str]]:
    """Rows of the table, one for each kernel, dtype and architecture."""
    for dtype in (torch.bfloat16, torch.float32):
        for operation, arguments in calls(dtype).items():
            for kernel, given, settings in record(LAUNCHERS[operation], arguments):
                for arch in architectures:
                    compiled = compile_for(arch, kernel, given, settings)
                    used = resources(compiled.asm["cubin"])
                    values = (
                        f"{operation}:{kernel.__name__.strip('_')}",
                        str(dtype).removeprefix("torch."),
                        f"sm_{arch}",
                        used["REG"],
                        compiled.metadata.shared,
                        used["STACK"] + used["LOCAL"],
                        triton.__version__,
                    )
                    yield dict(zip(COLUMNS, map(str, values), strict=True))


def committed() -> list[dict[str, str]]:
    """The table as it is in the repository."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(compile_all())
