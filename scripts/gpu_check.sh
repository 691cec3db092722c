#!/usr/bin/env bash
# Tests and times the library on a machine with a GPU, in at most four minutes each, the build included.
#
#   scripts/gpu_check.sh [tests|bench|all|sanitize] [FOLDER]
#
# tests: the Python tests that have a GPU's part, and three steps of the trainer. bench: the layer beside its peers.
# all (the default): both. sanitize: some of the tests under compute-sanitizer, which takes longer.
# Results are written into FOLDER (runs/gpu) while they come: what cuts this short leaves what was found so far. At the
# end there is a table of goals, goals.txt. It exits with 1 where something failed, not where a speed was missed.
#
# It needs bash, cmake, ninja, g++ and nvcc, and a Python with a CUDA build of torch, pytest and what the tests import.
# It installs nothing. From the environment:
#   PYTHON             that Python (python3)
#   GPU_ARCHITECTURES  compute capabilities to compile for (native: this machine's)
#   BENCH_ARGS         options of the benchmark (--quick); python -m benchmarks.gpu --help lists them
#   SECONDS_EACH       after which tests and benchmark stop, the build included (240)
set -euo pipefail

readonly LIMIT=${SECONDS_EACH:-240}
readonly AT_ONCE=4 # files of tests on the GPU at the same time
# What is new on a GPU comes first: time may run out.
readonly TESTS=(cuda cuda_operators accuracy batch_norm autograd state teacher layouts mixed_dtypes inplace differential
  errors func functional modules ops convert checkpointing)
readonly SANITIZED=(test_cuda.py::test_results_are_those_of_the_cpu
  test_cuda_operators.py::test_each_path_against_float64
  test_cuda_operators.py::test_mask_made_from_x_has_the_bits_of_the_mask_from_y
  test_cuda_operators.py::test_state_of_any_dtype_and_stride_is_written)

usage() {
  echo "usage: scripts/gpu_check.sh [tests|bench|all|sanitize] [FOLDER]" >&2
  exit 2
}

