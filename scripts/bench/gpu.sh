#!/usr/bin/env bash
# Every measurement that needs a GPU, in under ten minutes: prints a table, leaves gpu.json and gpu.png in OUT.
#
#   scripts/bench/gpu.sh [--wheels FOLDER] [--data CIFAR] [--out OUT] [--rehearse] [further keys of gpu.py]
#
# It needs a checkout and a Python with torch and torchvision, and no network. Wheels of what else is missing there are
# taken from FOLDER (.whl by default, which git ignores); of packages that dlopt needs these are seldom installed:
# hydra-core omegaconf antlr4-python3-runtime pydantic pydantic-core annotated-types typing-inspection.
# CIFAR is the folder of CIFAR-10's Python batches, or a tar archive (or its unpacked folder) of images as
# train/CLASS/*.jpg and test/CLASS/*.jpg. --rehearse runs all of it in small on generated images, also on a CPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
wheels=$root/.whl
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        *) arguments+=("$1"); shift ;;
    esac
done
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" "$root/scripts/bench/gpu.py" ${arguments[@]+"${arguments[@]}"}
