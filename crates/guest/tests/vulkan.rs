//! Tests that a Vulkan driver can import a loaded file. The driver is Mesa's lavapipe, which runs
//! on the CPU and can import dma-bufs if the kernel has `/dev/udmabuf`. `examples/gpu-import` uses
//! this driver to copy and sum each segment, and compares both results with the file.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]

mod common;

use std::process::{Command, Output};

use common::{MIB, file, format_sizes, in_root};
use dmaload_guest::record_row;

/// The mount point of the disk image that contains the driver (see `src/roots.rs`).
const ROOT: &str = "/vulkan";

fn run_gpu_import(file: &str, heap: &str) -> Output {
    Command::new("/bin/chroot")
        .args([ROOT, "/gpu-import", file, heap])
        .env_clear()
        .env("VK_DRIVER_FILES", "/lavapipe.json")
        .env("HOME", "/tmp")
        .output()
        .unwrap()
}

#[test]
fn lavapipe_imports_a_loaded_file_and_sums_it() {
    let len = 24 * MIB + 777;
    // The path must not contain symbolic links, because their targets do not exist below the new
    // root.
    let path = file(len).canonicalize().unwrap();
    for heap in ["udmabuf", "dma-heap:system"] {
        let output = in_root(ROOT, || run_gpu_import(path.to_str().unwrap(), heap));
        let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{heap}: {said}{error}");
        assert!(
            said.contains("llvmpipe") && said.contains(&format!("{len} bytes equal to the file's, {heap}")),
            "{heap}: {said}{error}"
        );
        record_row("vulkan", &[heap, &format_sizes(&[len]), "imported; a compute shader's copy and sum equal the file's"]);
    }
}
