#!/usr/bin/env bash
# The two commands:
#   ./run.sh                 sets up what is missing, then turns the embedded tiny model into a diffusion model
#   ./run.sh test            sets up what is missing, then runs every check
# Further:
#   ./run.sh chat output/tiny/sft_model "Sort the letters: k d e a"     asks what was trained; ./run.sh generate likewise
#   ./run.sh PRESET [--hyper-parameters-json '{…}']      another configuration; ./run.sh --list-presets names them
#   nohup ./run.sh PRESET > training_nohup.log 2>&1 &    in the background; follow it with: tail -f training_nohup.log
set -euo pipefail
cd "$(dirname "$0")"
./setup.sh
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

case "${1:-tiny}" in
test)
    shift
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/lint-imports
    # Two processes of one thread: tiny tensors gain nothing from a second thread, and lose by waiting for it.
    OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -q -n 2 "$@"
    ;;
chat | generate | convert | analyze | evaluate | -*) exec .venv/bin/python -m llm_diffusion.main "$@" ;;
*)
    preset="${1:-tiny}"
    [ $# -gt 0 ] && shift
    exec .venv/bin/python -m llm_diffusion.main --preset "$preset" "$@"
    ;;
esac
