# A fresh machine needs Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV ?= .venv

.PHONY: quickstart test lint docs clean

quickstart: $(VENV)/.package
	$(VENV)/bin/fedmllm quickstart

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python scripts/check_words.py
	$(VENV)/bin/python scripts/public_names.py

docs: $(VENV)/.dev
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python >= 3.11 is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.package: $(VENV)/.python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.package

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
