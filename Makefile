# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test slow soak fuzz bench lint clean

demo: $(READY)
	$(BIN)/dpldm demo --config configs/demo.toml

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests that take many minutes.
slow: $(READY)
	$(BIN)/python -m pytest -m soak

# 10,000 damaged and hostile inputs of every kind; prints a table (about ten minutes).
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --cases 10000

# 20,000 noisy steps, half of them in a run that is killed 200 times; prints a table.
soak: $(READY)
	$(BIN)/python -m tests.soak --json build/soak.json

# Time and memory of a private step against a plain one, other libraries, and its parts: hours on one
# core. BENCH=--quick takes under two minutes.
bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step $(BENCH)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.parts $(BENCH)

lint: $(READY)
	$(BIN)/python -m pip install --quiet "ruff>=0.9,<1"
	$(BIN)/ruff check .

$(READY): pyproject.toml dpldm_dist/privacy/native/records.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[demo,natural-images,test]"
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info dpldm_dist/privacy/native/*.so
