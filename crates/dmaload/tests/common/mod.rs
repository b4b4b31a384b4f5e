//! What the integration tests share: files of known random bytes, on a real disk.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that can't make its file has failed")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use dmaload::Route;

/// A folder on a disk, not on tmpfs: `O_DIRECT` is to be the real thing.
pub fn folder() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

/// Random bytes, the same for the same seed. Never a run of zeros: unread memory must show.
pub fn random_bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A file that is not in the page cache: routes are to be taken.
pub fn file(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    path
}

/// Where two long byte strings differ first. `assert_eq!` would print gigabytes.
#[track_caller]
pub fn assert_same(seen: &[u8], expected: &[u8], what: &str) {
    assert_eq!(seen.len(), expected.len(), "{what}: length");
    if seen != expected {
        let at = seen.iter().zip(expected).position(|(a, b)| a != b).unwrap();
        panic!("{what}: differs at {at}: {:02x} instead of {:02x}", seen[at], expected[at]);
    }
}

pub const ROUTES: [Route; 5] = [Route::UringFixedDirect, Route::UringDirect, Route::PreadDirect, Route::Bounce, Route::Buffered];
