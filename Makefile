# `make demo` and `make test` need nothing but Python (requirements are pinned for 3.11 and newer).
# To get torch without CUDA:
#   make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
TORCH_VERSION := 2.13.0

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
MODEL := demo/smollm2-135m-instruct
SERVED := demo/out/smollm2-135m-instruct/maxabs_quant_g3.json
SOURCES := gaudi_calib tests scripts examples docs benchmarks

export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo demo-serve test check wheel-test style types docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

venv: $(VENV)/run.stamp ## build .venv with what calibration needs

test: style types $(VENV)/test.stamp ## style, types, doctests and tests (installs the full list first)
	$(BIN)/python -m pytest -q

check: $(VENV)/check.stamp ## the tests that run no model, INC, vLLM or Ray: a minute while you edit
	$(BIN)/python -m pytest -q -m "not torch and not inc and not vllm and not ray" --ignore=gaudi_calib/engines/vllm_plugin

wheel-test: ## the wheel in an empty environment, installed by pip's own resolver, calibrates
	PYTHON=$(PYTHON) .ci/wheel_test torch==$(TORCH_VERSION) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

style: $(VENV)/check.stamp ## lint and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/test.stamp ## static types
	$(BIN)/mypy

docs: $(VENV)/run.stamp ## write the generated parts of docs/
	$(BIN)/python docs/generate_cli.py

bench: $(VENV)/run.stamp ## speed and memory of measure, unify and expand against plain ways
	$(BIN)/python benchmarks/topology.py
	$(BIN)/python benchmarks/measure.py

demo: $(MODEL)/config.json ## calibrate SmolLM2-135M-Instruct, show what to run on a Gaudi
	PATH="$(BIN):$$PATH" scripts/calibrate_model.sh -m $(MODEL) -d builtin -o demo/out -t 3 -r 1 \
	    -l 128 -- --max-tokens 512
	@echo; echo "The model is in $(MODEL), its calibration in demo/out/ ($$(find demo/out -type f | wc -l) files)."
	@echo "Copy both to the same paths on a Gaudi and run the lines above for it; under other paths,"
	@echo "run gaudi-calib relocate DIR there first, with DIR the run's. FP8 costs this model quality:"
	@echo "make demo-serve shows its BF16 and FP8 answers side by side."

demo-serve: $(SERVED) $(VENV)/test.stamp ## chat with what `make demo` made, on this CPU, in BF16 and in FP8
	$(BIN)/python examples/chat_over_http.py $(MODEL) $(SERVED) --logs demo

$(SERVED):
	$(MAKE) demo

$(MODEL)/config.json: examples/prepare_smollm2.py requirements/demo.txt | $(VENV)/demo.stamp
	rm -rf $(MODEL)
	$(BIN)/python examples/prepare_smollm2.py $(MODEL)

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

$(VENV)/check.stamp: requirements/check.txt $(VENV)/run.stamp
	$(PIP) --no-deps -r requirements/check.txt
	@touch $@

$(VENV)/test.stamp: requirements/test.txt $(VENV)/check.stamp
	$(PIP) --no-deps -r requirements/test.txt
	@touch $@

$(VENV)/demo.stamp: requirements/demo.txt $(VENV)/run.stamp
	$(PIP) --no-deps -r requirements/demo.txt
	@touch $@

clean: ## remove .venv and demo/
	rm -rf $(VENV) demo
