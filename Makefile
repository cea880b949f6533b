# Two commands: `make train` and `make test`. Both set up .venv first (Python 3.11+, no GPU needed).
PYTHON ?= python3
BIN := .venv/bin
# What to train on: empty for the standard library's source files, or a file or folder of text.
DATA ?=
# `make test FAST=1`: the pure part, the planner, one pass of the engine on 4 ranks, in two minutes.
FAST ?=

.PHONY: train test lint bench pictures clean

train: .venv/ready
	$(BIN)/seqmesh train recipes/stdlib.toml $(if $(DATA),--data $(DATA))

test: .venv/ready
	$(BIN)/pytest $(if $(FAST),-m fast)

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/function_length.py seqmesh tests docs tools
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/seqmesh bench

pictures: .venv/ready
	$(BIN)/python docs/pictures/make.py

# PyTorch first and pinned, so that no other package chooses a build of it.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Triton and kernels written in it apart from the other packages, for the tests that run them in its interpreter,
# on CPU (CI does).
.venv/triton: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ \
		triton==3.7.1 fla-core==0.6.0 einops==0.8.2

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
