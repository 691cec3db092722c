# Everything that one does in this repository; `make` alone lists it. Each command works in a fresh clone:
# it first makes what it needs (Debian packages, .venv, build/).
#
#   PYTHON    the Python to build with (python3); its torch is used where it has one of 2.11 or newer
#   TORCH     the torch to install with pip instead, as torch==2.14.1; for a .venv that does not exist yet
#   SKIP_APT  1: leave Debian's packages alone
#   JOBS      how many tests run at a time (the number of processors, at most 8)
#   ARGS      for `make bench`, `make bench-gpu`, `make coverage`, `make lock`, `make mutants`, `make soak` and `make study`:
#             their options; --help lists them
#   FUZZ_SECONDS  for `make fuzz`: how long each reader is tried (60)
#   SOAK_MINUTES  for `make soak`: how long each of its two parts takes (60)
#   RUN       for `make report`: the folder of a run of the trainer
#   GPU_ARCHITECTURES  for `make gpu` and its like: compute capabilities to compile for (native: this machine's)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
TORCH ?=
JOBS ?= $(shell processors=$$(nproc); echo $$((processors < 8 ? processors : 8)))

SYSTEM_PACKAGES := cmake g++ ninja-build ccache zlib1g-dev libjpeg62-turbo-dev libpng-dev libcli11-dev libxxhash-dev \
  nlohmann-json3-dev libgtest-dev qemu-user g++-aarch64-linux-gnu iproute2 dataset-fashion-mnist

# clang's libFuzzer; the kernels need clang 16 or newer.
FUZZ_PACKAGES := clang-16 libclang-rt-16-dev
FUZZ_CXX := clang++-16
FUZZ_READERS := idx cifar10 jpeg png safetensors toml
FUZZ_SECONDS ?= 60
SOAK_MINUTES ?= 60

VENV_BIN := .venv/bin
PIP_INSTALL := $(VENV_BIN)/python -m pip install -qq
# Files of requirements/ have the version and the hashes of every package, also of those that others need.
LOCKED := --require-hashes --no-deps
UV := uv==0.13.9
LIBRARY := build/lib/libmomentum_bn.so
TRAINER := build/bin/m2teacher
TRAINER_LIBRARY := build/lib/libm2teacher.so
PACKAGE_FILES = pyproject.toml $(shell find include python -type f -not -name '*.pyc')
CPP_FILES = $(shell find apps include src tests -name '*.h' -o -name '*.cpp')
# Those that include the CUDA runtime's headers are left out: they are not on every machine.
TIDY_FILES = $(shell find apps src -name '*.cpp' -not -path 'src/ops/cuda/counters.cpp' -not -path 'src/ops/cuda/driver.cpp' \
  -not -path 'src/ops/cuda/runtime.cpp')

# The same compiler by the same name, and the same CMake, for CMake and pip: nothing is compiled twice.
export CXX
# Looked up for each command, as the first ones install it.
ifndef CMAKE_CXX_COMPILER_LAUNCHER
export CMAKE_CXX_COMPILER_LAUNCHER = $(shell command -v ccache)
endif

export CMAKE_EXECUTABLE = $(shell command -v cmake)

# One line per step is for terminals, where ninja writes each over the last.
BUILD := cmake --build --preset release
BUILD_QUIETLY := $(if $(MAKE_TERMOUT),,-- --quiet)

CTEST := ctest --preset release -j $(JOBS)
# Threads of torch that wait do not keep a processor from the tests beside them.
PYTEST := OMP_WAIT_POLICY=passive $(VENV_BIN)/python -m pytest
# By files, as fixtures of a file are costly; in their order, as those of packaging take longest.
QUICK_TESTS := -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not sweep'
STARTED := $(shell date +%s)
MINUTES = $$((($$(date +%s) - $(STARTED) + 30) / 60)) minutes

# Of the GPU commands, which install nothing and use PYTHON as it is.
GPU_ARCHITECTURES ?= native
GPU_CHECK = PYTHON="$(PYTHON)" GPU_ARCHITECTURES='$(GPU_ARCHITECTURES)' BENCH_ARGS='$(or $(ARGS),--quick)' scripts/gpu_check.sh

