#!/usr/bin/env bash
# The two commands:
#   ./run.sh                 sets up what is missing, then turns the embedded tiny model into a diffusion model
#   ./run.sh test            sets up what is missing, then runs the checks
# Further:
#   ./run.sh test --slow                                the long checks too, with line coverage: hours
#   ./run.sh setup [--update]                            only sets up, or builds .venv anew
#   ./run.sh PRESET [--hyper-parameters-json '{…}']      another configuration; ./run.sh --list-presets names them
#   ./run.sh COMMAND …                                   chat, generate, evaluate, …; ./run.sh --help names them
#   nohup ./run.sh PRESET > training_nohup.log 2>&1 &    in the background; follow it with: tail -f training_nohup.log
set -euo pipefail
cd "$(dirname "$0")"
if [ "${1:-}" = setup ]; then
    exec ./setup.sh "${@:2}"
fi
case " $* " in
    *[!a-z0-9-]smollm2*) ./setup.sh smollm2 ;; # the model's name, alone or in a preset's
    " test "*) ./setup.sh smollm2 || ./setup.sh ;; # its test is skipped where there is no package index
    *) ./setup.sh ;;
esac
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# glibc gives every large tensor back to the system and takes it anew, page by page, which costs training on a CPU most of its time.
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_-17179869184}"

if [ "${1:-}" = test ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/lint-imports
    # Two processes of one thread: tiny tensors gain nothing from a second thread, and lose by waiting for it.
    export OMP_NUM_THREADS=1
    if [ "${2:-}" = --slow ]; then # all tests, 2,000 examples of every property, line coverage; then memory, and kills
        .venv/bin/python -m pytest -q -n 2 --hypothesis-profile=slow --cov=llm_diffusion "${@:3}"
        .venv/bin/python benchmarks/soak.py
        exec .venv/bin/python benchmarks/kills.py --kills 60
    fi
    exec .venv/bin/python -m pytest -q -n 2 -m "not slow" "${@:2}"
fi
# The command line itself knows its commands; any other word is a preset to it.
[ $# -gt 0 ] || set -- tiny
exec .venv/bin/python -m llm_diffusion.main "$@"
