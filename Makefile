# `make demo` and `make test` need nothing but Python (requirements are pinned for 3.11 and newer).
# To get torch without CUDA:
#   make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
TORCH_VERSION := 2.13.0

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
MODEL := demo/tiny-llama
SERVED := demo/out/tiny-llama/maxabs_quant_g3.json
SOURCES := gaudi_calib tests scripts examples docs benchmarks

export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo demo-serve test check style types docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

venv: $(VENV)/run.stamp ## build .venv with what calibration needs

test: style types $(VENV)/test.stamp ## style, types, doctests and tests (installs the full list first)
	$(BIN)/python -m pytest -q

check: $(VENV)/test.stamp ## quick tests while you edit: the house, the documents, the command line, doctests
	$(BIN)/python -m pytest -q tests/laws tests/cli gaudi_calib

style: $(VENV)/test.stamp ## lint and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/test.stamp ## static types
	$(BIN)/mypy

docs: $(VENV)/run.stamp ## write the generated parts of docs/
	$(BIN)/python docs/generate_cli.py

bench: $(VENV)/run.stamp ## speed and memory of measure, unify and expand against plain ways
	$(BIN)/python benchmarks/topology.py
	$(BIN)/python benchmarks/measure.py

demo: $(MODEL)/config.json ## train a tiny Llama, calibrate it, show what to run on a Gaudi
	PATH="$(BIN):$$PATH" scripts/calibrate_model.sh -m $(MODEL) -d builtin -o demo/out -t 2 -r 1 -l 64
	@echo; echo "The model is in $(MODEL), its calibration in demo/out/ ($$(find demo/out -type f | wc -l) files)."
	@echo "Copy both to the same paths on a Gaudi and run its two lines; under other paths,"
	@echo "change dump_stats_path in maxabs_quant_*.json as well."

demo-serve: $(SERVED) $(VENV)/test.stamp ## serve what `make demo` made, on this CPU, and chat with it over HTTP
	$(BIN)/python examples/chat_over_http.py $(MODEL) $(SERVED)

$(SERVED):
	$(MAKE) demo

$(MODEL)/config.json: examples/train_tiny_llama.py | $(VENV)/run.stamp
	$(BIN)/python examples/train_tiny_llama.py $(MODEL).new
	rm -rf $(MODEL) && mv $(MODEL).new $(MODEL)

# torch comes first and alone, so that nothing below can pull another build of it.
$(VENV)/torch-$(TORCH_VERSION).stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Error: $(PYTHON) is too old; run make PYTHON=python3.11 (3.11 or newer)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH_VERSION)
	@touch $@

$(VENV)/run.stamp: requirements/run.txt setup.cfg pyproject.toml $(VENV)/torch-$(TORCH_VERSION).stamp
	$(PIP) --no-deps -r requirements/run.txt
	$(PIP) --no-deps -e .
	@touch $@

$(VENV)/test.stamp: requirements/test.txt $(VENV)/run.stamp
	$(PIP) --no-deps -r requirements/test.txt
	@touch $@

clean: ## remove .venv and demo/
	rm -rf $(VENV) demo
