# Every target sets up .venv by itself, once; a change of pyproject.toml sets it up again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
RUN ?= demo
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest
QUICK := not slow and not gpu
# With an NVIDIA GPU the newest torch that fits, with CUDA; else one version, which package indexes with CPU builds
# give without CUDA packages.
TORCH ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.11' || echo 'torch==2.13.0')

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-clients lint format docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

install: $(STAMP) ## Make .venv with everything that the other targets need

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "trinity needs Python 3.11 or newer; make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(foreach word,$(TORCH),'$(word)')
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train, extend, tune and evaluate a small model here; the report is demo/report.html
	$(BIN)/trinity demo --run-dir $(RUN)

test: $(STAMP) ## Quick tests (no GPU, no minutes-long ones); says what was skipped and why
	$(PYTEST) -n $(JOBS) --dist worksteal -m "$(QUICK)"

test-all: $(STAMP) ## All tests that this machine can run
	$(PYTEST) -n $(JOBS) --dist worksteal

# One environment for each engine, made once: clients/NAME.txt says what is in it. Ours comes in for the exports.
CLIENTS ?= transformers vllm llama mlx
test-clients: $(STAMP) ## Exports in transformers, vLLM (CPU), llama.cpp and MLX; makes their environments (gigabytes)
	$(BIN)/python -m pip install --quiet 'gguf>=0.17'
	for name in $(CLIENTS); do \
	  test -x .clients/$$name/bin/python || { $(PYTHON) -m venv .clients/$$name && .clients/$$name/bin/pip install --quiet -r clients/$$name.txt; } || exit 1; \
	done
	test ! -x .clients/vllm/bin/pip || .clients/vllm/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	$(PYTEST) -n 0 -s tests/test_clients.py

lint: $(STAMP) ## Format, rules, types and the direction of imports; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## Check the links of all documents and build site/ from docs/
	$(PYTEST) -q tests/test_docs.py
	$(BIN)/mkdocs build --strict --quiet --site-dir site
	@echo "site/index.html"

clean: ## Remove .venv, caches and built pages; runs stay
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
