# make run: from a fresh clone to a server with a model. make test: every test. Both can be repeated.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c conf/constraints.txt
CLIENTS := tests/live/clients
MODEL := sentence-transformers/all-MiniLM-L6-v2

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: run test lint docs bench clean

run: $(VENV)/run.installed
	@$(BIN)/embedpool init > /dev/null
	@grep -q '$(MODEL)' .config/pool.yml || \
		$(BIN)/embedpool register --model $(MODEL) --type local_st --max-seq-length 384 --alias minilm-l6
	$(BIN)/embedpool pool start

test: $(VENV)/test.installed $(VENV)/clients.installed
	$(BIN)/python -m pytest

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/test.installed
	$(BIN)/python -m tests.docs

bench: $(VENV)/test.installed
	$(BIN)/python -m benchmarks.run --write

$(VENV)/run.installed: setup.cfg conf/constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo,openvino]'
	@touch $@

$(VENV)/test.installed: setup.cfg conf/constraints.txt | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $@

# Clients of other APIs that the tests drive; some need other versions of what embedpool needs, so they live apart.
$(VENV)/clients.installed: $(CLIENTS)/requirements.txt $(CLIENTS)/package.json | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip install --quiet --disable-pip-version-check -r $(CLIENTS)/requirements.txt
	@cp $(CLIENTS)/package.json $(VENV)/clients/
	@if command -v npm > /dev/null; then cd $(VENV)/clients && npm install --silent --no-audit --no-fund; \
	else echo "no npm: the test of OpenAI's client for JavaScript is skipped"; fi
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
