# Two commands, each doing all of its own set-up from a fresh clone:
#   make demo   the main job on the default model
#   make test   the tests
# and `make lint` for those who change the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test lint clean

demo: $(VENV)/.base
	$(BIN)/turbosparse demo

test: $(VENV)/.test
	$(BIN)/cmake --preset asan >/dev/null
	$(BIN)/cmake --build --preset asan
	$(BIN)/ctest --preset asan
	$(BIN)/python -m pytest

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
	$(PIP) install -q -c constraints.txt -e '.[test,train,eval]'
	touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) install -q -c constraints.txt -e '.[lint]'
	touch $@
