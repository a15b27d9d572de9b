# Everything runs in .venv, which each target brings up to what it needs.
PYTHON ?= python3
# What the suite is run against; the package itself sets lower bounds only.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
TRANSFORMERS ?= transformers==5.23.0
TIMM ?= timm==1.0.31
# Other versions that `make test-full` runs, each in a folder of its own laid over .venv.
OTHER_TRITONS ?= 3.6.0 3.9.0
OTHER_TRANSFORMERS ?= 4.57.6

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml setup.py Makefile

IMAGE ?=
MODEL ?=
OUT ?= demo.png
BENCH_OPTIONS ?=

.PHONY: demo test test-full test-other-tritons test-other-transformers bench lint format clean

# The main job: BEiT on a photograph under three attention backends.
demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out "$(OUT)" $(if $(IMAGE),--image "$(IMAGE)") $(if $(MODEL),--model "$(MODEL)")

# The suite: three kinds of process, since Triton's interpreter and its compiler cannot share one.
test: $(VENV)/.test
	$(BIN)/pytest -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/pytest -m "not slow" tests/interpreter

# The long sweeps, and other versions of what we build on.
test-full: $(VENV)/.test test-other-tritons test-other-transformers
	$(BIN)/pytest -m slow
	TRITON_INTERPRET=1 $(BIN)/pytest -m slow tests/interpreter

test-other-tritons: $(OTHER_TRITONS:%=.venvs/triton-%/.done)
	set -e; for version in $(OTHER_TRITONS); do \
	  echo "== triton $$version"; \
	  PYTHONPATH=$(CURDIR)/.venvs/triton-$$version $(BIN)/pytest -m "not slow" tests/test_kernels_aot.py; \
	  PYTHONPATH=$(CURDIR)/.venvs/triton-$$version TRITON_INTERPRET=1 $(BIN)/pytest -m "not slow" tests/interpreter; \
	done

test-other-transformers: $(OTHER_TRANSFORMERS:%=.venvs/transformers-%/.done)
	set -e; for version in $(OTHER_TRANSFORMERS); do \
	  echo "== transformers $$version"; \
	  PYTHONPATH=$(CURDIR)/.venvs/transformers-$$version $(BIN)/pytest tests/versions; \
	done

# Compares with the peers and writes benchmarks/results/; BENCH_OPTIONS=--full takes every size.
bench: $(VENV)/.bench
	mkdir -p build
	$(BIN)/pytest benchmarks/ $(BENCH_OPTIONS) --benchmark-json=build/benchmarks.json
	$(BIN)/python benchmarks/plot.py build/benchmarks.json --results benchmarks/results

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p beit_fast

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venvs build dist *.egg-info demo.png

# The package, editable. Isolation is off: torch would be downloaded a second time into a throw-away environment.
$(VENV)/.base: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "setuptools>=77"
	$(PIP) install "$(TORCH)"
	$(PIP) install "$(TRITON)"
	$(PIP) install --no-build-isolation --editable .
	touch $@

# timm comes without what it depends on: that is torchvision, whose wheel breaks a CPU build of torch.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: $(VENV)/.base
	$(PIP) install --no-build-isolation --editable ".[$*]" "$(TORCH)" "$(TRITON)" $(if $(filter demo,$*),,"$(TRANSFORMERS)")
	$(if $(filter test,$*),$(PIP) install --no-deps "$(TIMM)")
	touch $@

# The interpreter of Triton 3.6 does not run on NumPy 2.4.
.venvs/triton-%/.done:
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) "triton==$*" "numpy<2.4"
	touch $@

.venvs/transformers-%/.done:
	rm -rf $(@D)
	$(PIP) install --target $(@D) "transformers==$*"
	touch $@
