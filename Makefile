# Two commands, each doing all of its own set-up from a fresh clone:
#   make demo   the main job on the default model
#   make test   the tests
# and for those who change the code:
#   make lint          the linters
#   make test-aarch64  the native tests on an emulated ARM, where compiler and emulator are installed
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test test-aarch64 lint clean

demo: $(VENV)/.base
	$(BIN)/turbosparse demo

test: $(VENV)/.test
	$(BIN)/cmake --preset asan >/dev/null
	$(BIN)/cmake --build --preset asan
	$(BIN)/ctest --preset asan
	$(BIN)/python -m pytest

# The second run is on a CPU that has no dot products: neon, and nothing beyond ARMv8's base instruction set.
test-aarch64: $(VENV)/.test
	@if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then \
	  echo "test-aarch64: skipped, needs aarch64-linux-gnu-g++ and qemu-aarch64"; exit 0; fi; \
	set -e; PATH="$$PWD/$(BIN):$$PATH"; \
	cmake --preset aarch64 >/dev/null; \
	cmake --build --preset aarch64; \
	ctest --preset aarch64; \
	ctest --preset aarch64-base

lint: $(VENV)/.test $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inl')
	$(BIN)/python -m numpydoc lint $(shell find src -name '*.py')

clean:
	rm -rf $(VENV) build dist

$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U 'pip>=24'
	touch $@

# An editable install; the native core is rebuilt when one of its sources changes.
$(VENV)/.base: $(VENV)/.pip $(SOURCES)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install -q -c constraints.txt -e '.[test,train,eval,report]'
	touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) install -q -c constraints.txt -e '.[lint]'
	touch $@
