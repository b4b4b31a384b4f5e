//! The only unsafe code of the command: a look at standard output before the runtime mends it.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Whether this program was started with standard output closed (`>&-`). The runtime of Rust opens /dev/null in its place before
/// `main`, which then can't be told from `>/dev/null`.
pub(crate) fn stdout_was_closed() -> bool {
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}

/// Runs before the runtime: the C library calls what this section lists, one after the other, before it calls `main`.
// SAFETY: the section holds pointers to functions that are called once each, with or without arguments that these may ignore;
// this one makes one system call and one store, and needs nothing of the runtime.
#[unsafe(link_section = ".init_array")]
#[used]
static LOOK_AT_STDOUT: extern "C" fn() = {
    extern "C" fn look() {
        // SAFETY: it takes a number, which need not be that of an open descriptor, and touches no memory.
        let closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1;
        STDOUT_WAS_CLOSED.store(closed, Ordering::Relaxed);
    }
    look
};
