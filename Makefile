PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-text test check protos examples clean

demo: .venv/installed  ## Train, publish, serve, retrieve and swap on MovieLens-100K.
	$(BIN)/twotower demo

demo-text: .venv/installed  ## Train, publish and serve a text search, and answer typed questions.
	$(BIN)/twotower demo-text

test: .venv/installed  ## The whole test suite.
	$(BIN)/pytest --numprocesses 2 --dist worksteal

check: .venv/installed  ## Format, lint, types, import contracts, protos, stubs.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against released.binpb
	scripts/protos --check
	$(BIN)/hadolint Dockerfile

protos: .venv/installed  ## Regenerate the stubs beside the protos, and docs/api.md.
	scripts/protos

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

examples:  ## What the examples in other languages, and their tests, need. Takes npm, with Node 20 or newer.
	npm ci --no-audit --no-fund --prefix docs/examples/typescript

clean:  ## Remove what the demo made.
	rm -rf var
