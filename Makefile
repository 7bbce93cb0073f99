# Two commands do everything on a fresh machine with Python 3.10 to 3.12:
#   make quickstart   a trained adapter and a before/after picture, on CPU, without a download
#   make test         all tests

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.10 || echo python3)
BIN := .venv/bin

.PHONY: quickstart test test-real test-newest lint clean

quickstart: .venv/installed
	$(BIN)/python -m tools.quickstart

# Two at a time, each file by one of them: compiling, which most of the time goes into, uses one core.
test: .venv/installed-tests
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --durations 40

# At real model size: about 20 GiB and a quarter of an hour.
# Each in a process of its own: MindSpore keeps the weights of what it has compiled (measured), here of all models at once.
test-real: .venv/installed-tests
	@tests=$$($(BIN)/python -m pytest -q -m real --collect-only | grep ::) || { echo "no real-size test was found"; exit 1; }; \
	failed=; for test in $$tests; do \
	  $(BIN)/python -m pytest -q -s -m real "$$test" || failed="$$failed $$test"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

# Files go to the newest versions of the other libraries and back, once per release: these have an environment of their own.
test-newest: .venv/installed .venv-newest/installed
	DREAMBOOTH_MS_PYTHON=$(CURDIR)/$(BIN)/python .venv-newest/bin/python -m pytest -q --confcutdir tests/exchange tests/exchange

.venv-newest/installed: tests/requirements-newest.txt | .venv/bin/python
	$(BIN)/python -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements-newest.txt
	touch $@

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each mark appears when all is installed; what was interrupted or failed is done again.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) tools/install.py -e .
	@touch $@

.venv/installed-tests: tests/requirements.txt .venv/installed
	@$(PYTHON) tools/install.py -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv .venv-newest build dist *.egg-info
