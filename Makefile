# Everything a newcomer needs: `make demo` and `make test` set up what they use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow bench-smoke lint bench clean

# Workers share the cores.
test bench-smoke: export OMP_NUM_THREADS := 1
# Many tests start a process: without bytecode it takes seconds more to import torch.
unexport PYTHONDONTWRITEBYTECODE

demo: $(VENV)/core.ok
	$(BIN)/reprune demo --output reprune-demo

test: $(VENV)/dev.ok
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow and not smoke"

test-slow: $(VENV)/dev.ok
	$(BIN)/pytest -m slow

bench-smoke: $(VENV)/dev.ok
	$(BIN)/pytest -m smoke

lint: $(VENV)/dev.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=src:examples $(BIN)/mypy --allow-untyped-calls examples
	MYPYPATH=src:benchmarks $(BIN)/mypy --allow-untyped-calls benchmarks recipes

bench: $(VENV)/dev.ok
	$(BIN)/python benchmarks/purify.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/bench.py

$(VENV)/uv.ok:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	touch $@

$(VENV)/core.ok: $(VENV)/uv.ok pyproject.toml constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt --editable .
	touch $@

$(VENV)/dev.ok: $(VENV)/uv.ok pyproject.toml constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/core.ok

clean:
	rm -rf $(VENV) reprune-demo
