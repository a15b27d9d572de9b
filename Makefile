# Everything runs in .venv, which each target brings up to what it needs; what needs a GPU runs in GPU_PYTHON as it is.
PYTHON ?= python3
# What the suite is run against; the package itself sets lower bounds only.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
TRANSFORMERS ?= transformers==5.24.0
TIMM ?= timm==1.0.31
# Other versions that `make test-full` runs, each in a folder of its own laid over .venv.
OTHER_TRITONS ?= 3.6.0 3.9.0
# Others whose compiled kernels `make verify-compiled` executes.
VERIFIED_TRITONS ?= 3.6.0 3.7.0 3.8.0 3.9.0
VERIFY_JOBS ?= 2
OTHER_TRANSFORMERS ?= 4.57.6
# What `make test-torch-VERSION` adds to torch, and the torch and the interpreter of `make test-python-VERSION`.
TORCHVISION_2.14.1 ?= torchvision==0.29.1
OTHER_PYTHON_TORCH ?= torch==2.14.1
OTHER_PYTHON ?= python$*

# Where there is a GPU: a Python that has torch with CUDA, Triton, pytest and Hypothesis already.
GPU_PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml setup.py Makefile
NATIVE := $(VENV)/.native
NATIVE_SOURCES := setup.py beit_fast/native.py $(shell find csrc -type f -not -name '*.pyc')

IMAGE ?=
MODEL ?=
OUT ?= demo.png
BENCH_OPTIONS ?=

.PHONY: demo test test-fallback test-full test-transformers-suite test-dalle
.PHONY: sanitize verify-compiled verify-compiled-quick count-kernels bench lint docs notebooks wheel format clean
.PHONY: gpu gpu-library gpu-selftest gpu-tune gpu-test gpu-test-kernels gpu-test-device
.PHONY: gpu-bench gpu-bench-models gpu-bench-parts

# The main job: BEiT on a photograph under three attention backends.
demo: $(VENV)/.demo $(NATIVE)
	$(BIN)/python examples/demo.py --out "$(OUT)" $(if $(IMAGE),--image "$(IMAGE)") $(if $(MODEL),--model "$(MODEL)")

define newline


endef

# Two processes at a time, each on one thread; what one of them prints is held back until it ends.
SIDE_BY_SIDE := $(MAKE) --jobs=2 --output-sync=target --no-print-directory

# The suite runs as separate processes, because Triton's interpreter and its compiler cannot share one. The parts take
# about equal time, so that both cores are busy to the end; `make test-part-models` runs one of them.
PARTS := interpreted-long interpreted models compilers integrations package commands
SLOW_PARTS := $(PARTS)
INTERPRETED_LONG := $(addprefix tests/kernels/test_,bias_layouts.py drawn_cases.py launcher.py layouts.py)
MODELS_ELSEWHERE := tests/models/test_model_export.py tests/models/test_scale_out.py
# Outside tests/kernels, but run in Triton's interpreter.
INTERPRETED_ELSEWHERE := tests/tuning/test_tune.py tests/benchmarks/test_bench_attention_parts.py
PART_interpreted-long := $(INTERPRETED_LONG)
PART_interpreted := tests/kernels $(INTERPRETED_ELSEWHERE) $(INTERPRETED_LONG:%=--ignore=%)
PART_models := tests/models $(MODELS_ELSEWHERE:%=--ignore=%)
PART_compilers := tests/aot tests/csrc tests/docs tests/packaging
PART_integrations := tests/integrations
PART_commands := tests/benchmarks tests/cli tests/examples tests/testing $(MODELS_ELSEWHERE)
PART_package := tests $(patsubst %,--ignore=%,$(filter tests/%,$(PART_compilers) $(PART_integrations) $(PART_commands) $(INTERPRETED_ELSEWHERE)) tests/models)

test: $(VENV)/.test $(NATIVE)
	$(SIDE_BY_SIDE) $(PARTS:%=test-part-%) test-fallback

test-part-interpreted-long test-part-interpreted test-slow-interpreted-long test-slow-interpreted: export TRITON_INTERPRET := 1
test-part-%:
	$(BIN)/pytest -m "not slow" $(PART_$*)

# The operators again, as in an installation without the native library.
test-fallback:
	BEIT_FAST_NATIVE=0 $(BIN)/pytest -m "not slow" \
	  $(addprefix tests/ops/test_,attention.py attention_dispatch.py ops.py operator_inputs.py patch_embed.py patch_embed_inputs.py)

