#!/usr/bin/env bash
# The fast suite with the oldest and with the newest versions that pyproject.toml allows, each in an environment of its own.
#   tests/compat.sh                          both
#   tests/compat.sh oldest tests/models      one, and what pytest is told
#   TORCH=torch==2.13.0 tests/compat.sh      with that torch, where another one would be gigabytes of CUDA
# The environments are build/oldest and build/newest, made by uv where it is there, else by pip.
set -euo pipefail
cd "$(dirname "$0")/.."
which=both python="${PYTHON:-python3}"
case "${1:-}" in oldest | newest | both) which="$1" && shift ;; esac
wanted=".[qlora,wandb,gguf,eval,dev]"

# `name==least` for every `name>=least` of pyproject.toml; not for what builds the package, nor for a torch that TORCH names.
lower_bounds() {
    grep -oE '"[A-Za-z0-9-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | grep -vE "^(setuptools${TORCH:+|torch})="
}

make() { # an environment, and `highest` or `lowest-direct`
    if command -v uv > /dev/null; then
        uv venv --quiet --clear --python "$python" "$1"
        uv pip install --quiet --python "$1" --resolution "$2" --overrides <(echo "${TORCH:-}") --editable "$wanted"
    else
        "$python" -m venv --clear "$1"
        "$1/bin/python" -m pip install --quiet ${TORCH:+"$TORCH"} --constraint <([ "$2" = highest ] || lower_bounds) --editable "$wanted"
    fi
}

for each in oldest newest; do
    [ "$which" = both ] || [ "$which" = "$each" ] || continue
    make "build/$each" "$([ "$each" = newest ] && echo highest || echo lowest-direct)"
    echo "the $each versions:"
    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "build/$each/bin/python" -m pytest -q -m "not slow" "$@"
done
