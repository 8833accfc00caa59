# Everything happens in .venv; nothing but Python 3.11, pip and make is expected, and
# for `make test` a Chromium, or apt to get one.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test check install chromium clean

install: .venv/.installed

# torch goes first and alone: asked for by another package, pip takes a build several GB larger.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/reflux demo $(ARGS)

test: check chromium
	$(BIN)/pytest

# The page is tested in a real browser: any Chromium on PATH, else Debian's.
chromium:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name > /dev/null && exit 0; \
	done; \
	sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
	$$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive \
	  apt-get install -yqq --no-install-recommends chromium

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .reflux
