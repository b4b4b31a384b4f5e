//! Tests for requesting tensors by name. A tensor is available as soon as its bytes are loaded,
//! even if the rest of the load is held back.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

#[path = "../common/mod.rs"]
mod common;
mod wakes;

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use common::{ROUTES, assert_same, file, folder};
use dmaload::heap::{HeapError, HeapHooks, Hooked, MemfdHeap};
use dmaload::{Error, ErrorKind, Format, Load, LoadOptions, Loader, Observer, Rejection, Shard, Source, Tensor, Verify};

const SEGMENT: u64 = 2 << 20;
const TENSORS: usize = 12;
const TENSOR_BYTES: usize = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a future must stay pending to count as blocked.
const QUIET_TIME: Duration = Duration::from_millis(200);

/// An observer that blocks at the first bytes past an offset of a file, until the test sets a
/// verdict.
#[derive(Debug)]
struct Gate {
    file: usize,
    offset: u64,
    /// The verdict on bytes past the offset, once decided.
    verdict: Mutex<Option<Result<(), Rejection>>>,
    decided: Condvar,
}

impl Gate {
    fn before(file: usize, offset: u64) -> Arc<Self> {
        Arc::new(Gate { file, offset, verdict: Mutex::default(), decided: Condvar::new() })
    }

    fn decide(&self, verdict: Result<(), Rejection>) {
        *self.verdict.lock().unwrap() = Some(verdict);
        self.decided.notify_all();
    }

    fn open(&self) {
        self.decide(Ok(()));
    }

    fn pass(&self) -> Result<(), Rejection> {
        let verdict = self.decided.wait_while(self.verdict.lock().unwrap(), |verdict| verdict.is_none()).unwrap();
        verdict.clone().unwrap()
    }
}

impl Observer for Gate {
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        if (file_index, offset + bytes.len() as u64) > (self.file, self.offset) { self.pass() } else { Ok(()) }
    }
}

/// A verifier that blocks the planning of a load until `gate` opens.
struct Planned {
    gate: Arc<Gate>,
    observer: Arc<dyn Observer>,
}

impl Verify for Planned {
    fn begin(&self, _files: &[(&Path, u64)], _format: Format) -> dmaload::Result<Arc<dyn Observer>> {
        self.gate.pass().unwrap();
        Ok(Arc::clone(&self.observer))
    }

    fn describe(&self) -> String {
        "a verifier that holds back planning".to_owned()
    }
}

fn options() -> LoadOptions {
    LoadOptions::new().segment_bytes(SEGMENT)
}

fn model(folder: &Path, name: &str, seed: u64) -> (PathBuf, Vec<u8>) {
    let bytes = dmaload_testing::safetensors_of(TENSORS, TENSOR_BYTES, seed);
    (file(folder, name, &bytes), bytes)
}

fn check(tensor: &Tensor, number: usize, file: &[u8]) {
    assert_eq!(tensor.name(), format!("t{number}"));
    let start = file.len() - (TENSORS - number) * TENSOR_BYTES;
    assert_same(&tensor.bytes().unwrap(), &file[start..start + TENSOR_BYTES], tensor.name());
}

/// The offset at which the last segment of `file` starts.
fn last_segment_start(file: &[u8]) -> u64 {
    (file.len() as u64 - 1) / SEGMENT * SEGMENT
}

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}

async fn is_pending(future: impl Future) -> bool {
    tokio::time::timeout(QUIET_TIME, future).await.is_err()
}

fn poll<F: Future + ?Sized>(future: Pin<&mut F>, waker: &Waker) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(waker))
}

