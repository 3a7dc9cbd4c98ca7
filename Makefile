# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint clean

demo: $(INSTALLED) ## render videos, pre-train on them, write runs/demo/report.html
	test -d runs/demo-videos || $(BIN)/adamae-fast data synth runs/demo-videos
	rm -rf runs/demo
	$(BIN)/adamae-fast pretrain --config configs/demo.yaml

test: $(INSTALLED) lint ## lint, types and the whole test suite
	$(BIN)/pytest -n 2

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
