# Every verb of this project. `just` lists them.

# Where `install` puts things: `just PREFIX=/opt/dmaload install`.
PREFIX := "/usr/local"

_default:
    @just --list --unsorted

# The main job on a synthetic model, beside allocate + mmap + memcpy.
demo *ARGS:
    cargo run --release -p dmaload-cli -- demo {{ARGS}}

# Loads a file: `just load model.safetensors --digest sha256`.
load *ARGS:
    cargo run --release -p dmaload-cli -- load {{ARGS}}

# All tests that need nothing but this machine.
test:
    cargo test --workspace

# Fetches a small real model, loads it, and compares every tensor with what the safetensors crate reads.
real-model:
    cargo run --release -p dmaload-cli -- load "$(.ci/real-model.sh)" --digest sha256
    DMALOAD_REAL_MODEL="$(.ci/real-model.sh)" cargo test -p dmaload --test real_model -- --nocapture

# GGUF files as the format's own Python package writes and reads them, beside what dmaload makes of them.
gguf:
    .ci/gguf

# A real model in candle on what dmaload has loaded, beside candle's own loader: the same embedding to the last bit (builds for minutes).
candle:
    .ci/candle

# A model's dma-bufs imported by Vulkan; says why where that can't be: `just gpu-import model.safetensors`.
gpu-import *MODEL:
    .ci/gpu-import {{MODEL}}

# The command, libdmaload.so and .a, dmaload.h and dmaload.pc into PREFIX (under DESTDIR, if that is set).
install:
    crates/dmaload-capi/install.sh "{{PREFIX}}"

# The C library as its users have it: installed into a folder, linked, its programs and its suite run, also under valgrind (needs a C compiler, pkg-config, valgrind).
capi:
    .ci/capi

# Makes dmaload.h anew from the sources.
capi-header:
    DMALOAD_WRITE_HEADER=1 cargo test --quiet -p dmaload-capi --test header

# The seeded simulator, 50,000 worlds or as many as asked for; a failure prints its seed: `just simulate --seeds 1000000`, `just simulate --seed 17`.
simulate *ARGS:
    .ci/simulate {{ARGS}}

# Damaged headers and manifests, so many of each: `just hostile 10000000`.
hostile INPUTS="1000000" SEED="1":
    DMALOAD_INPUTS={{INPUTS}} DMALOAD_SEED={{SEED}} cargo test --release -p dmaload --features verify --test hostile -- --nocapture

# Every interleaving of what threads decide by locks and atomics.
loom:
    .ci/loom

# The tests under valgrind (needs it; takes an hour).
valgrind *ARGS:
    .ci/valgrind {{ARGS}}

# Puts deliberate bugs into a copy of the sources, and fails unless each one's test finds it.
mutants *NAMES:
    .ci/mutants {{NAMES}}

# Boots stock kernels with real dma-bufs in QEMU and runs the suites inside: `just guest-test --kernel 6.12-cloud --only faults`.
guest-test *ARGS:
    cargo run -p dmaload-guest -- test --jobs 2 {{ARGS}}

# The same, and writes the tables of docs/kernels.md from what was seen.
kernels-md:
    cargo run -p dmaload-guest -- test --jobs 2 --write docs/kernels.md

# Measures all of docs/performance.md (root, some 45 minutes on an idle machine) and writes its tables and pictures; `just bench reuse` one part of it.
bench FILTER="":
    benches/performance.sh "{{FILTER}}"

# Only the small benches, to the terminal: overlap, and plan, window, slots and parser in instructions.
bench-small:
    cargo bench -p dmaload-benches --bench overlap
    cargo test --release -p dmaload --lib instructions::bench -- --ignored --exact --nocapture

# Random loads, cancellations and faults for so long, and what the process holds, as a table: `just soak --minutes 30`.
soak *ARGS:
    cargo bench -p dmaload-benches --bench soak -- {{ARGS}}

# The loaders that people use today, in one run with the engine (installs them: gigabytes), into docs/performance.md.
bench-peers:
    benches/performance.sh peers

# The documentation of the libraries.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps -p dmaload -p dmabuf --features dmaload/verify

# Formatting, as CI checks it.
fmt:
    cargo fmt --all

# Lints, as CI checks them.
lint:
    cargo clippy --workspace --all-targets -- -D warnings
    cargo clippy -p dmaload-guest --test '*' -- -D warnings

# Licences and sources of all dependencies (needs cargo-deny).
deny:
    cargo deny --config deny.toml check licenses bans sources

# All that CI runs.
ci:
    .ci/run
