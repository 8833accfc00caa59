# Everything happens in .venv; nothing but Python 3.11, pip and make is expected.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test check install clean

install: .venv/.installed

# torch goes first and alone: asked for by another package, pip takes a build several GB larger.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/reflux demo $(ARGS)

test: check
	$(BIN)/pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .reflux
