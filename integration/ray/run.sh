#!/bin/sh
# Two replicas of the server under Ray Serve, on this machine: load, sessions, a replica killed under 64 streams, cancels, draining.
#     integration/ray/run.sh [--streams 64 --new-tokens 96]
# PYTHON is an environment with Medusa and its extras `ray` and `dev`, by default that of `make`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
# The last one is for the nodes of any cluster: their proxies then answer in the shape of OpenAI's errors.
export OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=medusa.serving.ray:middlewares
exec "${PYTHON:-$here/../../.venv/bin/python}" "$here/check.py" "$@"
