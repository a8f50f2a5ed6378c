#!/bin/sh
# Runs the tests of a dev build, then builds and runs them under sanitizers, then fuzzes. Arguments go to cmake.
# Needs ONNX Runtime's library: $TARFLOW_ONNXRUNTIME, or that of the Python in $PYTHON.
set -eu
cd "$(dirname "$0")/.."
find_library='import glob, os, onnxruntime; print(glob.glob(os.path.dirname(onnxruntime.__file__) + "/capi/libonnxruntime.so.*")[0])'
TARFLOW_ONNXRUNTIME=${TARFLOW_ONNXRUNTIME:-$("${PYTHON:-python3}" -c "$find_library")}
export TARFLOW_ONNXRUNTIME
export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp"

build/dev/tests/tests
for preset in asan tsan; do
  cmake --preset $preset -DTARFLOW_EXAMPLES=OFF "$@" > /dev/null
  cmake --build --preset $preset
done
build/asan/tests/tests
build/tsan/tests/tests --test-suite=threads
cmake --preset fuzz "$@" > /dev/null
cmake --build --preset fuzz 
for target in manifest weights engines; do
  found=$(mktemp -d)
  build/fuzz/fuzz/fuzz_$target -max_total_time="${FUZZ_SECONDS:-10}" -max_len=8192 -verbosity=0 -print_final_stats=1 \
    -dict=fuzz/manifest.dict -artifact_prefix=build/fuzz/ "$found" fuzz/corpus/$target
  rm -r "$found"
done
