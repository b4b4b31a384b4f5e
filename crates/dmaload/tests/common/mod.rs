//! Shared by the integration tests: files of known random bytes, on a real disk.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::fs;
use std::path::Path;

use dmaload::Route;

/// A folder on a disk, not on tmpfs, so that `O_DIRECT` is real.
pub fn folder() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

#[allow(unused_imports, reason = "each test uses a part of it")]
pub use dmaload_testing::{assert_same, file, random_bytes};

pub const ROUTES: [Route; 6] =
    [Route::UringFixedDirect, Route::UringDirect, Route::PreadDirect, Route::Bounce, Route::UringBuffered, Route::Buffered];
