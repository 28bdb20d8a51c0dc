# Everything runs in an environment of its own, .venv; `make demo` or `make test` sets it up on first use.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint format types kernels-report sanitize sanitize-gpu bench bench-gpu bench-compare bench-report clean

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# onnxruntime has one build with CUDA and one without, and they exclude each other.
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers
NATIVE := $(shell find kernels -name '*.cpp' -o -name '*.h')
# Several test processes with one thread each beat one process with several threads.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores : 4)))
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
RESULTS := bench/results/speed
# The address of PyTorch's wheels for this machine, as its install page gives it; empty: where pip looks anyway.
TORCH_INDEX ?=

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: Python; got $$($(PYTHON) --version 2>&1); accepted: 3.10 or newer (make PYTHON=/path/to/python3.12 ...)"; exit 1; }
	@command -v c++ >/dev/null || { echo "error: no C++ compiler; accepted: g++ or clang++ as c++ (Debian: apt install g++)"; exit 1; }
	@echo "== Python environment: .venv, with $$($(PYTHON) --version)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { \
	  echo "error: no environment; accepted: a Python with venv and pip (Debian: apt install python3-venv)"; exit 1; }
	@# On Linux, pip's default index has only the build of PyTorch with CUDA. Another index is not a default here: where
	@# it cannot be reached pip still asks it for every package, and waits half a minute each time.
	@if [ "$$(uname -s)-$(EXTRA)-$(TORCH_INDEX)" = Linux-cpu- ]; then \
	  echo "== No GPU here, and no TORCH_INDEX: unless pip is set up otherwise, PyTorch comes with CUDA, several GB that"; \
	  echo "   nothing here uses. To save them, stop and run: make TORCH_INDEX=ADDRESS ..., with the address that"; \
	  echo "   PyTorch's install page (pytorch.org, Get Started) gives for its CPU build"; fi
	@echo "== Packages ($(EXTRA) builds, 2.5 GB, with CUDA several more) and the native module: one to five minutes"; \
	  $(BIN)/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[$(EXTRA),test,dev]'
	@touch $@
	@echo "== Ready: $$($(BIN)/python -c 'import pbe_fast.kernels.backends as b; print(b.available_backends())')"

demo: $(READY) ## infect a small model, purify it, export and verify it; writes runs/demo
	@echo "== Demo: digits, into runs/demo"
	$(BIN)/pbe-fast demo --out runs/demo --force

test: $(READY) ## run the tests
	@echo "== Tests: $(WORKERS) processes"
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(READY) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(wildcard tests/native/*)

format: $(READY) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(wildcard tests/native/*)

types: $(READY) ## mypy --strict
	$(BIN)/mypy

kernels-report: $(READY) ## compile the Triton kernels for three GPU generations; registers, spills, shared memory
	env -u TRITON_INTERPRET $(BIN)/python -m pbe_fast.kernels.aot

sanitize: $(READY) ## run the native code under AddressSanitizer and UBSan
	$(BIN)/cmake -S . -B build/sanitize -DPBE_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
	$(BIN)/cmake --build build/sanitize --parallel $(WORKERS)
	build/sanitize/native_test

# Without torch's memory pool, in which a read past the end of one tensor is a read of another; nor can a graph be captured
# without it. The compilers that Triton starts are not followed.
SANITIZER ?= compute-sanitizer
sanitize-gpu: $(READY) ## run the Triton kernels' tests on this machine's GPU under compute-sanitizer (memcheck)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "error: no GPU; got a machine without CUDA; accepted: one with an NVIDIA GPU and PyTorch's CUDA build"; exit 1; }
	@command -v $(SANITIZER) >/dev/null || { \
	  echo "error: no $(SANITIZER); accepted: that of the CUDA toolkit (make SANITIZER=/usr/local/cuda/bin/compute-sanitizer ...)"; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --error-exitcode 1 --target-processes application-only \
	  $(BIN)/python -m pytest tests/kernels -k "(triton or gpu or 32_bits) and not graph" -p no:xdist --timeout 0 $(PYTEST_ARGS)

$(PEERS): $(READY)
	@echo "== What the benchmarks race against: torchattacks, Foolbox, ART"
	$(BIN)/pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[bench]'
	@touch $@

# The real images of test_purify.py lie in the folder that PBE_FAST_DATA names; without it those cases are skipped.
bench: $(PEERS) ## race everything against its peers on this CPU; under 15 minutes on two cores
	$(BIN)/pytest bench/speed -s -m "not gpu" --show-capture no --timeout 0 --record $(RESULTS)

bench-gpu: $(PEERS) ## the same on this machine's GPU; under 9 minutes
	$(BIN)/pytest bench/speed -s -m gpu --show-capture no --timeout 0 --record $(RESULTS)

bench-compare: $(READY) ## compare a few ratios with the last recorded ones of the same kind of machine
	$(BIN)/python bench/compare.py

bench-report: $(READY) ## write docs/benchmarks.md and its figures from the recorded results
	$(BIN)/python bench/report.py

clean: ## remove builds, caches and the environment
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
