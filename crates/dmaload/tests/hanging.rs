//! The ring's thread should never wait for a file system. If the kernel keeps it all the same, a
//! shutdown ends and reports how much memory that thread has.
//!
//! A seccomp filter keeps `io_uring_enter` waiting. It can't be removed, so this is one test in a
//! process of its own.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
#![allow(unsafe_code, reason = "installs a seccomp filter")]

mod common;

use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use common::{file, folder, random_bytes};
use dmaload::{Error, Loader};

const SEGMENT: usize = 2 << 20;
const BYTES: usize = 4 * SEGMENT + 777;
const IO_URING_ENTER: u32 = 426;

/// Makes every thread's calls of this number wait for an answer that the listener never gives.
fn hang(call: u32) -> OwnedFd {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers only.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // SAFETY: the program points to `filter`, which outlives the call.
    let listener = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    assert!(listener >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call has just made this descriptor, and gave it to us alone.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(listener).unwrap()) }
}

#[tokio::test]
async fn a_shutdown_reports_the_memory_of_a_hanging_ring_thread() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(BYTES, 1));
    let loader = Loader::builder().segment_bytes(SEGMENT as u64).shutdown_timeout(Duration::from_millis(300)).build().unwrap();
    // The ring has been set up, and the thread waits in it.
    loader.load(&path).await.unwrap();
    let _listener = hang(IO_URING_ENTER);
    let mut load = loader.load(&path);
    while load.progress().allocated_bytes < BYTES as u64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let seen = tokio::time::timeout(Duration::from_millis(100), load.next()).await;
    assert!(seen.is_err(), "nothing is shown of what was never read: {seen:?}");
    let start = Instant::now();
    let leaked = loader.shutdown().await.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?}", start.elapsed());
    // One thread hangs, the ring's; no worker waits for it.
    assert_eq!((leaked.bytes, leaked.threads), (BYTES.next_multiple_of(4096) as u64, 1), "{leaked}");
    assert!(matches!(load.finish().await, Err(Error::ShutDown)));
}
