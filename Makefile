# latepage: `make help` lists what there is. Every target makes what it needs, on a bare Debian-like machine too.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY   := $(VENV)/bin/python
BIN  := $(VENV)/bin
# One place for cargo's output; CARGO_TARGET_DIR moves it. Loom builds everything with another cfg, hence apart.
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
LOOM_TARGET_DIR ?= $(CARGO_TARGET_DIR)/loom

RUST_SOURCES := $(shell find crates -path '*/src/*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock

.PHONY: help
help: ## this list
	@echo "latepage: a virtual machine's memory, supplied late"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: $(VENV)/.built ## the package and its native module, in .venv (.venv/bin/latepage)

.PHONY: demo
demo: build ## restore one VM three ways and draw where its time went (results in demo/)
	@bash tools/machine.sh demo
	@$(BIN)/latepage demo --output demo

.PHONY: test
test: test-rust test-loom test-python ## every test: Rust, loom, Python

.PHONY: test-rust
test-rust: $(VENV)/.machine ## Rust's tests, on the real kernel where it allows
	cargo test --workspace --locked --quiet

.PHONY: test-loom
test-loom: $(VENV)/.machine ## the state table under every interleaving (loom)
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$(LOOM_TARGET_DIR) cargo test --package latepage --lib --release --locked --quiet -- loom_

.PHONY: test-python
test-python: build ## Python's tests, the doc pages and the docstrings among them
	$(BIN)/pytest

.PHONY: lint
lint: build ## formatting, lints, types, stubs, unsafe, licences and advisories
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/mypy
	$(BIN)/mypy tests tools
	$(PY) -m mypy.stubtest latepage._core --mypy-config-file pyproject.toml --ignore-disjoint-bases
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	$(PY) tools/unsafe_code.py
	$(PY) tools/licences.py

.PHONY: format
format: build ## write all code the way `make lint` wants it
	$(BIN)/ruff check --quiet --fix-only
	$(BIN)/ruff format --quiet
	cargo fmt --all

.PHONY: lock
lock: build ## look for newer Python packages and write requirements.lock anew
	bash tools/lock.sh $(PY)

.PHONY: clean
clean: ## remove everything that was built
	rm -rf $(VENV) target demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python tests tools -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/latepage/_core*.so

# What the machine must have, looked at once; a missing compiler is installed where that is allowed.
$(VENV)/.machine: tools/machine.sh
	@bash tools/machine.sh build
	@mkdir -p $(VENV) && touch $@

# Exactly what the lock names, hash by hash.
$(VENV)/.deps: requirements.lock $(VENV)/.machine
	@$$(bash tools/machine.sh python) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	@touch $@

# Python's sources are used where they lie: only Rust, the lock and pyproject.toml ask for a new build.
$(VENV)/.built: $(VENV)/.deps $(RUST_SOURCES) pyproject.toml
	PIP_QUIET=1 VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --locked --quiet
	@touch $@
