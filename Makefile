# `make demo` and `make test` need nothing but make and Python 3.11+: they build $(VENV) first.
#   make demo ARGS="--file book.txt"    make test PYTEST_ARGS="-n 2 -k cache"    make test PYTHON=python3.13
# With GPU_PYTHON=python3 the GPU targets take an interpreter that has PyTorch and Triton, and build nothing:
#   make bench-gpu GPU_PYTHON=python3 ARGS="--budget-seconds 300" END_TO_END_ARGS="--budget-seconds 500"

VENV ?= .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= $(BIN)/python
ARGS ?=
END_TO_END_ARGS ?= $(ARGS)
PYTEST_ARGS ?= -n auto

# The first interpreter that the pins have wheels for and that can make a virtual environment.
usable := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if "$$p" -c '$(usable)' >/dev/null 2>&1; then echo "$$p"; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean distclean bench-gpu bench-gpu-full tune-gpu

help:
	@echo "make demo       run the shipped model on a long text (tables, figure, HTML report)"
	@echo "make test       lint, type check and run the tests"
	@echo "make lint       ruff and mypy only"
	@echo "make format     let ruff fix and format the code"
	@echo "make bench-gpu  measure kernels, then whole models, on this GPU; bench-gpu-full goes through the kernels' grid"
	@echo "make tune-gpu   find this GPU's tiles and write them into the table"
	@echo "make clean      remove caches and build output; distclean also removes $(VENV)"

demo: $(VENV)/.demo
	$(BIN)/beacon demo $(ARGS)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-gpu-full: gpu_command := full
tune-gpu: gpu_command := tune
gpu_ready := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.dev)
# The kernels, then whole models: each with a budget of its own, and neither ends the other.
bench-gpu: $(gpu_ready)
	@status=0; set -x; \
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m benchmarks.gpu bench $(ARGS) || status=$$?; \
	PYTHONPATH=.:kernels $(GPU_PYTHON) benchmarks/end_to_end.py $(END_TO_END_ARGS) || status=$$?; \
	exit $$status

bench-gpu-full tune-gpu: $(gpu_ready)
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m benchmarks.gpu $(gpu_command) $(ARGS)

$(VENV)/.created:
	@"$(PYTHON)" -c '$(usable)' || { \
		echo "No usable Python found (PYTHON='$(PYTHON)'): Python 3.11 to 3.14 with the venv module is needed." >&2; \
		echo "Install one (on Debian and Ubuntu also python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

# torch comes first and pinned: any range would let pip look for a newer build than the one wanted.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[$*]"
	@touch $@

clean:
	rm -rf dist build/lib build/bdist.* *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find beacon kernels benchmarks tests examples -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