# The long tests, and other versions of Triton and Transformers.
test-full: $(OTHER_TRITONS:%=.venvs/triton-%/.done) $(OTHER_TRANSFORMERS:%=.venvs/transformers-%/.done)
test-full: $(VENV)/.test $(NATIVE)
	$(SIDE_BY_SIDE) $(SLOW_PARTS:%=test-slow-%) sanitize \
	  $(OTHER_TRITONS:%=test-triton-%) $(OTHER_TRANSFORMERS:%=test-transformers-%)

# A part without slow tests is not an error.
test-slow-%:
	$(BIN)/pytest -m slow $(PART_$*) || test $$? -eq 5

# Another Triton: what its compiler or interpreter can break. Each kernel is compiled for one GPU of each class of tiles
# (sm_120 represents sm_86 and sm_89), and each branch of a kernel interpreted. Left out: strides, requested gradients and
# NaN of attention, which Triton does not decide, and loops whose instructions are counted with TRITON alone.
TRITON_COMPILED := not (86 or 89 or attention_main_loop)
TRITON_INTERPRETED := bias.py bias_layouts.py linear_gelu.py parity.py residual_norm.py
test-triton-%: .venvs/triton-%/.done
	PYTHONPATH=$(CURDIR)/.venvs/triton-$* $(BIN)/pytest -m "not slow" tests/aot -k "$(TRITON_COMPILED)"
	PYTHONPATH=$(CURDIR)/.venvs/triton-$* TRITON_INTERPRET=1 $(BIN)/pytest -m "not slow" -k "not strided" \
	  $(addprefix tests/kernels/test_,$(TRITON_INTERPRETED))

test-transformers-%: .venvs/transformers-%/.done
	PYTHONPATH=$(CURDIR)/.venvs/transformers-$* $(BIN)/pytest tests/versions