.PHONY: help setup demo report study test test-all kernels-test trainer-test sanitize fuzz mutants coverage soak bench gpu bench-gpu \
  sanitize-gpu lint lint-quick wheel lock clean build-tests quick-tests system-packages same-torch FORCE

help: ## list these commands, with how long each takes on two processors
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: .venv/.package $(TRAINER) ## install what is missing, build, make the package importable in .venv (5 minutes)

demo: setup ## train a teacher on Fashion-MNIST and report on it in runs/demo (some 10 minutes)
	@OUT=runs/demo BIN=$(TRAINER) PYTHON=$(VENV_BIN)/python bash apps/m2teacher/demo.sh

report: setup ## draw RUN/report.png of a run of the trainer (RUN=runs/demo; 10 seconds)
	@$(if $(RUN),,echo "make report RUN=FOLDER: which run?" >&2; exit 2;) \
	  BIN=$(TRAINER) PYTHON=$(VENV_BIN)/python bash apps/m2teacher/report.sh "$(RUN)"

study: setup ## momentum, plain BatchNorm and EMAN in the teacher, 18 trainings into runs/study (some 60 minutes)
	@BIN=$(TRAINER) OMP_NUM_THREADS=1 $(VENV_BIN)/python apps/m2teacher/study.py runs/study $(ARGS)

