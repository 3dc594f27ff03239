# The few commands everyone runs. Each does its own set-up in .venv and target/; nothing is installed elsewhere.
#
#   make demo    train, kill five times, resume, compare
#   make test    every test, Rust and Python
#   make lint    formatting, clippy, ruff, types
#   make faults  power cuts and kills by the thousand, for the better part of an hour
#   make cuts    power cuts on file systems in images, as root: ext4, and xfs and btrfs where their mkfs is installed
#   make bench   what it costs
#
# Needs Rust, Python 3.11 or newer, make and a C compiler. The tests look at pages in Chromium where there is one.

PYTHON ?= python3
WORKERS ?= 2

venv := .venv
bin := $(venv)/bin
installed := $(venv)/.installed
built := $(venv)/.built
requirements := $(wildcard requirements/*.txt)
rust := Cargo.toml Cargo.lock pyproject.toml $(shell find crates -name '*.rs' -o -name Cargo.toml)

# Cargo and pip find the virtual environment's Python whatever shell make was called from.
export VIRTUAL_ENV := $(CURDIR)/$(venv)
export PYO3_PYTHON := $(CURDIR)/$(bin)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_REQUIRE_VIRTUALENV := 1

.PHONY: setup demo test test-rust test-python test-burn faults cuts lint format bench clean

setup: $(built)

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11: make PYTHON=...")'
	$(PYTHON) -m venv $(venv)

# The stamp holds the pins it was made from: a new environment, or other pins, install again; nothing else does.
$(installed): $(requirements) | $(bin)/python
	@if cat $(requirements) | cmp -s - $@; then touch $@; else \
	    $(bin)/python -m pip install $(addprefix -r ,$(requirements)) && cat $(requirements) > $@; fi

$(built): $(rust) $(installed)
	$(bin)/maturin develop --release
	@touch $@

demo: setup
	$(bin)/python examples/demo.py

test: test-rust test-python test-burn

# The extension module has no tests of its own in Rust: they would have to link against libpython.
test-rust: $(bin)/python
	cargo test --package unbroken --package unbroken-cli --package unbroken-import

# What these two depend on is built once, into the same target directory, at a profile of their own.
test-burn:
	cargo test --package unbroken-burn --profile burn
	cargo test --package unbroken-candle --profile burn

test-python: setup
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(WORKERS)

cuts: setup
	$(bin)/python tests/stories/power_cut.py --cuts 20

# Fuzz targets: fuzz/.
faults: setup
	UNBROKEN_EXPLORE=long cargo test --release --package unbroken --test power_cuts -- --nocapture
	UNBROKEN_ROUNDS=100000 cargo test --release --package unbroken --test hostile
	UNBROKEN_KILLS=200 UNBROKEN_STATE_MB=200 OMP_NUM_THREADS=1 \
	    $(bin)/python -m pytest -s tests/stories/test_story_save_kills.py

lint: setup
	cargo fmt --all --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --package unbroken-burn --profile burn --all-targets -- -D warnings
	cargo clippy --package unbroken-candle --profile burn --all-targets -- -D warnings
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/basedpyright

format: $(installed)
	cargo fmt --all
	$(bin)/ruff format
	$(bin)/ruff check --fix-only

bench: setup
	$(bin)/python bench

clean:
	rm -rf target $(venv) python/unbroken/_core.*.so
