//! The command's only unsafe code: checks standard output before the Rust runtime replaces it.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Returns whether this program was started with standard output closed (`>&-`). Before `main`,
/// the Rust runtime opens /dev/null in its place, so a closed standard output then looks like
/// `>/dev/null`.
pub(crate) fn stdout_was_closed() -> bool {
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}

/// Runs before the runtime: the C library calls the functions in this section before it calls
/// `main`.
// SAFETY: the section holds pointers to functions that are called once each, with arguments that
// they may ignore; this one makes a system call and stores a value, and does not need the runtime.
#[unsafe(link_section = ".init_array")]
#[used]
static CHECK_STDOUT: extern "C" fn() = {
    extern "C" fn check() {
        // SAFETY: `fcntl` takes a number, which need not be an open descriptor, and touches no
        // memory.
        let closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1;
        STDOUT_WAS_CLOSED.store(closed, Ordering::Relaxed);
    }
    check
};
