//! The benches are in `benches/`: `cargo bench -p dmaload-benches`.