test: quick-tests ## run the tests, C++ and Python, but for the sweeps (16 minutes in a fresh clone)
	@echo "-- $(MINUTES). Left to make test-all: C++ tests under sanitizers; $$(grep -rhoP --include='*.py' \
	  'mark\.sweep\("\K[^"]+' tests | sort -u | paste -sd ';' | sed 's/;/; /g')"

test-all: quick-tests ## run everything: the tests, the sweeps, the C++ tests under sanitizers (60 minutes)
	@$(PYTEST) -m sweep
	@$(MAKE) --no-print-directory sanitize
	@echo "-- everything passed, in $(MINUTES)"

kernels-test: build/build.ninja ## after a change of a CPU kernel: build the kernels, run their tests (1 minute)
	@$(BUILD) --target kernels_test $(BUILD_QUIETLY)
	@seq 0 $$(($(JOBS) - 1)) | GTEST_TOTAL_SHARDS=$(JOBS) \
	  xargs -P $(JOBS) -I {} env GTEST_SHARD_INDEX={} build/bin/kernels_test --gtest_brief=1

trainer-test: build/build.ninja ## after a change of the trainer: build it, run its C++ tests (1 minute)
	@$(BUILD) --target m2teacher m2teacher_test $(BUILD_QUIETLY)
	@build/bin/m2teacher_test --gtest_brief=1

sanitize: .venv/.torch ## run the C++ tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (15 minutes)
	@for preset in asan tsan; do \
	  cmake --preset $$preset -DPython_EXECUTABLE="$$PWD/$(VENV_BIN)/python" >/dev/null; \
	  cmake --build --preset $$preset $(BUILD_QUIETLY); \
	  ctest --preset $$preset -j $(JOBS); \
	done

fuzz: setup ## give each reader of the trainer files that a fuzzer makes up, under sanitizers (6 minutes, and 15 to build)
	@scripts/install_system_packages.sh $(FUZZ_PACKAGES)
	@CXX=$(FUZZ_CXX) cmake --preset fuzz -DPython_EXECUTABLE="$$PWD/$(VENV_BIN)/python" >/dev/null
	@cmake --build --preset fuzz $(BUILD_QUIETLY)
	@$(VENV_BIN)/python tests/fuzz/make_seeds.py build-fuzz/seeds
	@# torch is not compiled so, and its containers are not annotated.
	@for reader in $(FUZZ_READERS); do \
	  mkdir -p build-fuzz/corpus/$$reader build-fuzz/found/$$reader; \
	  echo "-- $$reader, $(FUZZ_SECONDS) s"; \
	  ASAN_OPTIONS=detect_container_overflow=0 READER=$$reader build-fuzz/bin/fuzz_readers -max_len=65536 -timeout=60 \
	    -malloc_limit_mb=256 -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 \
	    -artifact_prefix=build-fuzz/found/$$reader/ build-fuzz/corpus/$$reader build-fuzz/seeds/$$reader \
	    >build-fuzz/$$reader.txt 2>&1 || { tail -40 build-fuzz/$$reader.txt >&2; exit 1; }; \
	  grep -E '^stat::(number_of_executed_units|average_exec_per_sec)' build-fuzz/$$reader.txt; \
	done

mutants: build-tests ## plant 40 faults one at a time and see that the tests named for them fail (1 hour)
	@$(VENV_BIN)/python -m tests.mutants $(ARGS)

# Tests that read figures of processes (how many calls, how much memory) see those of the counters, too: they may fail here.
coverage: setup .venv/.coverage ## which lines the tests run through, C++ and Python, by folder (25 minutes; ARGS=--lines: which not)
	@cmake --preset coverage -DPython_EXECUTABLE="$$PWD/$(VENV_BIN)/python" >/dev/null
	@cmake --build --preset coverage $(BUILD_QUIETLY)
	@find build-coverage -name '*.gcda' -delete -o -name 'python.*' -delete
	@ctest --preset coverage -j $(JOBS) || echo "-- failed tests: see above"
	@# Tests work in folders of their own.
	@built="$$PWD/build-coverage"; COVERAGE_FILE="$$built/python.coverage" MOMENTUM_BN_BUILD_DIR="$$built" \
	  MOMENTUM_BN_LIBRARY="$$built/lib/libmomentum_bn.so" M2TEACHER="$$built/bin/m2teacher" OMP_WAIT_POLICY=passive \
	  $(VENV_BIN)/python -m coverage run --source="$$PWD/apps,$$PWD/python" -m pytest $(QUICK_TESTS) tests/python || echo "-- failed tests: see above"
	@$(VENV_BIN)/python -m coverage combine --quiet --data-file=build-coverage/python.coverage build-coverage
	@$(VENV_BIN)/python -m tests.coverage build-coverage $(ARGS)

soak: setup ## kill and stop the trainer, call layers from several threads, for long (2 hours; SOAK_MINUTES=20: 40 minutes)
	@OMP_WAIT_POLICY=passive $(VENV_BIN)/python -m tests.soak --minutes $(SOAK_MINUTES) $(ARGS)

bench: setup ## time the layer beside its peers, into runs/benchmarks (some 12 minutes; ARGS=--quick: 2)
	@$(VENV_BIN)/python -m benchmarks $(ARGS)

gpu: ## on a machine with a GPU: build, run the tests on it, time it; results in runs/gpu (at most 8 minutes)
	@$(GPU_CHECK) all

bench-gpu: ## time the layer beside its peers on a GPU, into runs/gpu (at most 4 minutes)
	@$(GPU_CHECK) bench

sanitize-gpu: ## run some tests on a GPU under compute-sanitizer's memcheck and racecheck (some 15 minutes, not measured)
	@$(GPU_CHECK) sanitize

lint: lint-quick setup ## check style, types and common mistakes, in both languages (20 minutes)
	@# A configuration of its own: with several sources compiled together, none has a command of its own.
	@cmake --preset release -B build/lint -DMOMENTUM_BN_UNITY_BUILD=OFF -DPython_EXECUTABLE="$$PWD/$(VENV_BIN)/python" >/dev/null
	@printf '%s\n' $(TIDY_FILES) | xargs -P "$$(nproc)" -n 1 $(VENV_BIN)/clang-tidy --quiet -p build/lint --extra-arg=-fno-openmp

lint-quick: .venv/.lint ## the same without clang-tidy, and without a build (15 seconds)
	@$(VENV_BIN)/ruff check .
	@$(VENV_BIN)/ruff format --check .
	@$(VENV_BIN)/mypy
	@$(VENV_BIN)/clang-format --dry-run -Werror $(CPP_FILES)

wheel: system-packages ## one wheel for torch 2.11 to 2.14, CPU and GPU, in dist/ (some 40 minutes, then 3 by ccache; 6 GB)
	@"$(PYTHON)" -m venv build-wheel/venv
	@build-wheel/venv/bin/python -m pip install -qq $(LOCKED) -r requirements/wheel.txt
	@build-wheel/venv/bin/python scripts/build_wheel.py build-wheel dist

lock: .venv/.torch ## after a change of pyproject.toml: write requirements/ anew (ARGS=--upgrade: with newest versions; 1 minute)
	@$(PIP_INSTALL) $(UV)
	@lock() { \
	  $(VENV_BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes $(ARGS) pyproject.toml \
	    --excludes requirements/excluded.txt --custom-compile-command 'make lock' --output-file requirements/$$1.txt "$${@:2}"; \
	}; \
	beside_tests=(--constraints requirements/test.txt); \
	lock test --extra bench --extra demo --extra test --group setup; \
	lock coverage --extra coverage "$${beside_tests[@]}"; \
	lock lint --extra lint "$${beside_tests[@]}"; \
	lock wheel --extra wheel "$${beside_tests[@]}"; \
	lock lightly --group lightly --excludes requirements/test.txt

clean: ## remove .venv, build folders and caches (keeps runs/)
	@rm -rf .venv build build-debug build-asan build-tsan build-coverage build-fuzz build-gpu build-wheel dist .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

system-packages:
	@scripts/install_system_packages.sh $(SYSTEM_PACKAGES) $$("$(PYTHON)" -c 'import ensurepip' 2>/dev/null || echo python3-venv)

# A .venv that is there keeps its torch.
same-torch:
	@if [[ -n '$(TORCH)' && -e .venv/.torch && "$$(<.venv/.torch)" != '$(TORCH)' ]]; then \
	  echo "error: .venv was made with $$(<.venv/.torch), not with TORCH=$(TORCH): make clean first" >&2; exit 2; fi

.venv/.torch: scripts/create_venv.py | system-packages same-torch
	@"$(PYTHON)" scripts/create_venv.py .venv $(if $(TORCH),'$(TORCH)')
	@echo '$(or $(TORCH),the default torch)' >$@

build-tests: setup
	@echo "-- building the tests"
	@$(BUILD) $(BUILD_QUIETLY)

quick-tests: build-tests
	@$(CTEST)
	@$(PYTEST) $(QUICK_TESTS)

build/build.ninja: CMakePresets.json .venv/.torch
	@echo "-- configuring build/"
	@mkdir -p build
	@cmake --fresh --preset release -DPython_EXECUTABLE="$$PWD/$(VENV_BIN)/python" >build/configure.log 2>&1 \
	  || { cat build/configure.log >&2; exit 1; }
	@touch $@

# ninja knows what is out of date; the files' times then tell make.
$(LIBRARY) $(TRAINER) $(TRAINER_LIBRARY) &: build/build.ninja FORCE
	@echo "-- building the library and the trainer in build/"
	@$(BUILD) --target momentum_bn m2teacher m2teacher_python $(BUILD_QUIETLY)

# The package takes the libraries that build/ holds: nothing is compiled twice.
.venv/.package: .venv/.requirements $(LIBRARY) $(TRAINER_LIBRARY) $(PACKAGE_FILES)
	@echo "-- installing the Python package into .venv"
	@MOMENTUM_BN_TRAINER=1 $(PIP_INSTALL) --no-build-isolation --no-deps -C build-dir=build \
	  -C cmake.define.MOMENTUM_BN_BUILD_TESTS=ON -e .
	@touch $@

# Where a torch of the index is named, its torchvision is there, and the examples that need one are tested, too.
.venv/.requirements: requirements/test.txt requirements/lightly.txt .venv/.torch
	@echo "-- installing what tests and benchmarks need into .venv"
	@$(PIP_INSTALL) $(LOCKED) -r requirements/test.txt $(if $(TORCH),-r requirements/lightly.txt)
	@$(if $(TORCH),$(PIP_INSTALL) '$(TORCH)' torchvision)
	@touch $@

.venv/.lint: requirements/lint.txt .venv/.torch
	@echo "-- installing linters into .venv"
	@$(PIP_INSTALL) $(LOCKED) -r requirements/lint.txt
	@touch $@

.venv/.coverage: requirements/coverage.txt .venv/.torch
	@$(PIP_INSTALL) $(LOCKED) -r requirements/coverage.txt
	@touch $@

FORCE:
