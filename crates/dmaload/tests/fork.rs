//! Tests for processes that fork during a load. After a fork, parent and child share private pages
//! copy-on-write, and a device's write can then reach only the child's copy (see the notes on
//! `O_DIRECT` in open(2)). Private memory is therefore excluded from forks until it is delivered
//! to the caller.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(unsafe_code, reason = "the tests fork processes")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::{AnonHeap, MemfdHeap};
use dmaload::{LoadOptions, Loader, Observer, Rejection};

const SEGMENT: usize = 2 << 20;

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Exited(i32),
    Signalled(i32),
}

/// Forks a child, which runs only `act` and exits with the code that `act` returns. `act` must not
/// take a lock or allocate. Returns the child's process ID.
fn spawn_child(act: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child calls only `act` and `_exit`. In `act`, the callers below only read memory
    // or sleep, both of which are async-signal-safe.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = act();
        // SAFETY: `_exit` ends the child without running exit handlers or destructors.
        unsafe { libc::_exit(code) };
    }
    assert!(pid > 0, "fork failed");
    pid
}

fn wait_for(pid: i32) -> Ended {
    let mut status = 0;
    // SAFETY: `status` is valid for writes.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) { Ended::Signalled(libc::WTERMSIG(status)) } else { Ended::Exited(libc::WEXITSTATUS(status)) }
}

/// Forks a child that compares a byte. The child exits with 0 if the byte is `expected`, and is
/// killed by a signal if the byte's page is not mapped in the child.
fn child_sees(byte: &u8, expected: u8) -> Ended {
    // SAFETY: `byte` is a valid reference in this process. In the child its page may be unmapped;
    // the read then kills the child with a signal, which the caller tests for.
    wait_for(spawn_child(|| i32::from(unsafe { std::ptr::read_volatile(byte) } != expected)))
}

/// An observer that forks a child for each call, to test whether a child can see bytes that have
/// not been delivered to the caller yet.
#[derive(Default)]
struct ForkingObserver {
    calls: AtomicUsize,
    seen: AtomicBool,
}

impl Observer for ForkingObserver {
    fn bytes(&self, _file_index: usize, _offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if child_sees(&bytes[0], bytes[0]) == Ended::Exited(0) {
            self.seen.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[tokio::test]
async fn child_sees_private_memory_only_once_it_is_handed_over() {
    let folder = folder();
    let bytes = random_bytes(3 * SEGMENT + 5, 1);
    let path = file(folder.path(), "model.bin", &bytes);
    for (private, loader) in
        [(true, Loader::builder().heap(AnonHeap::default())), (false, Loader::builder().heap(MemfdHeap::default()))]
    {
        let loader = loader.load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).pool_bytes(64 << 20).build().unwrap();
        // The first load uses new memory, the second pooled memory.
        for reused in [false, true] {
            let observer = Arc::new(ForkingObserver::default());
            let image = loader.load(&path).options(loader.load_options().observer(observer.clone())).await.unwrap();
            assert_eq!(image.report().reused_bytes > 0, reused);
            assert!(observer.calls.load(Ordering::Relaxed) >= 3);
            assert_eq!(
                observer.seen.load(Ordering::Relaxed),
                !private,
                "a child must see bytes during a load if, and only if, they are not in private memory"
            );
            let view = image.files()[0].bytes().unwrap();
            assert_eq!(
                child_sees(&view[SEGMENT + 1], bytes[SEGMENT + 1]),
                Ended::Exited(0),
                "a child must see the bytes after they were delivered to the caller"
            );
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
                        // The child lives for 3 ms and shares the pages during that time.
                        let nap = libc::timespec { tv_sec: 0, tv_nsec: 3_000_000 };
                        // SAFETY: `nap` is a valid timespec, and the second argument may be null.
                        let pid = spawn_child(|| unsafe { libc::nanosleep(&raw const nap, std::ptr::null_mut()) });
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
