PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart seeds test docs faults bench gpu quality clean

quickstart: $(READY)
	$(BIN)/pm-llm quickstart $(ARGS)

# one thread a worker: two cores, two workers
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# that what the quickstart tells holds over five seeds
seeds: $(READY)
	OMP_NUM_THREADS=1 PM_LLM_SEEDS=5 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_quickstart.py -k forgetting $(ARGS)

# the site, in site/
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# 40 kills a family at instants drawn at random (make test draws 4)
faults: $(READY)
	OMP_NUM_THREADS=1 PM_LLM_KILLS=$(or $(KILLS),40) $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults $(ARGS)

bench: $(READY)
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/fisher.py
	$(BIN)/python benchmarks/fold.py
	$(BIN)/python benchmarks/past_sum.py
	$(BIN)/python benchmarks/directions.py
	$(BIN)/python benchmarks/costs.py --shapes 7b
	$(BIN)/python benchmarks/many_tasks.py --tasks 20 --modules 8
	$(BIN)/python benchmarks/coefficient.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/curvature_memory.py
	$(BIN)/python benchmarks/methods.py --out runs/methods
	$(BIN)/python benchmarks/flatness.py runs/methods/pm-given-0

# everything that only an accelerator can show (a rehearsal: ARGS="--device cpu --tiny")
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py --out runs/gpu $(ARGS)

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs/quickstart build dist site *.egg-info
