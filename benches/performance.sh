#!/usr/bin/env bash
# Runs the measurements for docs/performance.md and writes their tables and pictures:
# `just bench [FILTER]`. Requires an idle machine, perf, and root to create cgroups, mount a tmpfs
# and run as other users. FILTER selects the measurements whose names contain it. `peers` runs only
# if FILTER is exactly `peers`, because it installs several gigabytes of other loaders.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
page=docs/performance.md out=target/performance filter=${1:-}
mkdir -p "$out"
cargo build --release --locked --quiet -p dmaload-cli
dmaload=$PWD/target/release/dmaload

# NAME FILE: replaces the text between NAME's markers in the page with the contents of FILE.
insert() {
    awk -v name="$1" -v file="$2" '
        $0 == "<!-- begin:" name " -->" { print; while ((getline line < file) > 0) print line; inside = 1 }
        $0 == "<!-- end:" name " -->" { inside = 0 }
        !inside { print }
    ' "$page" >"$out/page"
    cp "$out/page" "$page"
}

# NAME ARGUMENTS…: runs a bench and inserts its table below its command.
measure() {
    local name=$1
    shift
    [[ $name == *$filter* ]] || return 0
    grep -qx "<!-- begin:$name -->" "$page"
    echo "$name: dmaload bench $*"
    # Under memory pressure, the failure of a mode is also a result: the bench itself fails, and
    # ends this script, only if wrong bytes were loaded.
    "$dmaload" bench "$@" --md >"$out/$name.md"
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
# NAME ARGUMENTS…: runs `cargo ARGUMENTS…` and inserts its output.
small() {
    [[ $1 == *$filter* ]] || return 0
    {
        printf '`cargo %s`\n\n```text\n' "${*:2}"
        # Drop what the test harness prints. It may print that a test is slow within another line.
        cargo --quiet --locked "${@:2}" | sed -z 's/test [^ ]* has been running for over 60 seconds\n//g' |
            grep -vE '^(running |test |\.?$)'
        echo '```'
    } >"$out/$1"
    insert "$1" "$out/$1"
}

# COUNT MIN-KIB MAX-KIB: creates a folder with COUNT files of random bytes, and prints its path.
# The lengths of the files are the same in each run.
files() {
    local folder=$out/files-$1
    mkdir -p "$folder"
    python3 - "$folder" "$@" <<'PYTHON'
import os, random, sys
folder, (count, least, most) = sys.argv[1], map(int, sys.argv[2:])
lengths = random.Random(1)
for number in range(count):
    with open(f"{folder}/{number:04}", "wb") as file:
        file.write(os.urandom(lengths.randint(least << 10, most << 10)))
PYTHON
    chmod -R a+rX "$folder"
    echo "$folder"
}

# NAME "COUNT MIN MAX" ARGUMENTS…: runs a bench with many files and inserts its table.
measure_files() {
    local name=$1 folder
    [[ $name == *$filter* ]] || return 0
    folder=$(files $2)
    grep -qx "<!-- begin:$name -->" "$page"
    echo "$name: dmaload bench, $2, ${*:3}"
    "$dmaload" bench "$folder"/* "${@:3}" --md >"$out/$name.md"
    { echo "\`dmaload bench FOLDER/* ${*:3}\`"; echo; cat "$out/$name.md"; } >"$out/$name"
    rm -r "$folder"
    insert "$name" "$out/$name"
}

# Installs other loaders in a virtual environment, and measures them in the same run as dmaload.
peers() {
    local python=$PWD/$out/peers/bin/python way command=()
    if [[ ! -x $python ]]; then
        python3 -m venv "$out/peers"
        "$python" -m pip install --quiet safetensors fastsafetensors runai-model-streamer torch numpy
    fi
    # The wheel is built from these sources, so it contains the same engine that `direct_io` uses.
    "$python" -m pip install --quiet --no-deps --force-reinstall ./crates/dmaload-python
    for way in wheel safetensors safetensors-clone fastsafetensors runai $(command -v fio); do
        command+=(--peer "${way##*/}=$python benches/peers.py ${way##*/}")
    done
    local versions name arguments
    versions=$("$python" -m pip list 2>/dev/null | awk '/^(safetensors|fastsafetensors|runai-model-streamer|torch) / {print $1, $2}' | paste -sd,)
    # The file is cold for peers and peers-4k, and in the page cache for peers-warm.
    for name in peers peers-4k peers-warm; do
        arguments=(--size 1GiB --modes normal,limit,direct_io)
        case $name in
            peers-4k) arguments+=(--pages 4k) ;;
            peers-warm) arguments+=(--warm --cache auto) ;;
        esac
        "$dmaload" bench "${arguments[@]}" "${command[@]}" --md >"$out/$name.md"
        {
            echo "\`dmaload bench ${arguments[*]} --peer NAME='python benches/peers.py NAME' …\` with"
            echo "$versions"
            echo
            cat "$out/$name.md"
        } >"$out/$name.table"
        insert "$name" "$out/$name.table"
    done
}
if [[ $filter == peers ]]; then
    peers
    exit
