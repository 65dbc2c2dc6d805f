# Both commands make their own environment on a fresh machine (Python 3.11 or later).
PYTHON ?= python3
VENV   ?= .venv
PEERS  ?= .venv-peers
BIN    := $(VENV)/bin

.PHONY: demo test coverage advice-check overhead clean

demo: $(VENV)/.demo-installed  ## the main job on real data: what batch size for the digits?
	$(BIN)/noisescale advise digits --report report.html
	@echo "The report is a page: open $(CURDIR)/report.html in a browser."

test: $(VENV)/.test-installed  ## everything that CI runs
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest

coverage: $(VENV)/.test-installed  ## bias and coverage of every estimator (about 5 minutes)
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/coverage_tradeoff.py

advice-check: $(VENV)/.test-installed  ## the advice against tuned training (slow)
	$(BIN)/python benchmarks/advice_check.py

overhead: $(PEERS)/.installed  ## what a meter costs in time and memory, beside four other tools (slow)
	$(PEERS)/bin/python benchmarks/overhead.py
	$(PEERS)/bin/python benchmarks/overhead.py --memory

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[report,examples]'
	@touch $@

$(VENV)/.test-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	@touch $@

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -c constraints.txt -e .
	$(PEERS)/bin/pip install -q --no-deps -r benchmarks/requirements-peers.txt
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist report.html
