"""Builds csrc/: adamae_fast/_C, operations for the CPU, and adamae_fast/_CUDA, CUDA C++; the rest is in pyproject.toml.

ADAMAE_BUILD_CPP=0 or ADAMAE_BUILD_CUDA=0 leaves one out, =1 makes a failure an error. By default a failure is reported,
and CUDA is built if torch is a build with CUDA and the toolkit is there. No GPU is looked at: it is
compiled for those of ARCHITECTURES that nvcc knows, or for what TORCH_CUDA_ARCH_LIST says if that is set.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import setup

# By NAME in ADAMAE_BUILD_NAME: the library, what it holds, and what is lost without it.
LIBRARIES = {
    "CPP": ("_C", "C++", "the operations run as plain PyTorch references, which are slower and need more memory"),
    "CUDA": ("_CUDA", "CUDA", "impl='cuda' cannot be asked for"),
}
# PyTorch's stable ABI of 2.10: the library runs with that version and every later one.
COMMON = ("-std=c++20", "-O3", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000")
FLAGS = [
    *COMMON,
    "-g0",  # debug information would be ten times the library
    "-fopenmp-simd",  # reductions may be vectorised where the source says so; threads are torch's own
    "-ffp-contract=off",  # a + b · c is rounded twice, so that noise has the same bits everywhere
    "-fno-trapping-math",  # both sides of a choice may be computed, as nothing reads the processor's flags
    "-fvisibility=hidden",
]
# Products and sums are rounded one by one here, too; with USE_CUDA torch's headers declare its streams.
NVCC_FLAGS = [*COMMON, "-fmad=false", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA"]
ARCHITECTURES = (80, 90, 100)
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-march=x86-64-v3")  # AVX2 and FMA, so that a wheel also runs on another machine than this one


def say(line: str) -> None:
    """Print where pip shows it: with -v, or when the build fails."""
    print(f"adamae-fast: {line}", file=sys.stderr, flush=True)


def gpu_code(nvcc: str) -> list[str]:
    """Flags for those of ARCHITECTURES that nvcc knows, and for code that the driver compiles for later GPUs."""
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES if f"sm_{arch}" in known]
    return codes + [code.replace("code=sm", "code=compute") for code in codes[-1:]]


def leave_out(name: str, why: str) -> None:
    """Say what is lost, and remove an older library, which would be loaded all the same."""
    library, what, lost = LIBRARIES[name]
    for stale in Path("adamae_fast").glob(f"{library}.*so"):
        stale.unlink()
    say(f"{what} operations are not built ({why}): {lost}")


def requested() -> dict[str, str]:
    """What the environment asks for each library, 1 or auto; one that it refuses is left out."""
    wanted = {name: os.environ.get(f"ADAMAE_BUILD_{name}", "auto") for name in LIBRARIES}
    for name, request in wanted.items():
        if request not in ("0", "1", "auto"):
            raise SystemExit(f"ADAMAE_BUILD_{name}={request}: choose 0, 1 or auto")
        if request == "0":
            leave_out(name, f"ADAMAE_BUILD_{name}=0")
    return {name: request for name, request in wanted.items() if request != "0"}


def build() -> dict[str, object]:
    """Arguments of setup() that build the libraries; none without torch."""
    wanted = requested()
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if "1" in wanted.values():
            raise
        for name in wanted:
            leave_out(name, f"torch is not there: {error}; pip install --no-build-isolation")
        return {}
    if "CUDA" in wanted and not (torch.version.cuda and CUDA_HOME):
        without = "a CUDA toolkit: nvcc or CUDA_HOME" if torch.version.cuda else "a torch that is built for CUDA"
        if wanted.pop("CUDA") == "1":
            raise SystemExit(f"ADAMAE_BUILD_CUDA=1 needs {without}, here is torch {torch.__version__}")
        leave_out("CUDA", f"it needs {without}")

    class Build(BuildExtension):
        """Compiles one library after another, or says why not."""

        def run(self) -> None:
            built, compiler, inplace = [], self.compiler, self.inplace
            for (name, request), extension in zip(wanted.items(), self.extensions, strict=True):
                say(f"building {LIBRARIES[name][1]} operations with torch {torch.__version__}")
                self.extensions, self.compiler, self.inplace = [extension], compiler, inplace
                try:
                    if name == "CUDA" and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
                        extension.extra_compile_args["nvcc"] = NVCC_FLAGS + gpu_code(f"{CUDA_HOME}/bin/nvcc")
                    super().run()
                    built.append(extension)
                except Exception as error:  # a missing or unfit compiler shows in many ways
                    if request == "1":
                        raise
                    leave_out(name, f"{type(error).__name__}: {error}")
            self.extensions = built

    files = sorted(str(path) for path in Path("csrc").iterdir())
    common = {"depends": [f for f in files if f.endswith((".h", ".cuh"))], "py_limited_api": True}
    cpp, cuda = ([f for f in files if f.endswith(end)] for end in (".cpp", (".cu", "library.cpp")))
    make = {"CPP": (CppExtension, cpp, FLAGS), "CUDA": (CUDAExtension, cuda, {"cxx": FLAGS, "nvcc": NVCC_FLAGS})}
    parts = [(LIBRARIES[name][0], *make[name]) for name in wanted]
    return {
        "ext_modules": [kind(f"adamae_fast.{lib}", s, extra_compile_args=f, **common) for lib, kind, s, f in parts],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


if __name__ == "__main__":
    setup(**build())
