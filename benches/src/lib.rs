//! This library is empty. The benchmarks are in `benches/`; run them with
//! `cargo bench -p dmaload-benches`.
