//! Empty: the benches are in `benches/`. Run them with `cargo bench -p dmaload-benches`.
