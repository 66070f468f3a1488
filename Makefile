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

.PHONY: bench
bench: build ## how fast it is beside this machine's limit; tables, pictures and figures in bench/, in under ten minutes
	@mkdir -p bench
	@$(BIN)/latepage bench all --json bench/figures.json --output bench

.PHONY: test
test: test-rust test-loom test-python ## every test: Rust, loom, Python

.PHONY: test-rust
test-rust: $(VENV)/.machine ## Rust's tests, on the real kernel where it allows
	cargo test --workspace --locked --quiet

.PHONY: test-loom
test-loom: $(VENV)/.machine ## the state table under every interleaving (loom)
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$(LOOM_TARGET_DIR) cargo test --package latepage --lib --release --locked --quiet -- loom_

.PHONY: test-python
test-python: build wheel sdist ## Python's tests, the doc pages and the docstrings among them
	@bash tools/machine.sh test
	$(BIN)/pytest

# Not part of `make test`: the first time it builds two kernels, some ten minutes; they are kept outside this folder.
.PHONY: lab
lab: build ## tests/lab inside two kernels of our own, with memory-fault exits (docs/lab.md)
	@lab/build
	cargo build --package latepage-examples --locked --quiet
	LAB_TIMEOUT=1800 lab/run stock -- $(BIN)/pytest tests/lab
	LAB_TIMEOUT=1800 lab/run userfault -- $(BIN)/pytest tests/lab

# Freestanding: no library, no start files, no vector registers, nothing but what stands in the folder.
GUEST := $(CARGO_TARGET_DIR)/guest.elf
GUEST_FLAGS := -std=c11 -O2 -Wall -Wextra -Wconversion -Werror -ffreestanding -nostdlib -static -no-pie -fno-pic \
	-mno-red-zone -mgeneral-regs-only -fno-stack-protector -fno-asynchronous-unwind-tables \
	-Wl,--build-id=none,-z,noexecstack,-z,max-page-size=4096,-T,guest/guest.ld

.PHONY: guest
guest: $(GUEST) ## the small guest that tests boot in a real Firecracker (guest/README.md)

$(GUEST): $(wildcard guest/*)
	@mkdir -p $(@D)
	$(CC) $(GUEST_FLAGS) -o $@ guest/start.s $(filter %.c,$^)

.PHONY: lint
lint: build ## formatting, lints, types, stubs, unsafe, licences and advisories
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/mypy
	$(BIN)/mypy tests tools examples
	$(PY) -m mypy.stubtest latepage._core --mypy-config-file pyproject.toml --ignore-disjoint-bases
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	$(PY) tools/unsafe_code.py
	$(PY) tools/licences.py

.PHONY: site
site: build ## the documentation site, in site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(PY) tools/site_assets.py site

# The tag is what maturin's audit of the symbols allows: manylinux_2_34 where glibc is 2.34 or later. That is what hosts with
# Linux 6.1 have (Amazon Linux 2023, Debian 12, Ubuntu 22.04), so no older C library is aimed at.
.PHONY: wheel
wheel: build ## a wheel for any Python from 3.11 on, in dist/
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin build --release --locked --out dist >$(VENV)/wheel.log 2>&1 || { cat $(VENV)/wheel.log; exit 1; }

.PHONY: sdist
sdist: build ## the sources as one archive, in dist/, from which pip builds a wheel
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin sdist --out dist >$(VENV)/sdist.log 2>&1 || { cat $(VENV)/sdist.log; exit 1; }

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
	rm -rf $(VENV) target bench demo dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
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
