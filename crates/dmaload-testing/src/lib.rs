//! Test helpers shared by several crates: seeded random bytes, safetensors files, files outside
//! the page cache, mounted file systems, FUSE servers in separate processes, and seccomp filters.
//!
//! For tests only. Errors cause a panic, which fails the calling test, unless a function documents
//! that it returns them.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a setup error should fail the test")]

mod random;

pub mod mounted;
pub mod seccomp;
pub mod served;

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

pub use random::{Random, random_bytes};

/// Writes a file that all users can read, and evicts it from the page cache, so that loads read it
/// from storage.
pub fn file(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(bytes).unwrap();
    file.set_permissions(Permissions::from_mode(0o644)).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    path
}

/// Returns the bytes of a safetensors file with the given header and data.
pub fn safetensors(header: &[u8], data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header, data].concat()
}

/// Returns the bytes of a safetensors file with `tensors` tensors, named `t0`, `t1` and so on.
/// Each tensor consists of `tensor_bytes` random bytes.
pub fn safetensors_of(tensors: usize, tensor_bytes: usize, seed: u64) -> Vec<u8> {
    let entry = |number: usize| {
        let (start, end) = (number * tensor_bytes, (number + 1) * tensor_bytes);
        format!(r#""t{number}":{{"dtype":"U8","shape":[{tensor_bytes}],"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!("{{{}}}", (0..tensors).map(entry).collect::<Vec<_>>().join(","));
    safetensors(header.as_bytes(), &random_bytes(tensors * tensor_bytes, seed))
}

/// Asserts that two long byte strings are equal. Reports only the first difference, whereas
/// `assert_eq!` would print both strings.
#[track_caller]
pub fn assert_same(seen: &[u8], expected: &[u8], what: &str) {
    assert_eq!(seen.len(), expected.len(), "{what}: length");
    if seen != expected {
        let at = seen.iter().zip(expected).position(|(a, b)| a != b).unwrap();
        panic!("{what}: differs at {at}: {:02x} instead of {:02x}", seen[at], expected[at]);
    }
}

/// Returns the value of `key` in `/proc/meminfo`, in bytes.
pub fn meminfo_bytes(key: &str) -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let value = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
    value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
