# make demo | test | lint | docs-site | clean. On a fresh machine with Python >= 3.10, nothing else needs to be typed.
# Every step leaves a stamp in $(VENV) when it has succeeded, so a second run is quick and an interrupted one goes on where it was.
#
#   make demo PYTHON=python3.12                                   another Python
#   make demo TORCH=torch==2.9.1                                  another torch (safecl needs 2.8 or later)
#   make demo TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"    a smaller torch without CUDA

SHELL := /bin/sh
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
PYTEST_ARGS ?=
# Two processes share the files of the tests; each has its own ranks.
WORKERS ?= 2
DEMO ?= runs/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
CORES := $(shell nproc 2>/dev/null || echo 2)

# DeepSpeed looks for a GPU and warns when there is none; compiled extensions stay in this folder, apart from other projects' builds.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.torch_ext
ifeq ($(origin OMP_NUM_THREADS),undefined)
export OMP_NUM_THREADS := $(shell expr \( $(CORES) + 1 \) / 2)
demo-real: export OMP_NUM_THREADS := $(CORES)# its one rank has all cores
endif
export TOKENIZERS_PARALLELISM ?= false
ifeq ($(wildcard /dev/nvidiactl /dev/kfd /dev/dxg),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: help install demo demo-real demo-all test test-long gpu-dry lint docs docs-site clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install into $(VENV), then show on a tiny model how fine-tuning loses refusals and how safecl keeps them"
	@echo "make demo-real   the same on a pretrained model of 135 M parameters, which it downloads"
	@echo "make demo-all    the same with ten methods, on clean data and with 10 % poison; goes on where it was stopped"
	@echo "make test    install, then run all tests but the long ones"
	@echo "make test-long    the same with the long ones"
	@echo "make gpu-dry    run every section of the GPU suite at toy size, on the CPU"
	@echo "make lint    check style, types, the direction of imports, shell scripts and the documentation"
	@echo "make docs    renew the generated pages"
	@echo "make docs-site    build the documentation site into site/"
	@echo "make clean   remove caches, builds and the demo's files (make distclean: $(VENV) as well)"

install: $(STAMPS)/safecl

demo: install
	@echo "==> safecl demo $(DEMO)"
	@$(BIN)/python -m safecl demo $(DEMO)

demo-real: install $(STAMPS)/real
	@echo "==> safecl demo --real $(DEMO)-real"
	@$(BIN)/python -m safecl demo --real $(DEMO)-real

demo-all: install
	@echo "==> safecl demo --all $(DEMO)-all"
	@$(BIN)/python -m safecl demo --all $(DEMO)-all

test: install
	@echo "==> pytest -n $(WORKERS) $(PYTEST_ARGS)"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# `-m ''` takes back the `-m 'not long'` of pyproject.toml.
test-long: install
	@echo "==> pytest -m '' $(PYTEST_ARGS)"
	@$(BIN)/python -m pytest -m '' $(PYTEST_ARGS)

gpu-dry: install
	@echo "==> launch/gpu_suite.sh --dry"
	@OUT=$(CURDIR)/runs/gpu-dry PYTHON=$(abspath $(BIN))/python launch/gpu_suite.sh --dry --fresh --minutes 60

lint: install $(STAMPS)/docs
	@echo "==> ruff, mypy, lint-imports, shellcheck, mkdocs"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/shellcheck launch/*.sh .ci/run
	@$(MKDOCS) build --strict --quiet

docs: install
	@$(BIN)/python -m safecl.config.docs > docs/config.md.new && mv docs/config.md.new docs/config.md
	@$(BIN)/python docs/architecture.py
	@echo "==> wrote docs/config.md and docs/architecture.svg"

docs-site: $(STAMPS)/docs
	@$(MKDOCS) build --strict

$(STAMPS)/venv:
	@set -e; \
	for candidate in $(or $(PYTHON),python3 python python3.13 python3.12 python3.11 python3.10); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "no Python >= 3.10 found (tried: $(or $(PYTHON),python3, python, python3.10 to 3.13)); make PYTHON=/path/to/python names one" >&2; exit 1; fi; \
	if [ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1; then echo "==> using $(VENV), $$($(BIN)/python --version)"; \
	else echo "==> creating $(VENV) with $$($$python --version)"; "$$python" -m venv --clear $(VENV); fi
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@if $(BIN)/python -c 'import torch' >/dev/null 2>&1; then echo "==> using the torch that is in $(VENV)"; \
	else echo "==> installing $(TORCH) (the largest download, some minutes)"; $(PIP) install -q $(TORCH_FLAGS) "$(TORCH)"; fi
	@touch $@

$(STAMPS)/safecl: $(STAMPS)/torch pyproject.toml $(wildcard setup.py csrc/*)
	@echo "==> installing safecl, its requirements and the development tools"
	@$(PIP) install -q -e ".[dev]"
	@touch $@

$(STAMPS)/real: $(STAMPS)/safecl
	@echo "==> gguf and accelerate, which read the model of safecl demo --real"
	@$(BIN)/python -m pip install --quiet "gguf>=0.10" "accelerate>=1.0"
	@touch $@

$(STAMPS)/docs: $(STAMPS)/safecl
	@echo "==> installing the tools of the documentation site"
	@$(PIP) install -q -e ".[docs]"
	@touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .torch_ext $(DEMO) $(DEMO)-all $(DEMO)-real
	find safecl tests launch benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
