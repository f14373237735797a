#!/usr/bin/env bash
# Memory and race checks of every CUDA kernel on small problems. Needs a GPU and compute-sanitizer of the CUDA toolkit:
#   tests/gpu/sanitize.sh [processes]
# A process for each kernel and test, for every kernel is compiled anew where it is checked; pytest's own workers, which
# have all kernels each, take ten times as long.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests="test_dimensions test_numbers_of_rows_and_keys test_short_spans test_any_interval test_any_strides"
logs=$(mktemp -d)

check() {  # tool, test, family
  local log="$logs/$1 $2 $3"
  compute-sanitizer --target-processes all --tool "$1" --error-exitcode 3 --kernel-regex kns=attend \
    python3 -m pytest -q -x -p no:cacheprovider tests/gpu/test_gpu_kernels.py -k "$2 and ($3)" >"$log" 2>&1 \
    && echo "$1 $2 $3: $(grep -E '[0-9]+ passed' "$log" | tail -1)" || { cat "$log"; exit 1; }
}
export -f check
export logs

for tool in memcheck racecheck; do
  for test in $tests; do
    for family in "half and not bfloat16" "half and bfloat16" "hopper and not bfloat16" "hopper and bfloat16" single split \
      double simple; do
      echo "check $tool $test '$family'"
    done
  done
done | xargs -d '\n' -P "${1:-8}" -I{} bash -c '{}'
