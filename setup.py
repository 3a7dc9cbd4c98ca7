"""Builds csrc/ into adamae_fast/_C, the C++ operations for the CPU; everything else is in pyproject.toml.

ADAMAE_BUILD_CPP=0 leaves it out, =1 makes a failure an error; by default a failure is reported and the references run.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

LOST = "the operations run as plain PyTorch references, which are slower and need more memory"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # debug information would be ten times the library
    "-fopenmp-simd",  # reductions may be vectorised where the source says so; threads are torch's own
    "-ffp-contract=off",  # a + b · c is rounded twice, so that noise has the same bits everywhere
    "-fno-trapping-math",  # both sides of a choice may be computed, as nothing reads the processor's flags
    "-fvisibility=hidden",
    # PyTorch's stable ABI of 2.10: the library runs with that version and every later one.
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-march=x86-64-v3")  # AVX2 and FMA, so that a wheel also runs on another machine than this one


def say(line: str) -> None:
    """Print where pip shows it: with -v, or when the build fails."""
    print(f"adamae-fast: {line}", file=sys.stderr, flush=True)


def cpp_build() -> dict[str, object]:
    """Arguments of setup() that build the library; none if it is left out."""
    request = os.environ.get("ADAMAE_BUILD_CPP", "auto")
    if request not in ("0", "1", "auto"):
        raise SystemExit(f"ADAMAE_BUILD_CPP={request}: choose 0, 1 or auto")
    if request == "0":
        for stale in Path("adamae_fast").glob("_C*.so"):
            stale.unlink()
        say(f"C++ operations are not built (ADAMAE_BUILD_CPP=0): {LOST}")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if request == "1":
            raise
        say(f"C++ operations are not built, as torch is not there ({error}; pip install --no-build-isolation): {LOST}")
        return {}

    class Build(BuildExtension):
        """Compiles, or says why not."""

        def run(self) -> None:
            say(f"building C++ operations for the CPU with torch {torch.__version__}")
            try:
                super().run()
            except Exception as error:  # a missing or unfit compiler shows in many ways
                if request == "1":
                    raise
                say(f"C++ operations are not built ({type(error).__name__}: {error}): {LOST}")
                self.extensions = []

    extension = CppExtension(
        "adamae_fast._C",
        [str(path) for path in sorted(Path("csrc").glob("*.cpp"))],
        depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
        extra_compile_args=FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**cpp_build())
