# Every recipe of this project. `just` lists the common ones, `just --list` lists every recipe.
# Needs just 1.27.

# The prefix of `install`: `just PREFIX=/opt/dmaload install`.
PREFIX := "/usr/local"

_default:
    @just --list --unsorted --list-heading "" | sed '/^$/d; /\[/{/\[everyday\]/!Q}'
    @echo "    (just --list shows all recipes)"

# Loads a synthetic model, and compares the time with that of allocate + mmap + memcpy.
[group('everyday')]
demo *ARGS:
    cargo run --release -p dmaload-cli -- demo {{ARGS}}

# Loads a model: `just load model.safetensors --digest sha256`.
[group('everyday')]
load *ARGS:
    cargo run --release -p dmaload-cli -- load {{ARGS}}

# Runs all tests that need no guests and no downloads.
[group('everyday')]
test *ARGS:
    cargo test --workspace {{ARGS}}

# Runs CI's quick checks: formatting, line lengths, references, imports, lints, documentation.
[group('everyday')]
check: fmt-check texts lint doc

# Formats the Rust sources, including those outside the workspace.
[group('everyday')]
fmt *ARGS:
    cargo fmt --all {{ARGS}}
    cargo fmt --manifest-path crates/dmaload-burn/Cargo.toml {{ARGS}}
    cargo fmt --manifest-path crates/dmaload-candle/Cargo.toml {{ARGS}}
    cargo fmt --manifest-path crates/dmaload-python/Cargo.toml {{ARGS}}
    cargo fmt --manifest-path examples/gpu-import/Cargo.toml {{ARGS}}

# Writes docs/performance.md's tables, or those FILTER selects: `just bench reuse` (root, 45 min).
[group('everyday')]
bench FILTER="":
    benches/performance.sh "{{FILTER}}"

# Installs the command and the C library into PREFIX, below DESTDIR if it is set.
[group('everyday')]
install:
    crates/dmaload-capi/install.sh "{{PREFIX}}"

# Runs everything that CI runs.
[group('everyday')]
ci:
    .ci/run

# Checks the formatting.
[group('checks')]
fmt-check: (fmt "--check")

# Checks line lengths, references in documents, and that imports run one way.
[group('checks')]
texts:
    .ci/line-lengths
    .ci/references
    .ci/circles

# Runs the lints.
[group('checks')]
lint:
    cargo clippy --workspace --all-targets -- -D warnings
    cargo clippy -p dmaload-guest --test '*' -- -D warnings

# Builds the documentation of the libraries, and checks the types in their public signatures.
[group('checks')]
doc:
    RUSTDOCFLAGS="-D warnings" \
        cargo doc --no-deps -p dmaload -p dmabuf --features dmaload/verify
    .ci/public-types

# Checks the licenses, license texts and sources of all dependencies (needs cargo-deny).
[group('checks')]
deny:
    .ci/licenses
    cargo deny --config deny.toml check licenses bans sources

# Packages the published crates, and builds them from their packages.
[group('checks')]
package *ARGS:
    .ci/package {{ARGS}}

# Runs the simulator: `just simulate --seeds 1000000`, or `--seed 17` to replay one world.
[group('deep tests')]
simulate *ARGS:
    .ci/simulate {{ARGS}}

# Applies deliberate bugs to a copy of the sources, and fails unless a test catches each of them.
[group('deep tests')]
mutants *NAMES:
    .ci/mutants {{NAMES}}

# Parses damaged headers, indices and manifests, INPUTS of each kind: `just hostile 10000000`.
[group('deep tests')]
hostile INPUTS="1000000" SEED="1":
    DMALOAD_INPUTS={{INPUTS}} DMALOAD_SEED={{SEED}} cargo test --release -p dmaload \
        --features verify --test hostile -- --nocapture

# Tries every interleaving of the loom models.
[group('deep tests')]
loom:
    .ci/loom