# Transformers' tests of BEiT with this package's classes in the place of its own. Its sdist lacks the model tests: they are
# TRANSFORMERS_TESTS=FILE, or fetched from its repository. SUITE_OPTIONS=--baseline runs Transformers' own classes.
SUITE := .venvs/transformers-suite
SUITE_TAG = $(patsubst transformers==%,v%,$(TRANSFORMERS))
SUITE_URL = https://raw.githubusercontent.com/huggingface/transformers/$(SUITE_TAG)/tests/models/beit/test_modeling_beit.py
TRANSFORMERS_TESTS ?= $(SUITE)/model_tests.py
test-transformers-suite: $(VENV)/.test $(NATIVE) $(SUITE)/.done $(TRANSFORMERS_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.integrations.transformers_suite $(SUITE) "$(TRANSFORMERS_TESTS)" $(SUITE_OPTIONS)

$(SUITE)/model_tests.py: $(SUITE)/.done
	curl --fail --silent --show-error --location --output $@ $(SUITE_URL)

$(SUITE)/.done: Makefile
	rm -rf $(@D)
	$(PIP) download --no-deps --no-build-isolation --no-binary transformers --dest $(@D) "$(TRANSFORMERS)"
	tar --extract --file $(@D)/transformers-*.tar.gz --directory $(@D) --strip-components 1
	$(PIP) install --no-deps --target $(@D)/packages parameterized
	touch $@

# DALL-E's encoder as the package dall_e saves it. The package also requires mypy and torchvision, which it does not import.
DALLE ?= dall_e==0.1
test-dalle: $(VENV)/.test .venvs/dalle/.done
	PYTHONPATH=$(CURDIR)/.venvs/dalle $(BIN)/pytest tests/training/tokenizers/test_dalle_package.py

.venvs/dalle/.done: Makefile
	rm -rf $(@D)
	$(PIP) install --target $(@D) attrs requests
	$(PIP) install --no-deps --target $(@D) "$(DALLE)"
	touch $@

# Another torch, with its own Triton and torchvision, or another Python: each in an environment of its own (5.6 GB), and
# outside .ci/run. docs/installation.md records the last results. Another torch compiles the native library; another Python
# takes the library of the checkout, as from a wheel.
OTHER_TORCH_TESTS := $(addprefix tests/,checkpoint configuration image_processing inference integrations layers models \
  ops packaging training utils test_native.py test_position_bias.py test_variables.py)
OTHER_PYTHON_TESTS := $(addprefix tests/,ops packaging utils test_native.py test_position_bias.py test_variables.py)
test-torch-%: .venvs/torch-%/.done
	$(call COPY_CHECKOUT,torch-$*)
	cd build/copies/torch-$* && BEIT_FAST_NATIVE=1 $(CURDIR)/.venvs/torch-$*/bin/python setup.py --quiet build_ext --inplace
	.venvs/torch-$*/bin/python -c 'import torchvision.models.feature_extraction'
	cd build/copies/torch-$* && $(CURDIR)/.venvs/torch-$*/bin/pytest -m "not slow" $(OTHER_TORCH_TESTS)

test-python-%: .venvs/python-%/.done $(NATIVE)
	$(call COPY_CHECKOUT,python-$*)
	cp beit_fast/_C*.so beit_fast/native_build.json build/copies/python-$*/beit_fast
	cd build/copies/python-$* && $(CURDIR)/.venvs/python-$*/bin/pytest -m "not slow" $(OTHER_PYTHON_TESTS)

# Copy what git does not ignore, with the objects of the last build: the library of the checkout stays as it is.
define COPY_CHECKOUT
mkdir -p build/copies/$(1)
find build/copies/$(1) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - --ignore-failed-read | tar -xC build/copies/$(1)
endef

# Execute the PTX of every kernel on the CPU, in every shipped tile and layout, for every architecture and Triton. Hours:
# each case is written as it ends, and the same command resumes. A case that fails does not stop the others.
VERIFY := OMP_NUM_THREADS=1 $(BIN)/python -m beit_fast.kernels.aot.verify
verify-compiled: $(VENV)/.test $(VERIFIED_TRITONS:%=.venvs/triton-%/.done)
	-TRITON_CACHE_DIR=build/verify/pinned $(VERIFY) --jobs=$(VERIFY_JOBS)
	$(foreach version,$(VERIFIED_TRITONS),-PYTHONPATH=$(CURDIR)/.venvs/triton-$(version) \
	  TRITON_CACHE_DIR=build/verify/$(version) $(VERIFY) --jobs=$(VERIFY_JOBS)$(newline))
	$(VERIFY) --summary $(patsubst triton==%,%,$(TRITON)) $(VERIFIED_TRITONS)

# One case of each kernel and bias layout for each architecture, with the pinned Triton alone.
verify-compiled-quick: $(VENV)/.test
	TRITON_CACHE_DIR=build/verify/pinned $(VERIFY) --quick --jobs=$(VERIFY_JOBS)

# Count what each kernel does on each architecture, in the executor and in machine code, with the pinned Triton: minutes.
count-kernels: $(VENV)/.test
	OMP_NUM_THREADS=1 TRITON_CACHE_DIR=build/verify/pinned $(BIN)/python -m beit_fast.kernels.aot.counts \
	  --commit "$$(git rev-parse --short HEAD)"

# Test the operators with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package. Preload both
# libraries, or exceptions are not intercepted. Leak detection is off: Python and torch do not free everything at exit.
SANITIZED := build/sanitize
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1
sanitize: export PYTHONPATH := $(CURDIR)/$(SANITIZED)
sanitize: PRELOAD = $(foreach library,asan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))
sanitize: SANITIZED_RUN = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(PRELOAD)"
sanitize: $(VENV)/.test
	BEIT_FAST_NATIVE=1 CXXFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)
	$(SANITIZED_RUN) $(BIN)/python -P -c \
	  'from beit_fast import native; assert native.is_loaded("_C") and "$(SANITIZED)" in native.__file__'
	$(SANITIZED_RUN) $(BIN)/pytest -p no:cacheprovider -m "not slow" \
	  $(addprefix tests/ops/test_,attention.py ops.py operator_inputs.py patch_embed.py patch_embed_inputs.py \
	  cpu_attention.py split_bf16.py split_bf16_errors.py)

# What needs a CUDA device, the most telling results first, each written to RESULTS (default: build) as it comes. Every
# stage has a limit in seconds, and the next one runs whatever a stage finds: 12 minutes together, compilation included.
# Of these, 30 seconds are for wheels, and 5 for the start of each stage or the time until it is killed.
# Nothing is downloaded; the libraries are built in place. TRITON_WHEELS=FOLDER takes Triton from wheels in a folder.
GPU_STAGES := library:90 selftest:120 bench-parts:55 bench:100 tune:65 test:140 bench-models:85
GPU_STAGE_BUDGET := 65
GPU_RESULTS = $(or $(RESULTS),build)
TRITON_WHEELS ?=
GPU_TRITON := build/gpu-triton
# The stamp is named after the wheels, so that another folder, or another wheel in it, is installed again.
ifneq ($(TRITON_WHEELS),)
GPU_WHEELS := $(shell cd "$(TRITON_WHEELS)" 2>&- && stat -c '%n %s %Y' "$$PWD"/triton-*.whl 2>&-)
$(if $(GPU_WHEELS),,$(error TRITON_WHEELS=$(TRITON_WHEELS) has no wheel of Triton (expected a folder with triton-*.whl)))
GPU_NEEDS := $(GPU_TRITON)/.done-$(firstword $(shell echo '$(GPU_WHEELS)' | cksum))
endif
GPU_PATH := $(if $(TRITON_WHEELS),$(CURDIR)/$(GPU_TRITON):)$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

