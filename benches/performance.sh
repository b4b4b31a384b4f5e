#!/usr/bin/env bash
# Measures everything in docs/performance.md and writes its tables and pictures from the results: `just performance`.
# As root, since page cache, cgroups and other users are involved; on a machine with nothing else to do. FILTER runs a part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
page=docs/performance.md out=target/performance filter=${1:-}
mkdir -p "$out"
cargo build --release --locked --quiet -p dmaload-cli
dmaload=$PWD/target/release/dmaload

# Puts a file's lines between the marks of this name.
insert() {
    awk -v name="$1" -v file="$2" '
        $0 == "<!-- begin:" name " -->" { print; while ((getline line < file) > 0) print line; inside = 1 }
        $0 == "<!-- end:" name " -->" { inside = 0 }
        !inside { print }
    ' "$page" >"$out/page"
    cp "$out/page" "$page"
}

# NAME ARGUMENTS…: a bench, with its command above its table.
measure() {
    local name=$1
    shift
    [[ $name == *$filter* ]] || return 0
    grep -qx "<!-- begin:$name -->" "$page"
    echo "$name: dmaload bench $*"
    # Under pressure modes may fail, which is a result.
    "$dmaload" bench "$@" --md >"$out/$name.md" || [[ "$*" == *--pressure* ]]
    { echo "\`dmaload bench ${*/#docs\//docs/}\`"; echo; cat "$out/$name.md"; } >"$out/$name"
    insert "$name" "$out/$name"
}

machine() {
    echo "$(date +%Y-%m-%d), Linux $(uname -r | cut -d- -f1), $(nproc) CPUs ($(lscpu | sed -n 's/^Model name: *//p')),"
    echo "$(free -g | awk '/^Mem:/ {print $2}') GiB of memory, shmem_enabled=$(grep -o '\[[a-z_]*\]' /sys/kernel/mm/transparent_hugepage/shmem_enabled | tr -d '[]'), commit $(git rev-parse --short HEAD)"
}

if [[ -z $filter ]]; then
    machine >"$out/machine"
    insert machine "$out/machine"
fi
# NAME BENCH: what one of the small benches prints.
small() {
    [[ $1 == *$filter* ]] || return 0
    { echo "\`cargo bench -p dmaload-benches --bench $2\`"; echo; echo '```text'; cargo bench --quiet --locked -p dmaload-benches --bench "$2"; echo '```'; } >"$out/$1"
    insert "$1" "$out/$1"
}

few=normal,limit,direct_io,no-overlap
measure untuned --size 1GiB --user 1000 --plot docs/performance.svg
measure untuned-3gib --size 3GiB --user 1000 --modes $few
measure registered --size 1GiB --modes $few
measure small-pages --size 1GiB --user 1000 --pages 4k --modes $few
measure bounce --size 1GiB --route bounce --modes normal,limit,direct_io
measure cgroup --size 1GiB --pressure cgroup:1280MiB --modes normal,normal_io,limit,direct_io
measure cgroup-clean --size 1GiB --pressure cgroup:1600MiB,clean --modes normal,normal_io,limit,direct_io
measure cgroup-dirty --size 1GiB --pressure cgroup:1600MiB,dirty --modes normal,normal_io,limit,direct_io
measure hog --size 3GiB --pressure hog:all-but:3328MiB --modes normal,limit,direct_io --rounds 3
small parser parser
small overlap overlap
