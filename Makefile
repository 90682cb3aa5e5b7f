# The two commands: `make run` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PRESET ?= strategies/fedavg.toml

FAST   := not slow and not network and not soak

.PHONY: run test test-all soak check format bench clean

run: $(READY)            ## train FedAvg on scikit-learn's digits and write a report
	$(BIN)/fedcore run $(PRESET)

test: $(READY)           ## the fast tests
	$(BIN)/pytest -n 2 -m "$(FAST)"

test-all: $(READY)       ## every test but the soaks
	$(BIN)/pytest -n 2 -m "$(FAST)"
	$(BIN)/pytest -m "(slow or network) and not soak"

soak: $(READY)           ## the tests that take minutes to hours; not part of CI
	$(BIN)/pytest -m soak

check: $(READY)          ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)          ## every engine against Flower's simulation, pfl-research and plain loops; layers of factors; a round with devices
	$(BIN)/python -m benchmarks.engines
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.deployment

# torch first: where there is no NVIDIA GPU, its CPU build (0.2 GB) instead of the one
# with CUDA (3 GB and more). Where PyTorch's own index is out of reach, the usual one.
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
CPU    := https://download.pytorch.org/whl/cpu
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"found Python {v.major}.{v.minor}, fedcore needs 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null 2>&1 \
	  || $(PIP) --retries 0 --timeout 10 --index-url $(CPU) --no-deps $(TORCH) 2>/dev/null \
	  || echo "$(CPU) is out of reach: torch comes from the usual index"
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-pfl runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