gpu: $(GPU_NEEDS)
	status=0; for stage in $(GPU_STAGES); do \
	  timeout --kill-after=5 $${stage#*:} $(MAKE) --no-print-directory GPU_BUDGET=$(GPU_STAGE_BUDGET) gpu-$${stage%:*} \
	    || { echo "gpu-$${stage%:*} failed, or took longer than $${stage#*:} seconds"; status=1; }; \
	done; exit $$status

$(GPU_TRITON)/.done-%:
	rm -rf $(@D)
	$(GPU_PYTHON) -m pip install --no-deps --no-index --find-links "$(TRITON_WHEELS)" --target $(@D) triton
	touch $@

gpu-library gpu-selftest gpu-tune gpu-test-kernels gpu-test-device: export PYTHONPATH := $(GPU_PATH)
gpu-bench gpu-bench-models gpu-bench-parts: export PYTHONPATH := $(GPU_PATH)
# Tests and benchmarks run the shipped tiles; the cache of the user is left alone.
gpu-selftest gpu-test-kernels gpu-test-device gpu-bench gpu-bench-models gpu-bench-parts: export BEIT_FAST_TUNED := 0
gpu-tune: export XDG_CACHE_HOME := $(CURDIR)/build/gpu-cache

gpu-library: $(GPU_NEEDS)
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-selftest: $(GPU_NEEDS)
	$(GPU_PYTHON) -m beit_fast selftest --device cuda --include-refused --rows "$(GPU_RESULTS)/$@.jsonl"

gpu-tune: $(GPU_NEEDS)
	$(GPU_PYTHON) -m beit_fast tune --image-size 384 --batch 16 --budget 45 --rows "$(GPU_RESULTS)/$@.jsonl"

# dK/dV, dQ and dBias apart, with and without the bias.
gpu-bench-parts: $(GPU_NEEDS)
	$(GPU_PYTHON) -m pytest benchmarks/bench_attention_parts.py --device=cuda --rows="$(GPU_RESULTS)/$@.jsonl" \
	  $(if $(COMMIT),--commit="$(COMMIT)")

# The kernels against the oracle, and what only a device has: streams, graphs, memory, compute-sanitizer. Side by side,
# because most of the time goes into compiling kernels, on one core each.
gpu-test: gpu-library
	$(SIDE_BY_SIDE) gpu-test-kernels gpu-test-device

gpu-test-kernels: GPU_TESTS := tests/kernels
gpu-test-device: GPU_TESTS := tests/gpu
gpu-test-kernels gpu-test-device: $(GPU_NEEDS)
	$(GPU_PYTHON) -m pytest -p no:cacheprovider -m "not slow" --outcomes="$(GPU_RESULTS)/$@.jsonl" $(GPU_TESTS)

# Compare with every baseline, which all have to be installed, and write benchmarks/results/. BENCH_OPTIONS=--full runs
# every size.
bench: $(VENV)/.bench $(NATIVE)
	$(BIN)/pytest benchmarks/ --require-baselines $(BENCH_OPTIONS) --rows=build/benchmarks.jsonl
	$(BIN)/python -m benchmarks.report.plot build/benchmarks.jsonl --results benchmarks/results
	$(BIN)/python -m benchmarks.report.targets build/benchmarks.jsonl

# Compare attention, or whole models, on a GPU. GPU_PYTHON has torch for CUDA, Triton, pytest-benchmark, transformers,
# matplotlib and optionally timm; nothing is installed or downloaded. RESULTS=FOLDER gets a copy of the results and the
# log of rows. COMMIT=... is recorded if this folder is not a checkout.
GPU_BUDGET ?= 200
gpu-bench: GPU_BENCH := attention
gpu-bench-models: GPU_BENCH := model
gpu-bench gpu-bench-models: GPU_ROWS = $(GPU_RESULTS)/$@.jsonl
gpu-bench gpu-bench-models: gpu-library
	rm -f "$(GPU_ROWS)"
	$(GPU_PYTHON) -m pytest benchmarks/bench_$(GPU_BENCH).py --device=cuda --rows="$(GPU_ROWS)" --budget=$(GPU_BUDGET) \
	  $(if $(COMMIT),--commit="$(COMMIT)") $(BENCH_OPTIONS); status=$$?; \
	$(GPU_PYTHON) -m benchmarks.report.plot "$(GPU_ROWS)" --results benchmarks/results && \
	$(if $(RESULTS),$(GPU_PYTHON) -m benchmarks.report.plot "$(GPU_ROWS)" --results "$(RESULTS)" &&) \
	$(GPU_PYTHON) -m benchmarks.report.targets "$(GPU_ROWS)" && exit $$status

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p beit_fast
	$(BIN)/lint-imports --no-cache

# The wheel to upload, with the native libraries, under the oldest manylinux tag that auditwheel finds for it; torch's
# libraries stay outside.
wheel: $(VENV)/.base .venvs/wheel/.done
	rm -rf build/wheel dist/*.whl
	BEIT_FAST_NATIVE=1 $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/.venvs/wheel/bin:$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --wheel-dir dist build/wheel/*.whl
	.venvs/wheel/bin/auditwheel show dist/*.whl
	.venvs/wheel/bin/twine check --strict dist/*.whl

# The site in build/site, from docs/ and the docstrings; a warning is an error.
docs: .venvs/docs/.done
	NO_MKDOCS_2_WARNING=1 $(<D)/bin/mkdocs build --quiet --strict
	@echo build/site/index.html

# Execute examples/notebooks and write their outputs back: about a minute each. Look at the pictures before a commit.
notebooks: $(VENV)/.test $(NATIVE)
	$(BIN)/python examples/notebooks/run.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venvs build dist *.egg-info demo.png beit_fast/_C*.so beit_fast/native_build.json

# The package, editable. Isolation is off: torch would be downloaded a second time into a throw-away environment.
$(VENV)/.base: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "setuptools>=77"
	$(PIP) install "$(TORCH)"
	$(PIP) install "$(TRITON)"
	$(PIP) install --no-build-isolation --editable .
	touch $@

# What changed in csrc/, into the checkout that the package is installed from.
$(NATIVE): $(VENV)/.base $(NATIVE_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# timm comes without what it depends on: that is torchvision, whose wheel breaks a CPU build of torch.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: $(VENV)/.base
	$(PIP) install --no-build-isolation --editable ".[$*]" "$(TORCH)" "$(TRITON)" $(if $(filter demo,$*),,"$(TRANSFORMERS)")
	$(if $(filter test bench,$*),$(PIP) install --no-deps "$(TIMM)")
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

.PRECIOUS: .venvs/torch-%/.done .venvs/python-%/.done
.venvs/torch-%/.done: pyproject.toml
	@test -n "$(TORCHVISION_$*)" || { echo 'TORCHVISION_$* is not set (expected torchvision==VERSION)'; exit 1; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(call INSTALL_COPY,torch-$*,"torch==$*" "$(TORCHVISION_$*)")
	$(@D)/bin/pip --disable-pip-version-check --quiet install "$(TIMM)"
	touch $@

.venvs/python-%/.done: pyproject.toml
	@$(OTHER_PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$*")' || \
	  { echo 'OTHER_PYTHON=$(OTHER_PYTHON) does not run Python $*'; exit 1; }
	test -x $(@D)/bin/python || $(OTHER_PYTHON) -m venv $(@D)
	$(call INSTALL_COPY,python-$*,"$(OTHER_PYTHON_TORCH)")
	touch $@

# Install what a copy of the checkout needs, and the copy itself, editable, without a native library.
define INSTALL_COPY
$(call COPY_CHECKOUT,$(1))
$(@D)/bin/pip --disable-pip-version-check --quiet install "setuptools>=77" $(2)
BEIT_FAST_NATIVE=0 $(@D)/bin/pip --disable-pip-version-check --quiet install --no-build-isolation \
  --editable "build/copies/$(1)[test]" $(2) "$(TRANSFORMERS)"
endef

# Tools that read files of the package and do not import it, so these environments need no torch.
.venvs/docs/.done .venvs/wheel/.done: .venvs/%/.done: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip --disable-pip-version-check --quiet install $$($(@D)/bin/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"])')
	touch $@
