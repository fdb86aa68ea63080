#!/usr/bin/env bash
# Runs the GPU benchmarks that fit into eight minutes (--minutes), most important first; a second call does the rest.
# Prints results as soon as they are known, and a table last, also after SIGTERM; writes gpu.json to OUT.
#
#   scripts/bench/gpu.sh [--wheels FOLDER] [--data CIFAR] [--nanogpt FOLDER] [--airbench FILE] [--out OUT]
#                        [--resume FILE] [--cache FOLDER] [--rehearse] [options of gpu.py]
#
# Requires a checkout and a Python with torch and torchvision, but no network. Installs missing packages from wheels in
# FOLDER (default: .whl, which git ignores). These dependencies of dlopt are often missing: hydra-core, omegaconf (below
# 2.4), antlr4-python3-runtime, pydantic, pydantic-core, annotated-types, typing-inspection, and newer versions of
# typing-extensions and rich.
# CIFAR is the folder of CIFAR-10's Python batches, or a tar archive (or its unpacked folder) of images as
# train/CLASS/*.jpg and test/CLASS/*.jpg. The peers are a checkout of github.com/karpathy/nanoGPT (its train.py, model.py
# and configurator.py suffice), and airbench94_muon.py of github.com/KellerJordan/cifar10-airbench. --cache is the folder
# in which a call keeps what torch compiles. For the second call, repeat the line. On another machine, put OUT/gpu.json
# and the cache where they were; or pass --resume FILE. --rehearse is a small run on generated data that also works on a
# CPU. What each benchmark measures, and what has to travel: docs/speed.md.
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
"$python" "$root/scripts/bench/gpu.py" ${arguments[@]+"${arguments[@]}"} &
trap 'kill "$!" 2>/dev/null || true' TERM INT
# A signal ends `wait`; the table comes after it.
code=0
wait "$!" || code=$?
if kill -0 "$!" 2>/dev/null; then
    code=0
    wait "$!" || code=$?
fi
exit "$code"
