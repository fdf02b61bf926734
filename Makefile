# The README's two commands, and what a developer repeats.
PYTHON ?= python3.11

.venv: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	.venv/bin/pip install -q --no-deps -e .
	touch .venv

.venv/with-tests: .venv requirements-test.txt
	.venv/bin/pip install -q -r requirements-test.txt
	touch .venv/with-tests

quickstart: .venv
	.venv/bin/python bin/train configs/quickstart.yaml

test: .venv/with-tests
	.venv/bin/python -m pytest -n auto

test-fast: .venv/with-tests
	.venv/bin/python -m pytest -n auto -m "not slow"

format: .venv/with-tests
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.PHONY: quickstart test test-fast format
