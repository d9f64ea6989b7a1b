PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

BENCHMARKS := monitoring layer step zero_experts recursion head optimizers quickstart quickstart_speed \
	data dispatch context ring checkpoint planning planned_memory

.PHONY: quickstart test test-slow bench bench-gpu deepspeed lint clean

quickstart: $(VENV)/.installed  ## train a small model on the standard library and let it write
	$(BIN)/moebius train configs/quickstart.yaml
	$(BIN)/moebius generate runs/quickstart --prompt "def "

test: $(VENV)/.installed-dev  ## all tests but the slow ones
	$(PYTEST)

test-slow: $(VENV)/.installed-dev  ## quickstart in a fresh clone, every preset, every layout, killed workers
	$(PYTEST) -m slow

bench: $(VENV)/.installed-dev  ## measure on CPUs, one script after the other; results go to benchmarks/results
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-gpu: $(VENV)/.installed-dev  ## measure on a CUDA device
	$(BIN)/python benchmarks/gpu.py

lint: $(VENV)/.installed-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove the environment; prepared data and runs stay
	rm -rf $(VENV)

deepspeed: $(VENV)/.installed-dev  ## install what `parallel.engine=deepspeed` needs
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --editable '.[deepspeed]'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
