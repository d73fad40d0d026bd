# Everything from a machine that has Python 3.11 and nothing else. The environment is made once, in .venv.
PYTHON ?= python3.11
FRAMEWORK ?= torch
# Only needed where pip finds no CPU build of torch already, as on a machine with a local wheel.
PIP_FLAGS ?= $(shell test -d /opt/wheels || echo --extra-index-url https://download.pytorch.org/whl/cpu)

BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-all bench lint clean

demo: $(READY)
	$(BIN)/slimline demo --framework $(FRAMEWORK)

test: lint
	$(PYTEST) -n 2 --dist worksteal -m "not slow and not alone" --durations=15
	$(PYTEST) -m "alone"

test-all: lint
	$(PYTEST) -n 2 --dist worksteal -m "not alone" --durations=30
	$(PYTEST) -m "alone"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/fashion_torch.py
	$(BIN)/python benchmarks/fashion_keras.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
