use super::*;
use crate::memory::buffer::{Sink, Write};
use crate::ring::slots::Slots;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Debug)]
struct ArraySink(Mutex<[u8; 64]>);

impl Sink for ArraySink {
    unsafe fn fill_with(&self, _: usize, _: usize, write: &mut Write<'_>) -> Result<usize, Fault> {
        let mut bytes = [MaybeUninit::new(0); 64];
        let written = write(&mut bytes).map_err(Fault::Read)?;
        // SAFETY: all bytes were initialized above.
        *self.0.lock().unwrap() = bytes.map(|byte| unsafe { byte.assume_init() });
        Ok(written)
    }

    fn populate(&self, _: usize, _: usize) -> Result<(), Fault> {
        Ok(())
    }

    fn runs_foreign_code(&self) -> bool {
        false
    }
}

/// Blocks each copy until it is released, and counts the blocked ones.
#[derive(Debug, Default)]
struct CopyGate {
    held: Mutex<(usize, usize)>,
    changed: Condvar,
}

impl CopyGate {
    fn wait_until_held(&self, copies: usize) {
        drop(self.changed.wait_while(self.held.lock().unwrap(), |(held, _)| *held < copies).unwrap());
    }

    fn release(&self, copies: usize) {
        self.held.lock().unwrap().1 += copies;
        self.changed.notify_all();
    }
}

impl Sink for CopyGate {
    unsafe fn fill_with(&self, _: usize, bytes: usize, _: &mut Write<'_>) -> Result<usize, Fault> {
        let mut held = self.held.lock().unwrap();
        held.0 += 1;
        self.changed.notify_all();
        held = self.changed.wait_while(held, |(_, free)| *free == 0).unwrap();
        held.0 -= 1;
        held.1 -= 1;
        drop(held);
        self.changed.notify_all();
        Ok(bytes)
    }

    fn populate(&self, _: usize, _: usize) -> Result<(), Fault> {
        Ok(())
    }

    fn runs_foreign_code(&self) -> bool {
        true
    }
}

#[test]
fn concurrent_copies_are_bounded_and_all_are_done() {
    let wake = Arc::new(Wake::new().unwrap());
    let mut pool = ThreadPool::new(Arc::clone(&wake), "test", 2);
    let gate = Arc::new(CopyGate::default());
    let from = [7_u8; 64];
    let mut slots = Slots::new();
    let mut copy = |pool: &mut ThreadPool| {
        let to = Place { sink: Arc::clone(&gate) as Arc<dyn Sink>, offset: 0 };
        let copy = StagedCopy { token: slots.insert(()), from: NonNull::from(&from).cast(), to, bytes: 64 };
        // SAFETY: both places outlive all copies, and the sink writes nothing.
        unsafe { pool.copy(copy) };
    };
    (0..4).for_each(|_| copy(&mut pool));
    gate.wait_until_held(2);
    pool.set_max_threads(4);
    (0..4).for_each(|_| copy(&mut pool));
    gate.wait_until_held(4);
    pool.set_max_threads(1);
    gate.release(4);
    gate.wait_until_held(1);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!((gate.held.lock().unwrap().0, pool.threads), (1, 4), "only one thread should copy while the other three wait");
    gate.release(4);
    let mut done = Vec::new();
    while done.len() < 8 {
        wake.wait();
        pool.reap(&mut done);
    }
}

#[test]
fn copy_without_threads_is_done_inline_and_reported() {
    let token = Slots::new().insert(());
    for threads_max in [0, 1] {
        let wake = Arc::new(Wake::new().unwrap());
        let mut pool = ThreadPool::new(Arc::clone(&wake), "test", threads_max);
        let from = [7_u8; 64];
        let sink = Arc::new(ArraySink(Mutex::new([0_u8; 64])));
        let to = Place { sink: Arc::clone(&sink) as Arc<dyn Sink>, offset: 0 };
        let copy = StagedCopy { token, from: NonNull::from(&from).cast(), to, bytes: 64 };
        // SAFETY: both places stay valid until the completion below, and nothing else accesses
        // them until then.
        unsafe { pool.copy(copy) };
        let mut done = Vec::new();
        while done.is_empty() {
            wake.wait();
            pool.reap(&mut done);
        }
        assert_eq!((done.len(), *sink.0.lock().unwrap()), (1, [7; 64]));
        assert_eq!(pool.lacks_threads(), threads_max == 0);
    }
}

