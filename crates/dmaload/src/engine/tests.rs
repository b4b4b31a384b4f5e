use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::files::source::Input;
use crate::load::Segments;
use crate::memory::heap;
use crate::options::load::LoadOptions;

#[test]
fn job_of_forgotten_load_frees_its_worker_and_permits() {
    let guard = Guard::start(Settings::default(), Arc::new(crate::memory::heap::AnonHeap::default()), Vec::new()).unwrap();
    let gone = LoadId(u64::MAX);
    let window_bytes = guard.settings().window_bytes;
    for _ in 0..8 {
        guard.engine.jobs.simulate_forgotten_load(gone, Need { bytes: window_bytes, files: 1, ..Need::default() });
    }
    let empty = tempfile::NamedTempFile::new().unwrap();
    let mut events = Segments::start(&guard, Ok(vec![Input::Path(empty.path().to_owned())]), LoadOptions::default(), true);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    // The empty file is a valid load without segments.
    let next = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), events.next()).await });
    assert!(next.expect("the workers should still be running").is_none());
    // The consumer may learn of the end before the scheduler does.
    let taken = || guard.engine.jobs.taken();
    let deadline = Instant::now() + Duration::from_secs(20);
    while taken() != (0, 0) {
        assert!(Instant::now() < deadline, "permits or places among the open loads were never returned: {:?}", taken());
        thread::sleep(Duration::from_millis(1));
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(10), future).await.expect("the future should complete in time")
    })
}

/// Simulates a broken invariant of the driver: no load may hang, and each one must report the
/// reason.
#[test]
fn ring_thread_panic_fails_all_loads_with_its_message() {
    assert_panic_fails_all_loads("the ring thread", |engine| engine.ring.panic());
}

/// The teller must continue after its panic, because it delivers the loads' errors.
#[test]
fn teller_panic_fails_all_loads_with_its_message() {
    assert_panic_fails_all_loads("the teller thread", |engine| engine.mailbox.push([Message::Panic]));
    // Several panics have the same effect.
    assert_panic_fails_all_loads("the teller thread", |engine| {
        engine.mailbox.push([Message::Panic, Message::Panic, Message::Panic]);
    });
}

#[test]
fn first_of_two_panics_is_the_reason() {
    assert_panic_fails_all_loads("the teller thread", |engine| {
        engine.mailbox.push([Message::Panic]);
        engine.ring.panic();
    });
}

fn assert_panic_fails_all_loads(thread: &str, panic: impl FnOnce(&Engine)) {
    // Blocks allocations, to keep the loads from finishing before the panic.
    #[derive(Debug, Default)]
    struct HeldHeap(Mutex<bool>, Condvar);
    impl heap::HeapHooks for HeldHeap {
        fn before_allocate(&self, _: usize) -> Result<(), dmabuf::Error> {
            drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
            Ok(())
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 20).unwrap();
    let gate = Arc::new(HeldHeap::default());
    let heap = heap::Hooked::new(heap::AnonHeap::default(), Arc::clone(&gate));
    let guard = Guard::start(Settings::default(), Arc::new(heap), Vec::new()).unwrap();
    let load = || Segments::start(&guard, Ok(vec![Input::Path(file.path().to_owned())]), LoadOptions::default(), true);
    let mut before = [load(), load()];
    panic(&guard.engine);
    let expect = |segments: &mut Segments| {
        let error = loop {
            match block_on(segments.next()).expect("the load should fail before yielding all segments") {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        let text = error.to_string();
        assert!(text.starts_with(&format!("{thread} of dmaload")) && text.ends_with("panicked: requested by a test"), "{text}");
    };
    before.iter_mut().for_each(expect);
    // Later loads fail in the same way.
    expect(&mut load());
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(block_on(guard.shutdown()), Ok(()), "nothing was in flight, so nothing should be leaked");
    // Other loaders are not affected.
    let other = Guard::start(Settings::default(), Arc::new(heap::AnonHeap::default()), Vec::new()).unwrap();
    let mut segments = Segments::start(&other, Ok(vec![Input::Path(file.path().to_owned())]), LoadOptions::default(), true);
    assert!(block_on(segments.next()).unwrap().is_ok());
}
