#!/bin/sh
# Runs the tests of a dev build, then builds and runs them under sanitizers, then fuzzes. Arguments go to cmake.
# Needs ONNX Runtime's library: $TARFLOW_ONNXRUNTIME, or that of the Python in $PYTHON.
set -eu
cd "$(dirname "$0")/.."
find_library='import glob, os, onnxruntime; print(glob.glob(os.path.dirname(onnxruntime.__file__) + "/capi/libonnxruntime.so.*")[0])'
TARFLOW_ONNXRUNTIME=${TARFLOW_ONNXRUNTIME:-$("${PYTHON:-python3}" -c "$find_library")}
export TARFLOW_ONNXRUNTIME
export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp"

# One core builds while the other runs what was built before it.
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
running=""
start() { # NAME COMMAND...: in the background, its output kept
  name=$1
  shift
  ("$@" > "$logs/$name" 2>&1 && echo passed > "$logs/$name.end") &
  running="$running $name"
}
finish() { # all that was started: how it ended, or all it said
  wait
  for name in $running; do
    echo "--- $name"
    if [ ! -f "$logs/$name.end" ]; then cat "$logs/$name" && exit 1; fi
    tail -n 5 "$logs/$name"
  done
  running=""
}
build() {
  preset=$1
  shift
  cmake --preset "$preset" "$@" > /dev/null
  cmake --build --preset "$preset" > "$logs/build" 2>&1 || { cat "$logs/build"; exit 1; }
  grep -A 5 warning "$logs/build" || true
}

bits() { # what one decode's bits are on every machine: on this one, and on an emulated Arm
  native=../native expected=../native/tests/bits.txt
  build/dev/tests/bits | diff $expected - && TARFLOW_ISA=baseline build/dev/tests/bits 1 | diff $expected - || return 1
  if ! command -v aarch64-linux-gnu-g++ > /dev/null || ! command -v qemu-aarch64-static > /dev/null; then
    echo "not on Arm: that needs the packages g++-aarch64-linux-gnu and qemu-user-static"
    return 0
  fi
  aarch64-linux-gnu-g++ -std=c++17 -O2 -ffp-contract=off -static -pthread -I$native/src $native/src/*.cpp \
    $native/tests/bits.cpp -o build/bits-aarch64 || return 1
  for isa in neon baseline; do
    TARFLOW_ISA=$isa qemu-aarch64-static build/bits-aarch64 | diff $expected - || return 1
  done
}

start tests build/dev/tests/tests
start bits bits
build asan "$@"
start asan build/asan/tests/tests
service() { # the service under ASan, by the tests that crowd it; a leak changes the exit code that SIGTERM's test expects
  cd ../..
  TARFLOW_LIBRARY=$PWD/runtime/cpp/build/asan/libtarflow.so "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider \
    tests/test_cpp_service.py -k "hangs_up or full_queue or sigterm or pictures or finite"
}
start service service
build tsan "$@"
start tsan build/tsan/tests/tests --test-suite=threads
build fuzz "$@"
finish
for target in manifest weights engines graph native; do
  mkdir "$logs/found-$target"
  case $target in graph | native) dictionary=$target ;; *) dictionary=manifest ;; esac
  start "fuzz-$target" build/fuzz/fuzz/fuzz_$target -max_total_time="${FUZZ_SECONDS:-15}" -max_len=8192 -verbosity=0 \
    -print_final_stats=1 -dict=fuzz/$dictionary.dict -artifact_prefix=build/fuzz/ "$logs/found-$target" fuzz/corpus/$target
done
finish