/// A sink for memory that a heap populates.
#[derive(Debug)]
struct HeapSink;

impl Sink for HeapSink {
    unsafe fn fill_with(&self, _: usize, _: usize, _: &mut Write<'_>) -> Result<usize, Fault> {
        panic!("a heap's code must not run on the ring thread");
    }

    fn populate(&self, _: usize, _: usize) -> Result<(), Fault> {
        Ok(())
    }

    fn runs_foreign_code(&self) -> bool {
        true
    }
}

#[test]
fn copy_that_would_call_a_heap_is_refused_without_a_thread() {
    let token = Slots::new().insert(());
    let mut pool = ThreadPool::new(Arc::new(Wake::new().unwrap()), "test", 0);
    let from = [7_u8; 64];
    let to = Place { sink: Arc::new(HeapSink), offset: 0 };
    // SAFETY: nothing is copied.
    unsafe { pool.copy(StagedCopy { token, from: NonNull::from(&from).cast(), to, bytes: 64 }) };
    let mut done = Vec::new();
    pool.reap(&mut done);
    assert_eq!(done.len(), 1);
    assert_eq!(done[0].result, Err(Fault::Memory(Errno::AGAIN)));
}

#[derive(Debug)]
struct PanickingSink;

impl Sink for PanickingSink {
    unsafe fn fill_with(&self, _: usize, _: usize, _: &mut Write<'_>) -> Result<usize, Fault> {
        panic!("here");
    }

    fn populate(&self, _: usize, _: usize) -> Result<(), Fault> {
        Ok(())
    }

    fn runs_foreign_code(&self) -> bool {
        true
    }
}

#[test]
fn panic_of_a_pool_thread_is_reported() {
    let wake = Arc::new(Wake::new().unwrap());
    let mut pool = ThreadPool::new(Arc::clone(&wake), "test", 1);
    let from = [7_u8; 64];
    let to = Place { sink: Arc::new(PanickingSink), offset: 0 };
    // SAFETY: nothing is copied.
    unsafe { pool.copy(StagedCopy { token: Slots::new().insert(()), from: NonNull::from(&from).cast(), to, bytes: 64 }) };
    while !pool.has_completions() {
        wake.wait();
    }
    let message = foreign::call(|| pool.reap(&mut Vec::new())).unwrap_err();
    assert_eq!(message, "dmaload-test-0: here");
    assert!(!pool.has_completions());
}

/// Records which offsets are populated, and blocks each copy until it is released.
#[derive(Debug, Default)]
struct CountingSink {
    gate: CopyGate,
    copies: AtomicUsize,
    populated: Mutex<Vec<usize>>,
}

