PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

# Quiet and private by default.
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check check-all peers clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## Install what is missing, collect a small dataset, run the whole method on it
	$(BIN)/ipd-ray data demo
	$(BIN)/ipd-ray run demo --preset demo --run-dir runs/demo

test: export WANDB_MODE := offline
test: $(VENV)/.installed-dev ## Run the tests, without the slow ones
	$(BIN)/python -m pytest -q

check: $(VENV)/.installed-dev ## Lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy ipd_ray
	$(BIN)/lint-imports

check-all: export WANDB_MODE := offline
check-all: check ## Everything in check, and all tests with the slow ones
	$(BIN)/python -m pytest -q -m ""

peers: .venv-peers/.installed ## Make the environment of the libraries that benchmarks/scores compares with

clean: ## Remove build products and caches; runs, stores and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find ipd_ray tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# pip, not python: venv writes it late, so an interrupted venv is made again.
$(BIN)/pip:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt | $(BIN)/pip
	@$(PIP_INSTALL) -e '.[mujoco,tensorboard]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP_INSTALL) -e '.[mujoco,tensorboard,bench,dev]'
	@touch $@

# Of its own, since d3rlpy pins Gymnasium.
.venv-peers/.installed: benchmarks/scores/peers-constraints.txt
	@test -x .venv-peers/bin/pip || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -q --disable-pip-version-check -c benchmarks/scores/peers-constraints.txt \
		torch d3rlpy 'gymnasium[classic-control,mujoco]'
	@touch $@