fi

# Profiles the engine's threads during direct and staged loads on 2 MiB and 4 KiB pages.
profile() {
    [[ profile == *$filter* ]] || return 0
    local way arguments
    : >"$out/profile"
    for way in "uring-direct --pages 2m" "uring-direct --pages 4k" "bounce --pages 2m" "bounce --pages 4k"; do
        arguments=(--size 1GiB --route $way --modes direct_io --rounds 5)
        echo "profile: dmaload bench ${arguments[*]}"
        perf record --quiet --freq 4000 --output "$out/perf.data" "$dmaload" bench "${arguments[@]}" --json >"$out/profile.json"
        {
            printf '`perf record dmaload bench %s`: %.2f s of CPU time per GiB, of which\n\n| share | function |\n|--:|---|\n' \
                "${arguments[*]}" "$(python3 -c 'import json, sys; print([mode["cpu_seconds_per_gib"] for mode in json.load(sys.stdin)["modes"] if mode["name"] == "direct_io"][0])' <"$out/profile.json")"
            # `--comms` selects entries, not samples. If perf sorted by function alone, each entry
            # would mix samples from all threads. Therefore perf sorts by thread and function, and
            # awk adds up the shares of each function.
            perf report --input "$out/perf.data" --no-children --stdio --percentage relative --sort comm,symbol \
                --comms dmaload-alloc-0,dmaload-alloc-1,dmaload-copy-0,dmaload-copy-1,dmaload-ring,dmaload-reap 2>/dev/null |
                awk '/^ +[0-9.]+%/ { share[$4] += $1 } END { for (name in share) if (share[name] >= 2) printf "| %.1f %% | `%s` |\n", share[name], name }' |
                sort -t'|' -k2 -rn
            echo
        } >>"$out/profile"
    done
    rm "$out/perf.data"
    insert profile "$out/profile"
}

few=normal,limit,direct_io,no-overlap
measure untuned --size 1GiB --user 1000 --plot docs/performance.svg
measure untuned-3gib --size 3GiB --user 1000 --modes $few
measure registered --size 1GiB --modes $few
measure small-pages --size 1GiB --user 1000 --pages 4k --modes $few
measure reuse --size 1GiB --user 1000 --pages 4k --modes normal,limit,direct_io,reuse
measure reuse-bounce --size 1GiB --user 1000 --pages 4k --route bounce --modes normal,limit,direct_io,reuse
measure reuse-huge --size 1GiB --user 1000 --modes normal,limit,direct_io,reuse,swap
if [[ c-program == *$filter* ]]; then
    cargo build --release --locked --quiet -p dmaload-capi
    cc -O2 -Icrates/dmaload-capi/include examples/c/dmabuf-heap-file-read.c target/release/libdmaload_capi.a -lm -o "$out/dmabuf-heap-file-read"
fi
measure c-program --size 1GiB --layout single --modes normal,limit,direct_io --peer "c=$out/dmabuf-heap-file-read memfd bench"
measure_files small-files "2000 64 1536" --user 1000 --modes normal,limit,direct_io
measure_files at-once "16 65536 65536" --user 1000 --modes normal,limit,direct_io,at-once
measure cached --size 1GiB --warm --cache auto --pages 2m --modes normal,normal_io,limit,direct_io,tokio-fs
# On tmpfs, O_DIRECT reads are memory copies, so loads from a tmpfs are compared with a plain copy
# loop.
if [[ tmpfs == *$filter* ]]; then
    memory=$(mktemp -d)
    mount -t tmpfs -o size=1100m tmpfs "$memory"
    trap 'umount "$memory" && rmdir "$memory"' EXIT
    head -c 1G /dev/urandom >"$memory/model.bin"
    for pages in 2m 4k; do
        measure tmpfs-$pages "$memory/model.bin" --warm --cache bypass --pages $pages --modes limit,direct_io \
            --peer "copies=python3 benches/peers.py copies"
        sed -i "s#$memory/model.bin#TMPFS/model.bin#" "$page"
    done
fi
measure large-8gib --size 8GiB --user 1000 --modes normal,limit,direct_io --rounds 3
measure large-16gib --size 16GiB --user 1000 --modes normal,limit,direct_io --rounds 3
measure verify --size 1GiB --user 1000 --modes normal,limit,direct_io,verify
measure bounce --size 1GiB --route bounce --modes normal,limit,direct_io
measure cgroup --size 1GiB --pressure cgroup:1280MiB --modes normal,normal_io,limit,direct_io
measure cgroup-clean --size 1GiB --pressure cgroup:1600MiB,clean --modes normal,normal_io,limit,direct_io
measure cgroup-dirty --size 1GiB --pressure cgroup:1600MiB,dirty --modes normal,normal_io,limit,direct_io
measure hog --size 3GiB --pressure hog:all-but:3328MiB --modes normal,limit,direct_io --rounds 3
profile
small instructions test --release -p dmaload --lib instructions::bench -- --ignored --exact --nocapture
small overlap bench -p dmaload-benches --bench overlap
