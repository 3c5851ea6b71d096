# Each target creates .venv on first use. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check format docs web web-packages web-build native clean

demo: $(READY)  ## the whole road on the embedded default; ends by naming demo/report.html
	$(BIN)/tinyllava-edge demo

test: $(READY)  ## every test; no network, no weights from a hub
	$(BIN)/python -m pytest

check: $(READY)  ## lint, format, types, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/cli_reference.py --check

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python docs/cli_reference.py

# versions are pinned by package-lock.json; no script of a package is run
web: web-packages web-build  ## the page that runs bundles in a browser, in runtimes/web/dist; needs Node.js 18 or newer

web-packages:
	cd runtimes/web && npm ci --ignore-scripts

web-build:
	cd runtimes/web && npm run build

native:  ## llama.cpp's llama-server and llama-mtmd-cli for arm64, in build/arm64/llama; needs Debian's cross compilers
	PYTHON=$(PYTHON) runtimes/native/build.sh

# torch first: with it in place no other package can pull another build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@echo "installing the rest; llama.cpp compiles once, which takes 5 to 10 minutes on 2 cores"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.PHONY: arm64
arm64: $(READY)  ## the edge runtime on arm64, under qemu; asks apt, pip and Debian's cross compilers for what it needs
	PYTHON=$(PYTHON) runtimes/native/build.sh
	PYTHON=$(PYTHON) runtimes/native/arm64-root.sh
	$(BIN)/python -m pytest tests/arm64

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache runtimes/web/node_modules runtimes/web/dist build
