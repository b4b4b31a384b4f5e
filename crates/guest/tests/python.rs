//! Tests the Python package on real dma-bufs. CPython runs `python.py` in a root file system of
//! its own (see `src/roots.rs`).
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]

mod common;

use std::fs;
use std::process::Command;

use common::in_root;

const ROOT: &str = "/python";

#[test]
fn tensors_in_dma_bufs_reach_importers_and_nothing_else() {
    let script = "/disk/python.py";
    fs::write(script, include_str!("python.py")).unwrap();
    for heap in ["udmabuf", "dma-heap:system", "dma-buf"] {
        let output = in_root(ROOT, || {
            Command::new("/bin/chroot")
                .args([ROOT, "/usr/bin/python3.13", "-B", "-X", "dev", "-W", "error", script, heap])
                .env_clear()
                .env("PYTHONPATH", "/packages")
                .env("HOME", "/tmp")
                .output()
                .unwrap()
        });
        let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{heap}: {said}{error}");
        assert_eq!(said.trim_end(), format!("{heap}: all checks passed"), "{error}");
    }
}
