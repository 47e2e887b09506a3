#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: builds, tests on the GPU, times kernels and the whole model, tunes.
#
#   bash bench/gpu.sh [--out FOLDER] [--batch N] [--dry-run]
#
# --dry-run goes through the same steps on the CPU with tiny pictures; no time it writes means anything.
set -euo pipefail
cd "$(dirname "$0")/.."

out=gpu-results batch=256 dry=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --batch) batch=$2; shift 2 ;;
        --dry-run) dry=(--dry-run); shift ;;
        *) echo "bench/gpu.sh: unknown option $1; there are --out FOLDER, --batch N and --dry-run" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3

if [ ${#dry[@]} -eq 0 ] && ! "$python" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: torch sees no GPU here; run it on a machine with one, or rehearse it with --dry-run" >&2
    exit 2
fi
mkdir -p "$out"
step() { printf '\n== %s\n' "$1"; }

if [ ${#dry[@]} -eq 0 ]; then
    step "build"
    rm -f mbv2/_C*.so mbv2/_cuda*.so
    MBV2_BUILD=1 "$python" -W ignore setup.py -q build_ext --inplace --force
    step "tests"
    # What fails is in the log; the timings below check results of their own.
    "$python" -m pytest -q --device cuda tests 2>&1 | tee "$out/tests.log" || echo "tests failed, see $out/tests.log"
fi
step "kernels"
"$python" -m bench.gpu_kernels --out "$out" --batch "$batch" ${dry[@]+"${dry[@]}"}
step "model"
"$python" -m bench.gpu_model --out "$out" --batch "$batch" ${dry[@]+"${dry[@]}"}
step "predictions"
"$python" -m bench.roofline --out "$out" --batch "$batch" >"$out/roofline.txt"
if [ ${#dry[@]} -eq 0 ]; then
    step "tiles"
    "$python" -m bench.tune "$out/tiles"
fi
step "written to $out"
ls "$out"