(($# <= 2)) || usage
what=${1:-all}
case $what in tests | bench | all | sanitize) ;; *) usage ;; esac
out=${2:-runs/gpu}
[[ $out == /* ]] || out=$PWD/$out
python=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD/python MOMENTUM_BN_LIBRARY=$PWD/build-gpu/lib/libmomentum_bn.so PYTHONUNBUFFERED=1

say() { echo "-- $*"; }

for program in cmake ninja nvcc "$python"; do
  command -v "$program" >/dev/null || { echo "error: $program is not on PATH" >&2; exit 1; }
done
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch of $python finds no GPU here" >&2
  exit 1
fi
mkdir -p "$out"

# Of the part that is under way.
began=$SECONDS
left() { # SECONDS_FOR_WHAT_FOLLOWS
  local seconds=$((LIMIT - (SECONDS - began) - ${1:-0}))
  echo $((seconds > 1 ? seconds : 1)) # timeout takes 0 for ever
}

configure() { # BUILD_TRAINER
  cmake -G Ninja -B build-gpu -DCMAKE_BUILD_TYPE=Release -DMOMENTUM_BN_CUDA=ON \
    -DMOMENTUM_BN_CUDA_ARCHITECTURES="${GPU_ARCHITECTURES:-native}" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -DMOMENTUM_BN_BUILD_TRAINER="$1" -DMOMENTUM_BN_BUILD_TESTS=OFF
}

build_library() {
  say "building the library with CUDA kernels in build-gpu/"
  # With the trainer where its libraries are there, which are not asked for.
  { configure ON || configure OFF; } >"$out/configure.txt" 2>&1 || { cat "$out/configure.txt" >&2; exit 1; }
  cmake --build build-gpu --target momentum_bn >"$out/build.txt" 2>&1 || { cat "$out/build.txt" >&2; exit 1; }
  say "built after $((SECONDS - began)) s"
}

# In the background, beside the tests, which leave most processors alone. The last line says what came of it.
build_trainer() {
  if cmake -L -N build-gpu | grep -q 'MOMENTUM_BN_BUILD_TRAINER:BOOL=OFF'; then
    echo "skipped, as a library of the trainer is missing: $(grep -m 1 -A 2 'CMake Error' "$out/configure.txt" | tr -s '\n ' ' ')"
  elif timeout "$(left 20)" nice cmake --build build-gpu --target m2teacher; then
    echo built
  else
    echo "it could not be built in time: see trainer-build.txt"
  fi
}

run_trainer() {
  local result
  result=$(tail -n 1 "$out/trainer-build.txt")
  if [[ $result != built ]]; then
    echo "$result" | tee "$out/trainer.txt"
    return
  fi
  # Images of the MNIST family's format: noise, in two classes.
  mkdir -p "$out/images"
  "$python" - "$out/images" <<'PYTHON'
import random, struct, sys

random.seed(0)
for name, count in (("train", 256), ("t10k", 64)):
    with open(f"{sys.argv[1]}/{name}-images-idx3-ubyte", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, count, 28, 28) + random.randbytes(count * 28 * 28))
    with open(f"{sys.argv[1]}/{name}-labels-idx1-ubyte", "wb") as file:
        file.write(struct.pack(">II", 0x801, count) + bytes(index % 2 for index in range(count)))
PYTHON
  local steps=(build-gpu/bin/m2teacher pretrain --data "idx:$out/images" --architecture resnet18 --batch-size 64
    --steps 3 --warmup-steps 0 --device cuda --overwrite --out "$out/trainer")
  if timeout "$(left)" "${steps[@]}" >"$out/trainer.txt" 2>&1; then
    result="three steps done"
  else
    result="failed: $(tail -n 1 "$out/trainer.txt")"
  fi
  echo "$result" | tee -a "$out/trainer.txt"
}

run_tests() {
  began=$SECONDS
  build_library
  build_trainer >"$out/trainer-build.txt" 2>&1 &
  rm -rf "$out/tests"
  mkdir "$out/tests"
  local name seconds
  for name in "${TESTS[@]}"; do
    while (($(jobs -rp | wc -l) >= AT_ONCE)); do wait -n || true; done
    seconds=$(left 20) # the trainer's steps come after them
    if ((seconds < 5)); then
      echo "no time was left" | tee "$out/tests/$name.txt"
      continue
    fi
    say "test_$name.py"
    timeout "$seconds" "$python" -m pytest -v --color=no -p no:cacheprovider --device cuda "tests/python/test_$name.py" \
      >"$out/tests/$name.txt" 2>&1 || true &
  done
  wait
  say "the trainer"
  run_trainer
  say "tests done after $((SECONDS - began)) s"
}

run_bench() {
  began=$SECONDS
  build_library
  # A table may still be under way when the benchmark's own time is over.
  # shellcheck disable=SC2086 (options, separated by spaces)
  timeout "$(left)" "$python" -m benchmarks.gpu ${BENCH_ARGS:---quick} --seconds "$(left 20)" --out "$out" ||
    { say "the benchmark ended with an error or out of time"; failed=1; }
  say "benchmark done after $((SECONDS - began)) s"
}

run_sanitizer() {
  build_library
  local checked=(compute-sanitizer --error-exitcode 1 --target-processes all)
  local tests=("$python" -m pytest -v --color=no -p no:cacheprovider --device cuda "${SANITIZED[@]/#/tests/python/}")
  # With memory of its own for each tensor an access beyond one is noticed.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${checked[@]}" --tool memcheck "${tests[@]}" 2>&1 | tee "$out/memcheck.txt" || failed=1
  "${checked[@]}" --tool racecheck "${tests[@]}" 2>&1 | tee "$out/racecheck.txt" || failed=1
}

failed=0
case $what in
  sanitize)
    run_sanitizer
    exit "$failed"
    ;;
  tests) run_tests ;;
  bench) run_bench ;;
  all)
    run_tests
    run_bench
    ;;
esac
echo
"$python" -m benchmarks.gpu.goals "$out" | tee "$out/goals.txt" || failed=1
exit "$failed"
