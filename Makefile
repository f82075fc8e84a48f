# A fresh machine needs Python 3.10 or newer with venv, and PyPI.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test fuzz lint format clean

## Train a small Neural ODE on real digits, fit solvers to it, print the table (6 minutes).
demo: .venv/demo.stamp
	$(BIN)/python examples/a1_digits.py

## All checks, as CI runs them.
test: lint
	$(BIN)/python -m pytest --cov -n auto --dist worksteal

## Ten thousand random calls against an independent evaluation; FUZZ="--fuzz-seed 7" for others.
fuzz: .venv/dev.stamp
	$(BIN)/python -m pytest tests/fuzz --fuzz-calls 10000 $(FUZZ)

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv out build dist .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable ".[examples]"
	touch $@

# torchdyn asks for torchvision, whose wheel must match torch's build, and for notebooks:
# neither is used here, so it and torchcfm, which asks for it, come without what they ask.
# The sample plugin is installed as a third party's would be: the tests meet its
# methods in the registry.
.venv/dev.stamp: pyproject.toml constraints.txt tests/sample_plugin/pyproject.toml | .venv/bin/python
	$(INSTALL) --editable ".[dev]" --editable tests/sample_plugin
	$(INSTALL) --no-deps torchdyn torchcfm
	touch $@
