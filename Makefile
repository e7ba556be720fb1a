PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile all of 20,000 files.
PIP_INSTALL := $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt

# Quiet and private by default.
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check check-all bench peers clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## Install what is missing, collect a small dataset, run the whole method on it
	$(BIN)/ipd-ray data demo
	$(BIN)/ipd-ray run demo --preset demo --run-dir runs/demo

test: export WANDB_MODE := offline
test: $(VENV)/.installed-dev ## Run the tests, without the slow ones
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder --durations=10

check: $(VENV)/.installed-dev ## Lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy ipd_ray
	$(BIN)/lint-imports

check-all: export WANDB_MODE := offline
check-all: check ## Everything in check, and all tests with the slow ones
	$(BIN)/python -m pytest -q -m ""

bench: $(VENV)/.installed-dev ## Measure speed beside peers (`make peers` first) and the hardware, write docs/performance.md
	$(BIN)/python benchmarks/speed/bench.py --stages all --curves --write

peers: .venv-peers/.installed .venv-mbrl/.installed ## Make the environments of the libraries that benchmarks compare with

clean: ## Remove build products and caches; runs, stores and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find ipd_ray tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# pip, not python: venv writes it late, so an interrupted venv is made again.
$(BIN)/pip:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt | $(BIN)/pip
	@$(PIP_INSTALL) -e '.[mujoco,tensorboard]'
	@touch $@

$(VENV)/.installed-dev: setup.py constraints.txt | $(BIN)/pip
	@$(PIP_INSTALL) -e '.[mujoco,tensorboard,bench,dev]'
	@touch $(VENV)/.installed $@

# Of its own, since d3rlpy pins Gymnasium.
.venv-peers/.installed: benchmarks/scores/peers-constraints.txt
	@test -x .venv-peers/bin/pip || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -q --disable-pip-version-check -c benchmarks/scores/peers-constraints.txt \
		torch d3rlpy 'gymnasium[classic-control,mujoco]'
	@touch $@

# Of its own, since it pins Hydra to a version that Python 3.11 cannot import; what it needs of newer Hydra is the same.
.venv-mbrl/.installed: benchmarks/speed/mbrl-constraints.txt
	@test -x .venv-mbrl/bin/pip || $(PYTHON) -m venv .venv-mbrl
	@.venv-mbrl/bin/python -m pip install -q --disable-pip-version-check -c benchmarks/speed/mbrl-constraints.txt \
		torch numpy gymnasium hydra-core tqdm termcolor matplotlib
	@.venv-mbrl/bin/python -m pip install -q --disable-pip-version-check --no-deps mbrl==0.2.0
	@touch $@
