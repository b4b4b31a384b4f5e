#!/usr/bin/env bash
# Installs the command, libdmaload.so, libdmaload.a, dmaload.h and dmaload.pc below $DESTDIR:
# `just PREFIX=/usr/local install`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
prefix=${1:?usage: install.sh PREFIX}
[[ $prefix == /* ]] || { echo "PREFIX must be an absolute path, not $prefix" >&2; exit 1; }
root=${DESTDIR:-}$prefix built=${CARGO_TARGET_DIR:-target}/release
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n1)

cargo build --quiet --locked --release -p dmaload-cli -p dmaload-capi
install -D -m 755 "$built/dmaload" "$root/bin/dmaload"
install -D -m 644 crates/dmaload-capi/include/dmaload.h "$root/include/dmaload.h"
install -D -m 755 "$built/libdmaload_capi.so" "$root/lib/libdmaload.so.$version"
ln -sf "libdmaload.so.$version" "$root/lib/libdmaload.so.${version%%.*}"
ln -sf "libdmaload.so.${version%%.*}" "$root/lib/libdmaload.so"
install -D -m 644 "$built/libdmaload_capi.a" "$root/lib/libdmaload.a"
mkdir -p "$root/lib/pkgconfig"
sed -e "s|@PREFIX@|$prefix|" -e "s|@VERSION@|$version|" crates/dmaload-capi/dmaload.pc.in >"$root/lib/pkgconfig/dmaload.pc"
echo "installed dmaload $version in $root; if the dynamic linker does not search $root/lib, set LD_LIBRARY_PATH"
