#!/usr/bin/env bash
# Memory and race checks of every CUDA kernel on small problems. Needs a GPU and compute-sanitizer of the CUDA toolkit:
#   tests/gpu/sanitize.sh [more arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/../.."
chosen="test_dimensions or test_numbers_of_rows_and_keys or test_short_spans or test_any_interval or test_any_strides"
for tool in memcheck racecheck; do
  echo "+ $tool"
  compute-sanitizer --target-processes all --tool "$tool" --error-exitcode 3 --kernel-regex kns=attend \
    python3 -m pytest -q -x tests/gpu/test_gpu_kernels.py -k "$chosen" "$@"
done