# Runs the library's tests under valgrind (an hour).
[group('deep tests')]
valgrind *ARGS:
    .ci/valgrind {{ARGS}}

# Runs random loads, some of which fail or are cancelled, and checks that no resources leak.
[group('deep tests')]
soak *ARGS:
    cargo bench -p dmaload-benches --bench soak -- {{ARGS}}

# Runs tests on stock kernels with real dma-bufs in QEMU: `just guest-test --kernel 7.2-full`.
[group('guests')]
guest-test *ARGS:
    cargo run -p dmaload-guest -- test --jobs 2 {{ARGS}}

# Runs `guest-test`, and writes its results into docs/kernels.md.
[group('guests')]
kernels-md:
    cargo run -p dmaload-guest -- test --jobs 2 --write docs/kernels.md

# Imports a loaded file into Mesa's software Vulkan in a guest (takes minutes).
[group('guests')]
guest-vulkan:
    cargo run -p dmaload-guest -- test --kernel 7.2-full --only vulkan

# Tests the Python package on real dma-bufs in a guest (takes minutes).
[group('guests')]
guest-python:
    cargo run -p dmaload-guest -- test --kernel 7.2-full --only python

# Builds the Python wheel into target/wheels.
[group('python')]
wheel:
    python3 -m venv target/wheel-venv
    target/wheel-venv/bin/python -m pip install --quiet "maturin>=1.9.4,<2"
    target/wheel-venv/bin/maturin build --release --locked --out target/wheels \
        --manifest-path crates/dmaload-python/Cargo.toml

# Tests the Python wheel against safetensors, gguf, NumPy and ml_dtypes: `just python -k errors`.
[group('python')]
python *ARGS:
    .ci/python {{ARGS}}

# Tests the wheel with torch and transformers, and updates docs/python.md (installs gigabytes).
[group('python')]
python-torch *ARGS:
    .ci/python-torch {{ARGS}}

# Installs the C library into a folder, links it, and runs its suite with and without valgrind.
[group('other programs')]
capi:
    .ci/capi

# Writes dmaload.h from the sources.
[group('other programs')]
capi-header:
    DMALOAD_WRITE_HEADER=1 cargo test --quiet -p dmaload-capi --test header

# Compares the llama.cpp example with llama.cpp's own loader (downloads 40 MB).
[group('other programs')]
llama:
    .ci/llama

# Checks that building for another system fails with a message that Linux is required.
[group('other programs')]
other-systems:
    .ci/other-systems

# Loads a small real model, and compares each tensor with what the safetensors crate reads.
[group('other programs')]
real-model:
    cargo run --release -p dmaload-cli -- load "$(.ci/real-model.sh)" --digest sha256
    DMALOAD_REAL_MODEL="$(.ci/real-model.sh)" \
        cargo test -p dmaload --test real_model -- --nocapture

# Compares how dmaload and the reference Python package read GGUF files.
[group('other programs')]
gguf:
    .ci/gguf

# Compares the adapter for candle with candle's own loaders (takes a minute to build).
[group('other programs')]
candle:
    .ci/candle

# Compares the adapter for burn with burn's own store (takes minutes to build).
[group('other programs')]
burn:
    .ci/burn

# Imports a model's dma-bufs into Vulkan: `just gpu-import model.safetensors udmabuf`.
[group('other programs')]
gpu-import *ARGS:
    .ci/gpu-import {{ARGS}}

# Runs the small benches: overlap, and instruction counts for plan, window, slots and parser.
[group('measuring')]
bench-small:
    cargo bench -p dmaload-benches --bench overlap
    cargo test --release -p dmaload --lib instructions::bench -- --ignored --exact --nocapture

# Compares the time to the first layer with candle's own loader, and updates docs/adopt.md.
[group('measuring')]
candle-first-layer:
    .ci/candle --first-layer

# Compares dmaload with other loaders, and updates docs/performance.md (installs gigabytes).
[group('measuring')]
bench-peers:
    benches/performance.sh peers
