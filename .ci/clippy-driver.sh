# Makes cargo lint a workspace's crates while it compiles them, and fail if it finds anything:
# `source .ci/clippy-driver.sh`. These are the variables that `cargo clippy` sets, but that command
# would check all crates and their dependencies in addition to compiling them for the tests.
CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER=$(rustc --print sysroot)/bin/clippy-driver
CLIPPY_ARGS=-D__CLIPPY_HACKERY__warnings
export CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER CLIPPY_ARGS
