# Every target sets itself up: a virtual environment in .venv, torch as its own first step, then the package.
# Another torch (CPU only, another CUDA): make demo TORCH="torch==2.13.0 --index-url …"; another Python: PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check clean

demo: $(VENV)/package
	$(VENV)/bin/rwkv-peft demo

test: $(VENV)/tests
	$(VENV)/bin/python -m pytest

check: $(VENV)/tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/package: $(VENV)/torch pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/tests: $(VENV)/package
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/tools: $(VENV)/package
	$(PIP) --editable '.[dev]'
	touch $@
