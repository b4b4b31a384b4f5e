//! Containers and services refuse system calls by a seccomp filter, and so does this.
#![allow(unsafe_code, reason = "a filter is installed between fork and exec")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the command's calls of these numbers fail with `errno`.
pub fn refusing(mut command: Command, calls: &[u32], errno: i32) -> Command {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let refuse = libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
    // Loads the call's number; for each refused one: if equal, answer with the errno; else allow.
    let mut filter = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for &call in calls {
        filter.push(statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call));
        filter.push(statement(libc::BPF_RET | libc::BPF_K, 0, 0, refuse));
    }
    filter.push(statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    let install = move || {
        let program = libc::sock_fprog { len: u16::try_from(filter.len()).unwrap(), filter: filter.as_mut_ptr() };
        // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers only.
        let allowed = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: the program points to `filter`, which outlives the call.
        let installed = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        if allowed == 0 && installed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(install) };
    command
}
