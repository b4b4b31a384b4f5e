//! Tests that a `tracing` subscriber may call back into the loader, drop loads, and panic. The
//! loader never calls the subscriber on the ring thread or while it holds a lock. Subscribers are
//! global to a process, so this file has one test, which runs in its own process.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::{Load, LoadOptions, Loader};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

static LOADER: OnceLock<Loader> = OnceLock::new();
/// Loads whose progress the subscriber queries, and which it drops one by one.
static SPARE: Mutex<Vec<Load>> = Mutex::new(Vec::new());
static PANICS: AtomicBool = AtomicBool::new(false);
/// How many times each thread has called the subscriber.
static THREADS: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());
static CALLS: AtomicU64 = AtomicU64::new(0);
/// Whether the loader's metrics contradicted each other. The test checks this at its end, because
/// the loader catches panics in the subscriber.
static CONTRADICTION: AtomicBool = AtomicBool::new(false);

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

#[derive(Debug)]
struct CallsBack(AtomicU64);

impl CallsBack {
    fn call_back(&self) {
        if INSIDE.replace(true) {
            return;
        }
        let name = std::thread::current().name().unwrap_or("unnamed").to_owned();
        let is_ours = name.starts_with("dmaload-");
        *THREADS.lock().unwrap().entry(name).or_default() += 1;
        if let Some(loader) = LOADER.get() {
            let metrics = loader.metrics();
            CONTRADICTION.fetch_or(metrics.loads_finished > metrics.loads_started, Ordering::Relaxed);
            loader.memory_bytes();
            loader.pooled_bytes();
            loader.trim_pool(u64::MAX);
            // Drop a load only in every eighth call, so that some loads live long enough to be the
            // one that an event is about. If that load's lock were held, its drop would deadlock.
            let mut spare = SPARE.lock().unwrap();
            spare.iter().for_each(|load| _ = load.progress());
            let dropped = CALLS.fetch_add(1, Ordering::Relaxed).is_multiple_of(8).then(|| spare.pop());
            drop(spare);
            drop(dropped);
        }
        INSIDE.set(false);
        assert!(!(is_ours && PANICS.load(Ordering::Relaxed)), "a mistake in the subscriber");
    }
}

impl Subscriber for CallsBack {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("dmaload")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        self.call_back();
        Id::from_u64(self.0.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {
        self.call_back();
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        self.call_back();
    }

    fn enter(&self, _: &Id) {
        self.call_back();
    }

    fn exit(&self, _: &Id) {
        self.call_back();
    }

    fn try_close(&self, _: Id) -> bool {
        self.call_back();
        true
    }
}

#[test]
fn subscriber_may_call_back_drop_loads_and_panic() {
    let folder = folder();
    let bytes = random_bytes(6_000_000, 1);
    let large = file(folder.path(), "large.bin", &bytes);
    let small: Vec<_> = (0..40).map(|n| file(folder.path(), &format!("{n}.bin"), &random_bytes(9000, n))).collect();
    tracing::subscriber::set_global_default(CallsBack(AtomicU64::new(0))).unwrap();
    let loader = LOADER.get_or_init(|| {
        Loader::builder().load_options(LoadOptions::new().segment_bytes(2 << 20)).pool_bytes(4 << 20).build().unwrap()
    });
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for panics in [false, true] {
            PANICS.store(panics, Ordering::Relaxed);
            for round in 0..4 {
                for route in ROUTES {
                    let options = loader.load_options().route(route).trace(round % 2 == 0);
                    for _ in 0..6 {
                        let spare = loader.load(&large).options(options.clone()).start();
                        SPARE.lock().unwrap().push(spare);
                    }
                    let image = runtime.block_on(loader.load(&large).options(options.clone()).into_future()).unwrap();
                    assert_same(&image.files()[0].bytes().unwrap(), &bytes, route.name());
                    let image = runtime.block_on(loader.load(&small).options(options).into_future()).unwrap();
                    assert_eq!(image.report().bytes, 40 * 9000);
                    runtime.block_on(loader.load("/no/such/file").into_future()).unwrap_err();
                }
            }
        }
        PANICS.store(false, Ordering::Relaxed);
        let spare = std::mem::take(&mut *SPARE.lock().unwrap());
        drop(spare);
        runtime.block_on(loader.clone().shutdown()).unwrap();
        done.send(()).unwrap();
    });
    finished.recv_timeout(Duration::from_secs(120)).expect("a load deadlocked or failed");
    let threads = THREADS.lock().unwrap();
    assert!(!threads.contains_key("dmaload-ring"), "the subscriber was called on the ring thread: {threads:?}");
    assert!(!CONTRADICTION.load(Ordering::Relaxed), "more loads have finished than were started");
    assert!(threads.keys().any(|name| name == "dmaload-tell"), "{threads:?}");
    assert!(threads.keys().any(|name| name.starts_with("dmaload-alloc")), "{threads:?}");
}