impl Sink for CountingSink {
    unsafe fn fill_with(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault> {
        self.copies.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller upholds the same contract.
        unsafe { self.gate.fill_with(offset, bytes, write) }
    }

    fn populate(&self, offset: usize, _: usize) -> Result<(), Fault> {
        self.populated.lock().unwrap().push(offset);
        Ok(())
    }

    fn runs_foreign_code(&self) -> bool {
        true
    }
}

#[test]
fn copies_go_before_populating_and_make_it_unnecessary() {
    let wake = Arc::new(Wake::new().unwrap());
    let mut pool = ThreadPool::new(Arc::clone(&wake), "test", 1);
    let sink = Arc::new(CountingSink::default());
    let from = [7_u8; 64];
    let mut slots = Slots::new();
    let place = |offset| Place { sink: Arc::clone(&sink) as Arc<dyn Sink>, offset };
    let mut token = || slots.insert(());
    let copy = |token, offset| StagedCopy { token, from: NonNull::from(&from).cast(), to: place(offset), bytes: 64 };
    // SAFETY: both places outlive all copies, and the sink writes nothing. The same holds below.
    unsafe { pool.copy(copy(token(), 0)) };
    sink.gate.wait_until_held(1);
    // The only thread is busy now, so these requests wait for it.
    let requests = [64, 128].map(|offset| PopulateRequest { token: token(), place: place(offset), bytes: 64 });
    let [needless, needed] = [requests[0].token, requests[1].token];
    requests.into_iter().for_each(|request| pool.populate(request));
    // SAFETY: as above.
    unsafe { pool.copy(copy(token(), 64)) };
    let mut done = Vec::new();
    pool.reap(&mut done);
    assert_eq!(
        done.iter().map(|done| done.token).collect::<Vec<_>>(),
        [needless],
        "a request should complete at once if a copy populates the same place"
    );
    sink.gate.release(1);
    while sink.copies.load(Ordering::SeqCst) < 2 {
        thread::yield_now();
    }
    assert!(sink.populated.lock().unwrap().is_empty(), "the second copy should run before the other request");
    sink.gate.release(1);
    while done.len() < 4 {
        wake.wait();
        pool.reap(&mut done);
    }
    assert_eq!((done[3].token, done[3].result), (needed, Ok(0)));
    assert_eq!(*sink.populated.lock().unwrap(), [128]);
}

/// If its read fails, the copy that would make a request unnecessary never starts.
#[test]
fn requests_to_populate_wait_for_a_bounded_number_of_copies() {
    let wake = Arc::new(Wake::new().unwrap());
    let mut pool = ThreadPool::new(Arc::clone(&wake), "test", 1);
    let sink = Arc::new(CountingSink::default());
    let from = [7_u8; 64];
    let mut slots = Slots::new();
    let place = |offset| Place { sink: Arc::clone(&sink) as Arc<dyn Sink>, offset };
    let mut copy = |pool: &mut ThreadPool| {
        let copy = StagedCopy { token: slots.insert(()), from: NonNull::from(&from).cast(), to: place(0), bytes: 64 };
        // SAFETY: both places outlive all copies, and the sink writes nothing.
        unsafe { pool.copy(copy) };
    };
    copy(&mut pool);
    sink.gate.wait_until_held(1);
    pool.populate(PopulateRequest { token: Slots::new().insert(()), place: place(64), bytes: 64 });
    (0..2 * PASSED_OVER_MAX).for_each(|_| copy(&mut pool));
    for copies in 1..=2 * PASSED_OVER_MAX {
        sink.gate.release(1);
        while sink.copies.load(Ordering::SeqCst) <= copies {
            thread::yield_now();
        }
        let populated = !sink.populated.lock().unwrap().is_empty();
        assert_eq!(populated, copies > PASSED_OVER_MAX, "after {copies} copies");
    }
    sink.gate.release(1);
    let mut done = Vec::new();
    while done.len() < 1 + 2 * PASSED_OVER_MAX + 1 {
        pool.reap(&mut done);
        thread::yield_now();
    }
}

#[test]
fn nothing_is_populated_without_a_thread() {
    let mut pool = ThreadPool::new(Arc::new(Wake::new().unwrap()), "test", 0);
    let sink = Arc::new(CountingSink::default());
    let place = Place { sink: Arc::clone(&sink) as Arc<dyn Sink>, offset: 0 };
    pool.populate(PopulateRequest { token: Slots::new().insert(()), place, bytes: 64 });
    let mut done = Vec::new();
    pool.reap(&mut done);
    assert_eq!(done.iter().map(|done| done.result).collect::<Vec<_>>(), [Ok(0)]);
    assert!(sink.populated.lock().unwrap().is_empty());
}
