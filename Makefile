# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-faults lint sanitize test-triton-3.6 gpu gpu-rehearsal clean

demo: $(INSTALLED) ## render videos, pre-train on them, write runs/demo/report.html
	test -d runs/demo-videos || $(BIN)/adamae-fast data synth runs/demo-videos
	rm -rf runs/demo
	$(BIN)/adamae-fast pretrain --config configs/demo.yaml

test: $(INSTALLED) lint ## lint, types and the whole test suite
	$(BIN)/pytest -n 2 --dist worksteal

test-faults: $(INSTALLED) ## kill -9 at ten moments, a host cut off, a full disk; the last two take root
	$(BIN)/pytest -m faults tests/distributed

# The library with GCC's address and undefined-behaviour sanitizers, in a copy of the tree; the normal one stays.
SANITIZE := -fsanitize=address,undefined
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libstdc++.so)

sanitize: $(INSTALLED) ## the tests of the operations against a library that stops at a wrong access or undefined behaviour
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r adamae_fast csrc kernels tests setup.py pyproject.toml README.md LICENSE build/sanitize
	rm -f build/sanitize/adamae_fast/_C*.so
	sed -i 's/"-g0"/"-g", "$(SANITIZE)", "-fno-sanitize-recover=undefined"/' build/sanitize/setup.py
	cd build/sanitize && ADAMAE_BUILD_CPP=1 ADAMAE_BUILD_CUDA=0 CXX=$(CXX) LDFLAGS="$(SANITIZE)" \
	    $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd build/sanitize && LD_PRELOAD=$(RUNTIMES) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	    UBSAN_OPTIONS=print_stacktrace=1 \
	    $(abspath $(BIN))/python -c 'import pytest, sys; from adamae_fast.ops import library; \
	    b"__asan_init" in library.PATH.read_bytes() and not library.reason_missing or sys.exit("not sanitized"); \
	    sys.exit(pytest.main(["tests/ops", "--capture=sys"]))'

# The oldest Triton that the kernels are meant for, in a folder of its own; .venv stays as it is. From NumPy 2.4 on, its
# interpreter takes no number of a kernel as the end of a loop.
OLD_TRITON := 3.6.0
OLD_TRITON_PATH := $(CURDIR)/build/triton-$(OLD_TRITON)

test-triton-3.6: $(INSTALLED) ## compile and interpret the kernels with Triton 3.6.0, too
	test -d $(OLD_TRITON_PATH) || { rm -rf $(OLD_TRITON_PATH).part && \
	    $(BIN)/pip install --quiet --no-deps --target $(OLD_TRITON_PATH).part triton==$(OLD_TRITON) 'numpy<2.4' && \
	    mv $(OLD_TRITON_PATH).part $(OLD_TRITON_PATH); }
	PYTHONPATH=$(OLD_TRITON_PATH) $(BIN)/python -c 'import pytest, sys, triton; \
	    triton.__version__ == "$(OLD_TRITON)" or sys.exit("imported " + triton.__file__); \
	    sys.exit(pytest.main(["tests/kernels/test_compiled.py", "tests/kernels/test_interpreted.py"]))'

# On a GPU machine as it is: no .venv and no package registry, so $(PYTHON) must have torch, Triton and pytest. Cut off,
# the same call goes on where it was. GPU_FLAGS: --out FOLDER, --published PATH, --commit HASH, --budget SECONDS.
gpu: ## every measurement on this machine's GPU within nine minutes
	$(PYTHON) -m bench.gpu $(GPU_FLAGS)

gpu-rehearsal: $(INSTALLED) ## the same script on the CPU with tiny shapes
	rm -rf build/rehearsal
	$(BIN)/python -m bench.gpu --rehearsal --out build/rehearsal $(GPU_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(INSTALLED)

clean: ## remove the environment, what was built and what the demo wrote; other runs stay
	rm -rf .venv runs/demo runs/demo-videos build adamae_fast/_C*.so
