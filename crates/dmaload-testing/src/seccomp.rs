//! Uses seccomp filters to make system calls fail or hang. Containers and services use such
//! filters to refuse calls.
//!
//! Filters cannot be removed. A test that filters its whole process therefore needs its own
//! binary.
#![allow(unsafe_code, reason = "installs filters")]

use std::io::Error;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

/// The threads that a filter applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The calling thread and threads that it starts.
    Thread,
    /// Every thread of the process.
    Process,
}

/// Makes system calls with these numbers fail with `errno`.
pub fn refuse(scope: Scope, calls: &[u32], errno: i32) {
    install(scope, refusal(calls, errno)).unwrap();
}

/// Makes system calls with this number block on every thread of the process until the returned
/// listener is dropped.
#[must_use]
pub fn hang(call: u32) -> OwnedFd {
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    let listener = seccomp(flags, &mut filter(&[call], libc::SECCOMP_RET_USER_NOTIF)).unwrap();
    // SAFETY: the call just created this descriptor, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(listener) }
}

/// Makes the command's system calls with these numbers fail with `errno`.
#[must_use]
pub fn refusing(mut command: Command, calls: &[u32], errno: i32) -> Command {
    let mut filter = refusal(calls, errno);
    // SAFETY: between fork and exec, only async-signal-safe code may run. The closure makes two
    // system calls, and allocates nothing.
    unsafe { command.pre_exec(move || seccomp(0, &mut filter).map(drop)) };
    command
}

/// Installs a filter for the threads in `scope`.
///
/// # Errors
/// Returns the kernel's error, or an error if a thread of the process has another filter.
pub fn install(scope: Scope, mut filter: Vec<sock_filter>) -> Result<(), Error> {
    let flags = if scope == Scope::Process { libc::SECCOMP_FILTER_FLAG_TSYNC } else { 0 };
    match seccomp(flags, &mut filter)? {
        0 => Ok(()),
        thread => Err(Error::other(format!("thread {thread} has another filter"))),
    }
}

/// Builds one instruction of a filter.
pub fn instruction(code: u32, jump_if_true: u8, jump_if_false: u8, value: u32) -> sock_filter {
    sock_filter { code: u16::try_from(code).unwrap(), jt: jump_if_true, jf: jump_if_false, k: value }
}

fn refusal(calls: &[u32], errno: i32) -> Vec<sock_filter> {
    filter(calls, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned())
}

/// Builds a filter that returns `answer` for these calls and allows all others.
fn filter(calls: &[u32], answer: u32) -> Vec<sock_filter> {
    let mut filter = vec![instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0)];
    for &call in calls {
        filter.push(instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, call));
        filter.push(instruction(BPF_RET | BPF_K, 0, 0, answer));
    }
    filter.push(instruction(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    filter
}

/// Installs a filter. May run between fork and exec, so it must not allocate unless it fails.
fn seccomp(flags: libc::c_ulong, filter: &mut [sock_filter]) -> Result<i32, Error> {
    let program = libc::sock_fprog { len: u16::try_from(filter.len()).unwrap(), filter: filter.as_mut_ptr() };
    // SAFETY: PR_SET_NO_NEW_PRIVS takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the program has the address and the length of `filter`, which outlives the call.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if answer < 0 { Err(Error::last_os_error()) } else { Ok(i32::try_from(answer).unwrap()) }
}
