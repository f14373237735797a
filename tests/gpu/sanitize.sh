#!/usr/bin/env bash
# Memory and race checks of every CUDA kernel on small problems. Needs a GPU and compute-sanitizer of the CUDA toolkit:
#   tests/gpu/sanitize.sh [more arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/../.."
chosen="test_dimensions or test_numbers_of_rows_and_keys or test_short_spans or test_any_interval or test_any_strides"
check() {
  echo "+ $1"
  compute-sanitizer --tool "$1" --error-exitcode 3 --kernel-regex kns=attend \
    python3 -m pytest -q -x tests/gpu/test_gpu_kernels.py -k "$2" "${@:3}"
}
check memcheck "$chosen" "$@"
# The race checker (2025.3) follows a barrier in shared memory to what the lane that arrives did, not to what the other
# lanes of its warp did before the warp's own barrier: it reports the values that hopper.cu looks at in partial tiles.
check racecheck "($chosen) and not hopper" "$@"
