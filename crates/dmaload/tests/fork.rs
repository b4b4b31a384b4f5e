//! A process may fork while it loads. After a fork two processes share private pages, and what a
//! device then writes may end up in the child's copy alone. So private memory is kept from forked
//! processes until it is handed over (open(2), NOTES on `O_DIRECT`).
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(unsafe_code, reason = "fork is the test's subject")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::{AnonHeap, MemfdHeap};
use dmaload::{LoadOptions, Loader, Observer, Rejection};

const SEGMENT: usize = 2 << 20;

/// How a child exited.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Exited(i32),
    Signalled(i32),
}

/// Forks; the child calls `act`, and nothing that takes a lock or allocates.
fn in_a_child(act: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child calls only `act`, which the callers below limit to loads of bytes and
    // sleeping, and _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = act();
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(code) };
    }
    assert!(pid > 0, "fork failed");
    pid
}

fn wait_for(pid: i32) -> Ended {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) { Ended::Signalled(libc::WTERMSIG(status)) } else { Ended::Exited(libc::WEXITSTATUS(status)) }
}

/// A child that compares a byte: exits with 0 if it is `expected`.
fn child_sees(byte: &u8, expected: u8) -> Ended {
    // SAFETY: the reference is valid in this process; in the child the page may be missing, which
    // is what is tested.
    wait_for(in_a_child(|| i32::from(unsafe { std::ptr::read_volatile(byte) } != expected)))
}

/// Has children look at bytes that have landed and were not handed over yet.
#[derive(Default)]
struct Curious {
    looked: AtomicUsize,
    seen: AtomicBool,
}

impl Observer for Curious {
    fn bytes(&self, _file_index: usize, _offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        self.looked.fetch_add(1, Ordering::Relaxed);
        if child_sees(&bytes[0], bytes[0]) == Ended::Exited(0) {
            self.seen.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[tokio::test]
async fn child_sees_private_memory_only_once_it_is_complete() {
    let folder = folder();
    let bytes = random_bytes(3 * SEGMENT + 5, 1);
    let path = file(folder.path(), "model.bin", &bytes);
    for (private, loader) in
        [(true, Loader::builder().heap(AnonHeap::default())), (false, Loader::builder().heap(MemfdHeap::default()))]
    {
        // Once into new memory, once into memory of the pool.
        let loader = loader.load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).pool_bytes(64 << 20).build().unwrap();
        for reused in [false, true] {
            let curious = Arc::new(Curious::default());
            let image = loader.load(&path).options(loader.load_options().observer(curious.clone())).await.unwrap();
            assert_eq!(image.report().reused_bytes > 0, reused);
            assert!(curious.looked.load(Ordering::Relaxed) >= 3);
            assert_eq!(curious.seen.load(Ordering::Relaxed), !private, "while it was being loaded");
            let view = image.files()[0].bytes().unwrap();
            assert_eq!(child_sees(&view[SEGMENT + 1], bytes[SEGMENT + 1]), Ended::Exited(0), "when it was handed over");
            drop(view);
            drop(image);
            while loader.pooled_bytes() == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
}

#[tokio::test]
async fn loads_are_correct_while_the_process_forks() {
    let folder = folder();
    let bytes = random_bytes(24 * SEGMENT + 777, 2);
    let path = file(folder.path(), "model.bin", &bytes);
    for (what, loader) in
        [("anon", Loader::builder().heap(AnonHeap::default())), ("memfd", Loader::builder().heap(MemfdHeap::default()))]
    {
        let loader = loader.load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).window_bytes(8 << 20).build().unwrap();
        for route in ROUTES {
            let done = Arc::new(AtomicBool::new(false));
            let forking = {
                let done = Arc::clone(&done);
                std::thread::spawn(move || {
                    let mut children = 0;
                    while !done.load(Ordering::Relaxed) || children < 3 {
                        // It lives for a while, and so does its share of the pages.
                        let nap = libc::timespec { tv_sec: 0, tv_nsec: 3_000_000 };
                        // SAFETY: the timespec is valid, and the second argument may be null.
                        let pid = in_a_child(|| unsafe { libc::nanosleep(&raw const nap, std::ptr::null_mut()) });
                        assert_eq!(wait_for(pid), Ended::Exited(0));
                        children += 1;
                    }
                })
            };
            let image = loader.load(&path).options(loader.load_options().route(route)).await.unwrap();
            done.store(true, Ordering::Relaxed);
            forking.join().unwrap();
            assert_eq!(image.report().route, route);
            assert_same(&image.files()[0].bytes().unwrap(), &bytes, &format!("{what} {route}"));
        }
    }
}
