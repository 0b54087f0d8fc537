# Everything runs inside a virtual environment that the first call makes. What can be set on the command line:
#   PYTHON=python3.12      the interpreter that makes the environment (3.10 or newer)
#   VENV=path              use the environment at `path` instead of .venv (from inside one: make gaze VENV="$VIRTUAL_ENV")
#   PIP_ARGS='...'         passed to .ci/install.py, as to pip install: '-c requirements-lock.txt' takes the versions that were tested;
#                          '--extra-index-url INDEX' takes PyTorch without CUDA, where INDEX is an index of CPU wheels
#                          (pytorch.org names it under "Get started", compute platform CPU)
#   PRESET, SEED, ARGS     of the experiments; ARGS='-p budget 0.5' passes more parameters to papermill
#   SETTING                a file of nbs/settings, in place of PRESET and SEED
#   NOTEBOOK, SETTING      of `make publish`, which writes what is committed: outputs/NOTEBOOK/SETTING
#   FLAGS='slow cuda'      let `make test` run what carries these flags too
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PRESET ?= demo
SEED ?= 1
SETTING ?=
ARGS ?=
FLAGS ?=
# one GPU bears one notebook at a time
WORKERS ?= $(if $(filter cuda,$(FLAGS)),1,2)

STAMP := $(VENV)/.installed
# The environment's programs and its kernel come first, whatever else is on PATH and whichever kernel named `python3` the user keeps:
# JUPYTER_PATH outranks the user's kernelspecs. IN_TEST would turn nbdev_export into a silent no-op.
# Bytecode is kept: what an experiment and the tests start are many processes, and each would compile what it imports.
# PASSIVE: threads that wait sleep. Beside another busy process a step of two threads takes 0.23 s, not 0.59; alone 0.19 and 0.18.
ACTIVATE = set -euo pipefail; bin="$$(cd "$(VENV)/bin" && pwd)"; unset PYTHONHOME IN_TEST PYTHONDONTWRITEBYTECODE; export PATH="$$bin:$$PATH" \
	OMP_WAIT_POLICY="$${OMP_WAIT_POLICY:-PASSIVE}" \
	JUPYTER_PATH="$${bin%/bin}/share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}"

EXPERIMENTS := $(sort $(basename $(notdir $(wildcard nbs/*.ipynb))))

.DEFAULT_GOAL := help
.PHONY: help $(EXPERIMENTS) publish explore app site test export clean-nbs prepare

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  make NAME       one of the other experiments, likewise: $(filter-out gaze,$(EXPERIMENTS))"
	@echo "  settings: PYTHON VENV PIP_ARGS PRESET SEED SETTING NOTEBOOK ARGS FLAGS WORKERS (see the head of the Makefile)"

# What an experiment writes is ignored by git: the executed notebook here, its report in $XCL_HOME/reports.
MINE = $${XCL_HOME:-outputs/runs}/notebooks
ASKED = $(if $(SETTING),-f nbs/settings/$(SETTING).yaml -p setting $(SETTING),-p preset $(PRESET) -p seed $(SEED))

gaze: ## run the gaze experiment (PRESET=demo SEED=1) into outputs/runs/notebooks/gaze-demo-seed1.ipynb
$(EXPERIMENTS): $(STAMP)
	@$(ACTIVATE); mkdir -p "$(MINE)"; out="$(MINE)/$@-$(or $(SETTING),$(PRESET)-seed$(SEED)).ipynb"; \
	papermill "nbs/$@.ipynb" "$$out" --log-output $(ASKED) $(ARGS); echo "executed: $$out"

publish: $(STAMP)  ## run NOTEBOOK at SETTING and write outputs/NOTEBOOK/SETTING, which is committed
	@$(ACTIVATE); python -m xcl.paper.publish "$(NOTEBOOK)" "$(SETTING)" $(ARGS)

explore: $(STAMP)  ## write the explorer as one HTML page; ARGS='FOLDER --out FILE' for other networks
	@$(ACTIVATE); python -m xcl.paper.explore_page $(ARGS)

app: $(STAMP)  ## open the explorer as an app (installs Voila the first time)
	@$(ACTIVATE); command -v voila >/dev/null || { echo 'installing Voila'; python .ci/install.py $(PIP_ARGS) -e '.[app]'; }; \
	voila nbs/apps/explore.ipynb $(ARGS)

site: $(STAMP)  ## all notebooks as pages with an index and a search, in outputs/runs/site (installs Sphinx the first time)
	@$(ACTIVATE); python -c 'import sphinx, myst_nb, furo' 2>/dev/null || { echo 'installing Sphinx'; python .ci/install.py $(PIP_ARGS) -e '.[site]'; }; \
	python .ci/site/build.py

# Every step sees an empty XCL_HOME that is removed afterwards, so neither finished runs are read nor any touched.
# The library's notebooks are executed by nbdev_test, the experiments by pytest (once each, at preset smoke).
# Many tests wait for a process of their own, so pytest has two workers more than nbdev_test.
test: $(STAMP)  ## export check, notebook tests, pytest, ruff
	@$(ACTIVATE); home="$$(mktemp -d)"; trap 'rm -rf "$$home"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	export XCL_HOME="$$home" MPLBACKEND=Agg OMP_NUM_THREADS=1; \
	step() { printf '\n== %s\n' "$$*"; }; \
	step 'ruff check, ruff format'; ruff check; ruff format --check; \
	step 'notebooks clean and exported'; python tests/check_export.py; \
	step 'nbdev_test'; nbdev_test --path nbs/lib --n_workers $(WORKERS) --do_print --timing --flags '$(FLAGS)'; \
	step 'pytest'; pytest -n $$(($(WORKERS) + 2)) $(if $(filter slow,$(FLAGS)),--slow); \
	step 'all passed'

export: $(STAMP)  ## write xcl/*.py from the notebooks
	@$(ACTIVATE); nbdev_export

clean-nbs: $(STAMP)  ## strip execution counts and stray metadata from the notebooks
	@$(ACTIVATE); nbdev_clean

prepare: $(STAMP)  ## format, sort imports, clean, export: before every commit
	@$(ACTIVATE); ruff check -q --fix --select I nbs tests; ruff format -q; nbdev_clean; nbdev_export

# An environment that already satisfies settings.ini is used as it is; nothing is downloaded for it.
$(STAMP): settings.ini setup.py
	@set -euo pipefail; \
	if [ ! -x "$(VENV)/bin/python" ]; then \
	  command -v $(PYTHON) >/dev/null || { echo "xcl needs Python 3.10 or newer, and there is no '$(PYTHON)'. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "xcl needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	  echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv "$(VENV)"; \
	fi; \
	if "$(VENV)/bin/python" -I .ci/ready.py; then echo "$(VENV) has everything in settings.ini"; else \
	  "$(VENV)/bin/python" -m pip --version >/dev/null 2>&1 || "$(VENV)/bin/python" -m ensurepip; \
	  echo "installing into $(VENV): 6.3 GB on the disk on Linux, 4.3 GB of them CUDA."; \
	  echo "Without a GPU, PIP_ARGS can name an index of CPU wheels, without those: see the head of the Makefile. Fetched:"; \
	  "$(VENV)/bin/python" .ci/install.py $(PIP_ARGS) -e '.[dev]'; \
	fi; \
	touch "$@"
