#!/usr/bin/env bash
# Checks licences, bans and sources: by cargo-deny where it is installed, else the licences alone.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
config=${DENY_CONFIG:-$here/deny.toml}
if command -v cargo-deny >/dev/null; then
    # Advisories would have to be fetched. Offline needs every crate of Cargo.lock, so they come first.
    cargo fetch --locked --quiet
    exec cargo deny --offline --config "$config" check licenses bans sources
fi
echo "cargo-deny is not installed: checking licences and sources only" >&2
exec python3 "$here/licences.py" "$config"