/// A progress display polls `is_finished` before it takes the image.
#[tokio::test(flavor = "multi_thread")]
async fn load_is_finished_once_its_last_segment_arrives() {
    let folder = folder();
    let (path, bytes) = model(folder.path(), "model.safetensors", 1);
    let gate = Gate::before(0, last_segment_start(&bytes));
    let load = Loader::new().unwrap().load(&path).options(options().observer(gate.clone())).start();
    in_time("the first tensor", load.tensor("t0")).await.unwrap();
    tokio::time::sleep(QUIET_TIME).await;
    assert!(!load.is_finished(), "a load must not be finished while its last segment is held back");
    gate.open();
    let finished = async {
        while !load.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    in_time("the end of the load", finished).await;
    let mut load = Box::pin(load.finish());
    let image = poll(load.as_mut(), Waker::noop());
    assert!(matches!(image, Poll::Ready(Ok(_))), "a finished load must return its image at the first poll");
    // A failed load is finished, too.
    let load = Loader::new().unwrap().load(folder.path().join("missing")).start();
    let finished = async {
        while !load.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    in_time("the failure", finished).await;
    assert!(load.finish().await.is_err());
}

/// An empty list of paths, for instance from a glob without matches, is not an empty model.
#[tokio::test]
async fn load_without_files_is_an_error() {
    let loader = Loader::new().unwrap();
    for source in [Source::paths([""; 0]), Source::from(Vec::<String>::new()), Source::paths([""; 0]).range(0..1)] {
        let error = loader.load(source.clone()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(loader.load(source.clone()).segments().next().await.unwrap().is_err());
        assert!(loader.load(source.clone()).tensors().next().await.unwrap().is_err());
        assert!(loader.load(source).start().tensor("t0").await.is_err());
    }
}

/// Hooks that let the first `left` allocations succeed, and block all others until `gate` opens.
#[derive(Debug)]
struct HeldAllocations {
    left: AtomicUsize,
    gate: Arc<Gate>,
}

impl HeapHooks for HeldAllocations {
    fn before_allocate(&self, _: usize) -> Result<(), HeapError> {
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if left.is_err() {
            self.gate.pass().unwrap();
        }
        Ok(())
    }
}

/// A sharded tensor is read row by row. Its first and last rows can share disk blocks with
/// neighboring tensors and arrive with them while the rows in between are still missing.
#[tokio::test(flavor = "multi_thread")]
async fn tensor_shard_waits_for_its_middle_rows() {
    let folder = folder();
    let header = r#"{"a1":{"dtype":"U8","shape":[1000],"data_offsets":[0,1000]},
        "b":{"dtype":"U8","shape":[4000,2048],"data_offsets":[1000,8193000]},
        "a2":{"dtype":"U8","shape":[1000],"data_offsets":[8193000,8194000]}}"#;
    // The data starts 1500 bytes into a block, so "b" starts and ends 2500 bytes into a
    // block.
    let header = format!("{header:<1492}");
    let data = dmaload_testing::random_bytes(8_194_000, 1);
    let bytes = [&1492u64.to_le_bytes()[..], header.as_bytes(), &data].concat();
    let path = file(folder.path(), "model.safetensors", &bytes);
    let gate = Gate::before(0, 0);
    let hooks = HeldAllocations { left: AtomicUsize::new(2), gate: gate.clone() };
    let loader = Loader::builder().heap(Hooked::new(MemfdHeap::default(), hooks)).build().unwrap();
    let options = LoadOptions::new().packed(false).tensors(["a*", "b"]);
    let options = options.shard(Shard { rank: 0, world_size: 2, dim: Some(1) });
    let load = loader.load(&path).options(options).start();
    let a1 = in_time("a one-dimensional tensor", load.tensor("a1")).await.unwrap();
    in_time("the other one-dimensional tensor", load.tensor("a2")).await.unwrap();
    assert!(a1.file().tensor("b").is_none() && a1.file().tensors().all(|tensor| tensor.name() == "a1"));
    assert!(is_pending(load.tensor("b")).await, "`b` must not arrive before memory for its middle rows is allocated");
    gate.open();
    let b = in_time("all rows", load.tensor("b")).await.unwrap();
    let expected: Vec<u8> = data[1000..8_193_000].chunks(2048).flat_map(|row| row[..1024].to_vec()).collect();
    assert_same(&b.to_vec().unwrap(), &expected, "b");
    assert_eq!(b.parts().iter().map(|part| part.len).sum::<usize>(), expected.len());
}

#[tokio::test]
async fn tensor_arrives_before_the_load_ends() {
    let folder = folder();
    let (path, bytes) = model(folder.path(), "model.safetensors", 1);
    let last = TENSORS - 1;
    for route in ROUTES {
        let loader = Loader::new().unwrap();
        let gate = Gate::before(0, last_segment_start(&bytes));
        let load = loader.load(&path).options(options().route(route).observer(gate.clone())).start();
        // Some of these tensors lie within one segment; others span two.
        for number in [0, 1, 2, 7] {
            check(&in_time("a tensor", load.tensor(&format!("t{number}"))).await.unwrap(), number, &bytes);
        }
        let name = format!("t{last}");
        assert!(is_pending(load.tensor(&name)).await, "{route}: {name} must not arrive while the last segment is held back");
        assert!(is_pending(load.tensor("t10")).await, "{route}: t10 must not arrive, because it needs the last segment, too");
        // The header has been read, so requests for unknown names fail at once.
        for unknown in ["t12", "", "T0"] {
            let error = in_time("an error", load.tensor(unknown)).await.unwrap_err();
            assert_eq!(error, Error::NoSuchTensor(unknown.to_owned()));
        }
        assert!(load.progress().read_bytes < bytes.len() as u64, "{route}: {:?}", load.progress());
        gate.open();
        check(&in_time("the last tensor", load.tensor(&name)).await.unwrap(), last, &bytes);
        let image = in_time("the image", load.finish()).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, route.name());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_tasks_can_wait_at_once() {
    let folder = folder();
    let (path, bytes) = model(folder.path(), "model.safetensors", 2);
    let bytes = Arc::new(bytes);
    let gate = Gate::before(0, 0);
    let load = Arc::new(Loader::new().unwrap().load(&path).options(options().observer(gate.clone())).start());
    let tasks: Vec<_> = (0..200)
        .map(|task| {
            let (load, bytes, number) = (Arc::clone(&load), Arc::clone(&bytes), task % (TENSORS + 1));
            tokio::spawn(async move {
                match load.tensor(&format!("t{number}")).await {
                    Ok(tensor) => check(&tensor, number, &bytes),
                    Err(error) => assert_eq!((error, number), (Error::NoSuchTensor(format!("t{TENSORS}")), TENSORS)),
                }
            })
        })
        .collect();
    tokio::time::sleep(QUIET_TIME).await;
    gate.open();
    for task in tasks {
        in_time("a waiter", task).await.unwrap();
    }
    let load = Arc::into_inner(load).unwrap();
    assert_same(&load.await.unwrap().files()[0].bytes().unwrap(), &bytes, "the image");
}

#[tokio::test]
async fn name_is_unknown_only_after_all_headers_are_read() {
    let folder = folder();
    let loader = Loader::new().unwrap();
    let (large, bytes) = model(folder.path(), "large.safetensors", 5);
    let small = file(folder.path(), "small.safetensors", &dmaload_testing::safetensors_of(1, 64, 6));
    // No name is known before the load is planned.
    let gate = Gate::before(0, 0);
    let load = loader.load(&large).options(options().verify(Planned { gate: gate.clone(), observer: gate.clone() })).start();
    assert!(is_pending(load.tensor("none")).await && is_pending(load.tensor("t0")).await);
    gate.open();
    assert_eq!(in_time("an error", load.tensor("none")).await.unwrap_err(), Error::NoSuchTensor("none".to_owned()));
    check(&in_time("a tensor", load.tensor("t0")).await.unwrap(), 0, &bytes);
    drop(load);

    // The header of a small file is read with its data, which the gate holds back. Until then, the
    // load cannot rule out that the small file contains `t3` as well. (It does contain `t0`.)
    let gate = Gate::before(1, 0);
    let load = loader.load([&large, &small]).options(options().observer(gate.clone())).start();
    for name in ["none", "t3", "t0"] {
        assert!(is_pending(load.tensor(name)).await, "{name}");
    }
    gate.open();
    check(&in_time("a tensor", load.tensor("t3")).await.unwrap(), 3, &bytes);
    let (none, both) = (in_time("an error", load.tensor("none")).await, in_time("an error", load.tensor("t0")).await);
    let image = load.await.unwrap();
    assert_eq!(none.unwrap_err(), image.tensor("none").unwrap_err());
    let ambiguous = both.unwrap_err();
    assert!(matches!(ambiguous, Error::AmbiguousTensor { .. }), "{ambiguous}");
    assert_eq!(ambiguous, image.tensor("t0").unwrap_err());
}

#[tokio::test]
async fn index_resolves_a_tensor_before_all_headers_are_read() {
    let folder = folder();
    let [a, b] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    // Both files contain tensors with the same names. The tensors of the second file are smaller,
    // and its header is read late.
    let (_, first) = model(folder.path(), a, 7);
    file(folder.path(), b, &dmaload_testing::safetensors_of(TENSORS, 64, 8));
    let entry = |number: usize| format!(r#""t{number}":"{}""#, if number < 6 { a } else { b });
    let entries = (0..TENSORS).map(entry).collect::<Vec<_>>().join(",");
    file(folder.path(), "model.safetensors.index.json", format!(r#"{{"weight_map":{{{entries}}}}}"#).as_bytes());
    let gate = Gate::before(1, 0);
    let load = Loader::new().unwrap().load(folder.path()).options(options().observer(gate.clone())).start();
    check(&in_time("a tensor in the first file", load.tensor("t5")).await.unwrap(), 5, &first);
    assert!(is_pending(load.tensor("t6")).await && is_pending(load.tensor("none")).await);
    gate.open();
    let tensor = in_time("a tensor in the second file", load.tensor("t6")).await.unwrap();
    assert_eq!((tensor.bytes().unwrap().len(), tensor.file().path()), (64, folder.path().join(b).as_path()));
    assert!(matches!(in_time("an error", load.tensor("none")).await, Err(Error::NoSuchTensor(_))));
    let image = load.await.unwrap();
    for number in 0..TENSORS {
        let expected = if number < 6 { TENSOR_BYTES } else { 64 };
        assert_eq!(image.tensor(&format!("t{number}")).unwrap().bytes().unwrap().len(), expected);
    }
}

#[tokio::test]
async fn unselected_tensor_is_reported_as_not_loaded() {
    let folder = folder();
    let (path, bytes) = model(folder.path(), "model.safetensors", 9);
    let loader = Loader::new().unwrap();
    let load = loader.load(&path).options(options().tensors(["t1", "t7"])).start();
    let error = in_time("an error", load.tensor("t2")).await.unwrap_err();
    let unknown = in_time("an error", load.tensor("t99")).await.unwrap_err();
    check(&in_time("a tensor", load.tensor("t7")).await.unwrap(), 7, &bytes);
    let image = load.await.unwrap();
    assert!(matches!(error, Error::NotLoaded { .. }), "{error}");
    assert_eq!([error, unknown], ["t2", "t99"].map(|name| image.tensor(name).unwrap_err()));
}

#[tokio::test]
async fn every_waiter_gets_the_error_of_a_failed_load() {
    let folder = folder();
    let (path, bytes) = model(folder.path(), "model.safetensors", 10);
    let gate = Gate::before(0, last_segment_start(&bytes));
    let load = Loader::new().unwrap().load(&path).options(options().observer(gate.clone())).start();
    check(&in_time("a tensor", load.tensor("t0")).await.unwrap(), 0, &bytes);
    let fail = async {
        tokio::time::sleep(QUIET_TIME).await;
        gate.decide(Err("requested by a test".into()));
    };
    let waiters = async { tokio::join!(load.tensor("t11"), load.tensor("t11"), fail) };
    let (one, other, ()) = in_time("errors", waiters).await;
    let error = one.unwrap_err();
    assert!(matches!(&error, Error::Rejected { reason, .. } if reason == "requested by a test"), "{error}");
    assert_eq!(other.unwrap_err(), error);
    // Requests for tensors that have already arrived, and for unknown names, get the same error.
    for name in ["t0", "t11", "none"] {
        assert_eq!(in_time("an error", load.tensor(name)).await.unwrap_err(), error, "{name}");
    }
    assert_eq!(load.await.unwrap_err(), error);

    let missing = Loader::new().unwrap().load(folder.path().join("missing")).start();
    assert!(matches!(in_time("an error", missing.tensor("t0")).await, Err(Error::File { .. })));
}

#[test]
fn threads_wait_for_tensors_without_a_runtime() {
    let folder = folder();
    let (path, bytes) = model(folder.path(), "model.safetensors", 11);
    let gate = Gate::before(0, 0);
    let loader = Loader::new().unwrap();
    let load: Arc<Load> = Arc::new(loader.load(&path).options(options().observer(gate.clone())).start());
    let (sender, receiver) = mpsc::channel();
    for number in 0..=TENSORS {
        let (load, sender) = (Arc::clone(&load), sender.clone());
        // Not joined: a thread that waits forever must fail the test, not hang it.
        thread::spawn(move || {
            let tensor = load.tensor_blocking(&format!("t{number}"));
            // If the test has failed, the receiver is gone.
            let _ = sender.send((number, tensor));
        });
    }
    // The header has been read, so the unknown name fails at once.
    let (number, missing) = receiver.recv_timeout(PATIENCE).unwrap();
    assert_eq!((number, missing.unwrap_err()), (TENSORS, Error::NoSuchTensor(format!("t{TENSORS}"))));
    assert!(receiver.recv_timeout(QUIET_TIME).is_err(), "a tensor arrived while its bytes were held back");
    gate.open();
    for _ in 0..TENSORS {
        let (number, tensor) = receiver.recv_timeout(PATIENCE).unwrap();
        check(&tensor.unwrap(), number, &bytes);
    }
    check(&load.tensor_blocking("t3").unwrap(), 3, &bytes);
}

#[tokio::test]
async fn load_starts_only_when_its_request_is_consumed() {
    let folder = folder();
    let (path, _) = model(folder.path(), "model.safetensors", 12);
    let loader = Loader::new().unwrap();
    let request = loader.load(&path);
    assert_eq!(loader.metrics().loads_started, 0);
    drop(request.start());
    assert_eq!(loader.metrics().loads_started, 1);
    let future = loader.load(&path).into_future();
    assert_eq!(loader.metrics().loads_started, 2, "the load must start before the first poll");
    in_time("the image", future).await.unwrap();
    let refused = loader.load(dmaload::Source::from([&path, &path]).range(0..8)).await.unwrap_err();
    assert!(matches!(refused, Error::Config(_)), "{refused}");
}
