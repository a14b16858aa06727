# Two commands: `make demo` and `make test`. Each sets up its own .venv first; nothing is asked.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-full check docs story clean
.DEFAULT_GOAL := test

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/layerskip demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2

test-full: .venv/installed
	LAYERSKIP_FULL=1 $(BIN)/python -m pytest -n 2

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

story: .venv/installed
	$(BIN)/python scripts/story.py

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
