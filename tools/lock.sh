#!/usr/bin/env bash
# Writes requirements.lock: every package of .venv with its hashes, and no address of where it came from.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(mktemp --directory)
trap 'rm -rf "$tools"' EXIT
"$1" -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check uv
"$tools/bin/uv" pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 --all-extras --group checks --group site \
    --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --output-file requirements.lock
