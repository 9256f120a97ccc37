#!/usr/bin/env bash
# Runs everything that needs a GPU: the tests marked `gpu` and the GPU benchmarks. Needs torch 2.8 to 2.13 with its
# Triton, and no network.
#
#   launch/gpu_suite.sh                    all sections
#   launch/gpu_suite.sh flat-tests         env and these sections
#   launch/gpu_suite.sh --list             names and time limits
#
# Every section has a time limit and writes to $OUT (default runs/gpu-suite): <section>.log, and the JSON of its
# benchmark. $OUT/summary.json lists the exit status and the seconds of each section. Exit status: 0 if all sections
# passed, 2 for an unknown section, 1 otherwise. PYTHON names the interpreter (default python3); safecl need not be
# installed.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu-suite}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PIP_NO_INDEX=1
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.torch_ext} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.torch_ext/triton}

# name, time limit in seconds, command
sections() {
  cat <<SECTIONS
env 60 $PYTHON launch/gpu_environment.py $OUT/env.json
build 120 $PYTHON setup.py -q build_ext --inplace
flat-tests 240 $PYTHON -m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_flat_gpu.py tests/engine/zero/test_placement.py
flat-bench 300 $PYTHON benchmarks/flat.py --device cuda --repeats 20 --seconds 30 --out $OUT/flat-cuda.json
head-tests 300 $PYTHON -m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_head_gpu.py
head-bench 420 $PYTHON benchmarks/head.py --device cuda --repeats 10 --seconds 8 --shapes llama-3-8b --out $OUT/head-cuda.json
head-shapes 600 $PYTHON benchmarks/head.py --device cuda --repeats 10 --seconds 6 --shapes llama-2-7b qwen-2.5-7b gemma-2-2b --out $OUT/head-shapes-cuda.json
teacher-tests 180 $PYTHON -m pytest -q -p no:cacheprovider -m gpu tests/engine/teachers/test_teacher_gpu.py
teacher-bench 300 $PYTHON benchmarks/teacher.py --device cuda --out $OUT/teacher-cuda.json
placement-tests 120 $PYTHON -m pytest -q -p no:cacheprovider -m gpu tests/engine/zero/test_placement_gpu.py
reference-bench 300 $PYTHON benchmarks/reference.py --device cuda --only offload --out $OUT/reference-cuda.json
SECTIONS
}

run_section() { # name seconds command...
  local name=$1 limit=$2 began status
  shift 2
  began=$(date +%s)
  echo "==> $name (at most $limit s): $*"
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  [ "$status" -eq 0 ] || tail -n 15 "$OUT/$name.log"
  echo "    exit status $status after $(($(date +%s) - began)) s$([ "$status" -eq 124 ] && echo ' (time limit)')"
  printf '{"section": "%s", "status": %d, "seconds": %d}\n' "$name" "$status" "$(($(date +%s) - began))" >>"$OUT/summary.lines"
  return "$status"
}

if [ "${1:-}" = "--list" ]; then sections; exit 0; fi
mkdir -p "$OUT" && rm -f "$OUT/summary.lines"
failed=0
for wanted in "$@"; do
  sections | grep -q "^$wanted " || { echo "no section $wanted; there are: $(sections | cut -d' ' -f1 | xargs)" >&2; exit 2; }
done
while read -r name limit command; do
  if [ $# -gt 0 ] && [ "$name" != env ] && ! printf '%s\n' "$@" | grep -qx -- "$name"; then continue; fi
  # shellcheck disable=SC2086  # the command is a list of words
  run_section "$name" "$limit" $command </dev/null || failed=1
  if [ "$name" = env ] && [ "$failed" -eq 1 ]; then break; fi
done < <(sections)
[ -f "$OUT/summary.lines" ] && { echo "["; paste -sd, "$OUT/summary.lines"; echo "]"; } >"$OUT/summary.json"
rm -f "$OUT/summary.lines"
echo "results in $OUT"
exit "$failed"
