#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: builds, tests on the GPU, times kernels and the whole model, tunes.
#
#   bash bench/gpu.sh [--out FOLDER] [--batch N] [--dtypes "float16 bfloat16 float32"] [--steps LIST] [--dry-run]
#
# --steps: some of build,gputests,tests,kernels,model,predictions,tiles (all of them, in this order, where it is not given).
# --dry-run goes through the same steps on the CPU with tiny pictures; no time it writes means anything.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

all=build,gputests,tests,kernels,model,predictions,tiles
out=gpu-results batch=256 dtypes="float16 bfloat16 float32" steps=$all dry=()
usage() { echo "bench/gpu.sh: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --out | --batch | --dtypes | --steps) [ $# -ge 2 ] || usage "$1 needs a value" ;;&
        --out) [[ $2 == /* ]] && out=$2 || out=$here/$2; shift 2 ;;
        --batch) batch=$2; shift 2 ;;
        --dtypes) dtypes=$2; shift 2 ;;
        --steps) steps=$2; shift 2 ;;
        --dry-run) dry=(--dry-run); shift ;;
        *) usage "unknown option $1; there are --out FOLDER, --batch N, --dtypes LIST, --steps LIST and --dry-run" ;;
    esac
done
for name in ${steps//,/ }; do
    [[ ,$all, == *,$name,* ]] || usage "unknown step $name; there are ${all//,/, }"
done
[[ $batch =~ ^[1-9][0-9]*$ ]] || usage "--batch $batch is no number of pictures"
for name in $dtypes; do
    [[ " float16 bfloat16 float32 " == *" $name "* ]] || usage "unknown type $name; there are float16, bfloat16, float32"
done
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
needed="hypothesis matplotlib pytest torch torchvision triton"
if ! "$python" -c "import sys; from importlib.util import find_spec as find; sys.exit(not all(map(find, '$needed'.split())))"; then
    echo "bench/gpu.sh: $python has not all packages of the tests and benches; make setup puts them into .venv" >&2
    exit 2
fi

if [ ${#dry[@]} -eq 0 ] && ! "$python" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: torch sees no GPU here; run it on a machine with one, or rehearse it with --dry-run" >&2
    exit 2
fi
mkdir -p "$out"
failed=()
# What fails is named at the end and does not take the steps after it along.
step() {
    local name=$1
    shift
    [[ ,$steps, == *,$name,* ]] || return 0
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

build() {
    rm -f mbv2/_C*.so mbv2/_cuda*.so
    MBV2_BUILD=1 "$python" -W ignore setup.py -q build_ext --inplace --force
}
# All tests that launch on the GPU, the slow ones too; then all others.
tests() { "$python" -m pytest -q --device cuda -m "$1" tests 2>&1 | tee "$out/$2"; }
predictions() { "$python" -m bench.roofline --out "$out" --batch 1 8 64 "$batch" >"$out/roofline.txt"; }

if [ ${#dry[@]} -eq 0 ]; then
    step build build
    step gputests tests gpu gputests.log
    step tests tests "not gpu" tests.log
fi
# shellcheck disable=SC2086
step kernels "$python" -m bench.gpu_kernels --out "$out" --batch "$batch" --dtype $dtypes ${dry[@]+"${dry[@]}"}
# shellcheck disable=SC2086
step model "$python" -m bench.gpu_model --out "$out" --batch "$batch" --dtype $dtypes ${dry[@]+"${dry[@]}"}
step predictions predictions
if [ ${#dry[@]} -eq 0 ]; then
    step tiles "$python" -m bench.tune "$out/tiles"
fi
printf '\n== written to %s\n' "$out"
ls "$out"
if [ ${#failed[@]} -gt 0 ]; then
    echo "bench/gpu.sh: failed: ${failed[*]}" >&2
    exit 1
fi
