# Everything from a machine that has Python 3.11 and nothing else. The environment is made once, in .venv.
PYTHON ?= python3.11
FRAMEWORK ?= torch
# Only needed where pip finds no CPU build of torch already, as on a machine with a local wheel.
PIP_FLAGS ?= $(shell test -d /opt/wheels || echo --extra-index-url https://download.pytorch.org/whl/cpu)

BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-all zoo bench lint clean

demo: $(READY)
	$(BIN)/slimline demo --framework $(FRAMEWORK)

test: lint
	$(PYTEST) -n 2 --dist worksteal -m "not slow and not alone" --durations=15
	$(PYTEST) -m "alone"

test-all: lint .venv-zoo/.ready
	$(PYTEST) -n 2 --dist worksteal -m "not alone" --durations=30
	$(PYTEST) -m "alone"

# Whole model zoos, hours of work: every model that benchmarks/results does not say is covered.
zoo: $(READY) .venv-zoo/.ready
	.venv-zoo/bin/python benchmarks/zoo_torchvision.py --resume
	.venv-zoo/bin/python benchmarks/zoo_transformers.py --resume
	.venv-zoo/bin/python benchmarks/zoo_timm.py --resume
	$(BIN)/python benchmarks/zoo_keras.py --resume

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(READY)
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/fashion_torch.py
	$(BIN)/python benchmarks/fashion_keras.py
	$(BIN)/python benchmarks/structured.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/patience.py
	$(BIN)/python benchmarks/sparse_training.py
	$(BIN)/python benchmarks/qat.py
	$(BIN)/python benchmarks/sparse.py --train
	$(BIN)/python benchmarks/zeros.py
	$(BIN)/python benchmarks/quantization.py
	$(BIN)/python benchmarks/dynamic.py lstm
	$(BIN)/python benchmarks/targets.py
	$(BIN)/python benchmarks/picture.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[all,dev]'
	touch $@

# torchvision, which timm wants, needs the torch that it was built with, gigabytes with CUDA where there is no index of
# CPU builds: an environment of its own.
.venv-zoo/.ready: pyproject.toml
	test -x .venv-zoo/bin/python || $(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet $(PIP_FLAGS) -e '.[torch]' torchvision transformers timm
	touch $@

clean:
	rm -rf .venv .venv-zoo runs .pytest_cache .mypy_cache .ruff_cache
