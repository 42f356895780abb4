# `make help` lists the targets. Everything is installed into .venv, nothing elsewhere.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

PROFILE ?= embedded
SEEDS ?= 0
STUDIES ?=
SHARD ?=
ENGINE ?= processes
OUT ?= reproduction
JOBS ?= 0
PRECISION ?=
DATA ?=
NAMES ?=

# One thread a process: the numbers in notebooks and tests do not depend on the number of cores.
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help install parts reproduce results figures test test-oldest notebooks bench gpu readme docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@printf "  settings of reproduce: PROFILE=embedded|sst2|base|bert|lm SEEDS=0,1,2 DATA=folder OUT=folder JOBS=2\n                         STUDIES=controls,curves SHARD=1/2 ENGINE=ray PRECISION=float32\n"

install: .venv/.installed ## set up .venv with pinned versions

.venv/.installed: settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mft_nb needs Python 3.11 or newer; name one with make PYTHON=..."; exit 2; }
	@echo "setting up .venv with the pinned packages, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

parts: install ## fetch two models and the sentences into the cache (180 MB, once)
	@echo "two models and the sentences: fetched once, then read from the cache"
	@$(BIN)/python -c "from mft_nb.study.datasets import read_snippets; from mft_nb.model import fetch_model; read_snippets(); fetch_model('minilm'); fetch_model('smollm2')"

reproduce: install ## run the experiment, print its table, draw its figures
	$(BIN)/mft_reproduce --profile $(PROFILE) --seeds $(SEEDS) --out "$(OUT)" --jobs $(JOBS) --studies "$(STUDIES)" --shard "$(SHARD)" --engine $(ENGINE) --precision "$(PRECISION)" $(if $(DATA),--data "$(DATA)")

results: install ## say how complete the grid is, print every table, draw every figure from records
	$(BIN)/mft_results

figures: install ## draw figures/ from results/
	$(BIN)/mft_figures

test: parts ## ruff, pytest; every notebook runs and its outputs are compared
	$(BIN)/ruff check .
	$(ONE_THREAD) $(BIN)/python -m pytest

test-oldest: ## the engine's tests on the lowest versions that settings.ini allows
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --requirement tests/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --no-deps --editable .
	$(ONE_THREAD) .venv-oldest/bin/python -m pytest --ignore-glob '*test_study_*' --ignore-glob '*test_house_*'

notebooks: parts ## run every notebook, or NAMES, and save the outputs
	$(BIN)/nbdev_export
	$(ONE_THREAD) $(BIN)/python tools/notebooks.py $(NAMES)

bench: parts ## measure what a step of MFT costs compared with other ways; adds a record to results/bench/
	$(BIN)/mft_bench $(if $(DATA),--data "$(DATA)")

gpu: parts ## measure MFT on one GPU in 8 minutes; the same command goes on; adds a record to results/bench/
	$(BIN)/mft_gpu

readme: install ## make README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: install ## build the site into _docs/ without Quarto
	$(BIN)/python tools/site.py

clean: ## remove what was built, but not .venv, results or checkpoints
	rm -rf _proc _docs .pytest_cache .ruff_cache
