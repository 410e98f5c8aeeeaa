# Two commands: `make demo` distils a tiny Wan2.1 end to end, `make test` runs the tests. Both install what they need.
PYTHON ?= python3.11
BIN := .venv/bin
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test slow clean

demo: .venv/installed
	$(BIN)/python tools/demo.py

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --durations=30

slow: .venv/installed
	$(BIN)/python -m pytest -q -m slow --durations=10

.venv/installed: requirements.txt requirements-test.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	$(BIN)/pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv outputs
