# The README's two commands, and what a developer repeats.
PYTHON ?= python3.11

.venv: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	.venv/bin/pip install -q --no-deps -e .
	touch .venv

quickstart: .venv
	.venv/bin/python bin/train configs/quickstart.yaml

test: .venv
	.venv/bin/python -m pytest

format: .venv
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.PHONY: quickstart test format
