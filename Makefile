# make run: from a fresh clone to a server with a model. make test: every test. Both can be repeated.
# make test-lowest: the fast tests with the least versions of what embedpool needs.
# make chaos: what make test does to a server for a minute, for an hour.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c conf/constraints.txt
CLIENTS := tests/live/clients
LOWEST := $(VENV)/lowest
NPM := $(shell command -v npm 2> /dev/null)
MODEL := sentence-transformers/all-MiniLM-L6-v2

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: run test test-lowest chaos lint docs docs-site screenshots bench clean

run: $(VENV)/run.installed
	@$(BIN)/embedpool init > /dev/null
	@grep -q '$(MODEL)' .config/pool.yml || \
		$(BIN)/embedpool register --model $(MODEL) --type local_st --max-seq-length 384 --alias minilm-l6
	$(BIN)/embedpool pool start

test: $(VENV)/test.installed $(VENV)/clients.installed $(if $(NPM),$(VENV)/npm.installed)
	$(if $(NPM),,@echo "no npm: the test of OpenAI's client for JavaScript is skipped")
	$(BIN)/python -m pytest

# test_openapi.py is left out: schemathesis needs newer versions of other packages than embedpool does. So are the
# clusters of test_ray_place.py, for their time: what Ray does there it does with `make test`.
test-lowest: $(VENV)/lowest.installed
	$(LOWEST)/bin/python -m pytest -p no:anyio --ignore=tests/live --ignore=tests/chaos --ignore=tests/web/test_openapi.py \
		--ignore=tests/places/test_ray_place.py

chaos: $(VENV)/test.installed
	$(BIN)/python -m pytest tests/chaos --long -v

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/test.installed
	$(BIN)/python -m tests.docs

docs-site: $(VENV)/test.installed
	$(BIN)/python -m mkdocs build --strict --config-file conf/mkdocs.yml

screenshots: $(VENV)/test.installed
	$(BIN)/python -m tests.screenshots

bench: $(VENV)/test.installed
	$(BIN)/python -m benchmarks.run --write
	$(BIN)/python -m benchmarks.rerank --write
	$(BIN)/python -m benchmarks.page
	$(BIN)/python -m benchmarks.memory --write
	$(BIN)/python -m benchmarks.cache --write
	$(BIN)/python -m benchmarks.jobs --write
	$(BIN)/python -m benchmarks.front --write
	$(BIN)/python -m benchmarks.ray_place --write

$(VENV)/run.installed: setup.cfg conf/constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo,openvino]'
	@touch $@

$(VENV)/test.installed: setup.cfg conf/constraints.txt | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/lowest.installed: setup.cfg conf/constraints.txt tests/lowest.py | $(BIN)/python
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -c conf/constraints.txt -c $(LOWEST)/constraints.txt \
		-e '.[demo,openvino,files,otel,cache]' brotli hypothesis mkdocs-material pytest pytest-randomly pytest-timeout zstandard
	@touch $@

# Clients of other APIs that the tests drive; some need other versions of what embedpool needs, so they live apart.
# uv installs them, since pip takes minutes to find versions that go together.
$(VENV)/clients.installed: $(wildcard $(CLIENTS)/*.txt) | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip install --quiet --disable-pip-version-check uv
	for name in $(basename $(notdir $(wildcard $(CLIENTS)/*.txt))); do \
		$(PYTHON) -m venv $(VENV)/clients/$$name && \
		$(VENV)/clients/bin/uv pip install --quiet --python $(VENV)/clients/$$name/bin/python \
			--requirement $(CLIENTS)/$$name.txt || exit 1; \
	done
	@touch $@

# A stamp of its own: npm may come to a machine later.
$(VENV)/npm.installed: $(CLIENTS)/package.json | $(VENV)/clients.installed
	@cp $(CLIENTS)/package.json $(VENV)/clients/
	cd $(VENV)/clients && npm install --loglevel=error --no-audit --no-fund
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
