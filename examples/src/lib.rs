//! The examples are in `examples/`: `cargo run -p dmaload-examples --example hello -- MODEL`.
