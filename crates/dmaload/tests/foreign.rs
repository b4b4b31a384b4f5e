//! Tests for the caller's code that runs on the loader's threads, including wakers that poll and
//! code that panics. The loader never calls such code on the ring thread or while it holds a lock.
//! A panic fails only the load that the code belongs to, with an error that names the code. A
//! panic in a waker fails only the future that was polled with that waker, and a panic in a
//! destructor is ignored.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::{HeapError, HeapHooks, Hooked, MemfdHeap};
use dmaload::{Error, Format, LoadOptions, Loader, Observer, Rejection, Verify};
use futures_core::Stream;

const SEGMENT: u64 = 2 << 20;
const PATIENCE: Duration = Duration::from_secs(15);

/// The names of the threads that ran the caller's code.
static THREADS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn note_thread() {
    let name = std::thread::current().name().unwrap_or("unnamed").to_owned();
    assert_ne!(name, "dmaload-ring", "the caller's code must not run on the ring thread");
    THREADS.lock().unwrap().insert(name);
}

fn safetensors(folder: &Path, tensors: usize, bytes: usize) -> PathBuf {
    file(folder, "model.safetensors", &dmaload_testing::safetensors_of(tensors, bytes, 3))
}

type Body = Pin<Box<dyn Future<Output = ()> + Send>>;

const IDLE: u8 = 0;
const RUNNING: u8 = 1;
const WOKEN: u8 = 2;

/// A task that polls its body inside `wake`, on the thread that wakes it.
struct Inline {
    body: Mutex<Option<Body>>,
    state: AtomicU8,
}

impl Inline {
    fn spawn(body: impl Future<Output = ()> + Send + 'static) {
        Arc::new(Inline { body: Mutex::new(Some(Box::pin(body))), state: AtomicU8::new(IDLE) }).run();
    }

    fn run(self: &Arc<Self>) {
        if self.state.fetch_max(RUNNING, Ordering::AcqRel) != IDLE {
            // Another thread is polling the task, or this one is, further up the stack. The task
            // is polled once more afterwards.
            self.state.fetch_max(WOKEN, Ordering::AcqRel);
            return;
        }
        loop {
            let waker = Waker::from(Arc::clone(self));
            let mut body = self.body.lock().unwrap();
            if let Some(polled) = &mut *body
                && polled.as_mut().poll(&mut Context::from_waker(&waker)).is_ready()
            {
                // Drops the loads and loaders that the body holds.
                *body = None;
            }
            drop(body);
            if self.state.compare_exchange(RUNNING, IDLE, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return;
            }
            self.state.store(RUNNING, Ordering::Release);
        }
    }
}

impl Wake for Inline {
    fn wake(self: Arc<Self>) {
        note_thread();
        self.run();
    }
}

/// Runs a task inside wakers and returns its result.
#[track_caller]
fn run_inline<T: Send + 'static>(what: &str, body: impl Future<Output = T> + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    Inline::spawn(async move {
        let result = body.await;
        let _ = sender.send(result);
    });
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|error| {
        // Exits instead of unwinding: after a deadlock, drops would wait for the lock forever. The
        // test harness does not capture this output, unlike that of `eprintln!`.
        let _ = writeln!(std::io::stderr(), "panicked: {what}:\nthe task did not finish: {error}");
        std::process::exit(101)
    })
}

#[test]
fn waker_that_polls_does_not_deadlock() {
    let folder = folder();
    let path = safetensors(folder.path(), 12, 1_000_000);
    for route in ROUTES {
        let loader = Loader::builder()
            .load_options(LoadOptions::new().route(route).segment_bytes(SEGMENT))
            .allocator_threads(1)
            .build()
            .unwrap();
        let (own, own_path) = (loader.clone(), path.clone());
        run_inline("a load, dropped at its end", async move { own.load(&own_path).await.map(|image| image.report().bytes) })
            .unwrap();

        let (own, own_path) = (loader.clone(), path.clone());
        run_inline("a load, dropped after a segment, and another load", async move {
            let mut load = own.load(&own_path).start();
            load.next().await.unwrap().unwrap();
            drop(load);
            own.load(&own_path).await.unwrap();
        });

        let (own, own_path) = (loader.clone(), path.clone());
        let segments = run_inline("segments", async move {
            let mut segments = own.load(&own_path).segments();
            let mut count = 0;
            while let Some(segment) = segments.next().await {
                segment.unwrap();
                count += 1;
            }
            count
        });
        assert!(segments > 4);

        let (own, own_path) = (loader.clone(), path.clone());
        run_inline(
            "segments, dropped after one",
            async move { own.load(&own_path).segments().next().await.unwrap().unwrap().len() },
        );

        let (own, own_path) = (loader.clone(), path.clone());
        let names = run_inline("tensors", async move {
            let mut tensors = own.load(&own_path).tensors();
            let mut names = Vec::new();
            while let Some(tensor) = tensors.next().await {
                names.push(tensor.unwrap().name().to_owned());
            }
            names
        });
        assert_eq!(names.len(), 12);

        let (own, own_path) = (loader.clone(), path.clone());
        run_inline("tensors by name, in reverse order", async move {
            let load = own.load(&own_path).start();
            for name in names.iter().rev() {
                load.tensor(name).await.unwrap();
            }
        });

        let own = loader.clone();
        let missing = run_inline("a load that fails", async move { own.load("/no/such/file").await.map(drop) });
        assert!(matches!(missing, Err(Error::File { .. })), "{missing:?}");

        let (own, own_path) = (loader.clone(), path.clone());
        let ended = run_inline("a shutdown during a load", async move {
            let mut load = own.load(&own_path).start();
            let _ = load.next().await;
            let shutdown = own.shutdown().await;
            (shutdown, load.finish().await.map(drop))
        });
        ended.0.unwrap();
        assert!(matches!(ended.1, Ok(()) | Err(Error::ShutDown)), "{:?}", ended.1);
        run_inline("the last shutdown", loader.shutdown()).unwrap();
    }
}

#[test]
fn last_loader_can_be_dropped_inside_a_waker() {
    let folder = folder();
    let path = safetensors(folder.path(), 12, 1_000_000);
    for _ in 0..20 {
        let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT)).build().unwrap();
        let path = path.clone();
        run_inline("a load that owns the last loader", async move { loader.load(path).await.map(drop) }).unwrap();
    }
}

#[derive(Default)]
struct PanicsWhenWoken(AtomicUsize);

impl Wake for PanicsWhenWoken {
    fn wake(self: Arc<Self>) {
        note_thread();
        self.0.fetch_add(1, Ordering::SeqCst);
        panic!("in a waker");
    }
}

#[derive(Default)]
struct CountWakes(AtomicUsize);

impl Wake for CountWakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Waits until a waker has been called. Polling earlier would replace the waker.
#[track_caller]
fn wait_until_woken(wakes: &AtomicUsize) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while wakes.load(Ordering::SeqCst) == 0 {
        assert!(std::time::Instant::now() < deadline, "the waker was not called in time");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn waker_that_panics_fails_only_its_own_wait() {
    let folder = folder();
    let path = safetensors(folder.path(), 12, 1_000_000);
    let expected = std::fs::read(&path).unwrap();
    let panicked = || {
        let code = "the waker of a task".to_owned();
        Error::Panicked { code, message: "in a waker".to_owned() }
    };
    for route in ROUTES {
        let gate = Gate::default();
        let loader = Loader::builder()
            .heap(Hooked::new(MemfdHeap::default(), gate.clone()))
            .load_options(LoadOptions::new().route(route).segment_bytes(SEGMENT))
            .allocator_threads(1)
            .build()
            .unwrap();
        let wakers: [Arc<PanicsWhenWoken>; 4] = Default::default();
        let [of_next, of_segments, of_tensor, of_finish] = wakers.clone().map(Waker::from);
        let mut load = loader.load(&path).start();
        let mut segments = loader.load(&path).segments();
        let kept = loader.load(&path).start();
        let mut finish = loader.load(&path).into_future();
        assert!(
            Pin::new(&mut load).poll_next(&mut Context::from_waker(&of_next)).is_pending(),
            "the load must wait for the heap"
        );
        assert!(Pin::new(&mut segments).poll_next(&mut Context::from_waker(&of_segments)).is_pending());
        assert!(finish.as_mut().poll(&mut Context::from_waker(&of_finish)).is_pending());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let in_time = |what, future: Pin<&mut dyn Future<Output = dmaload::Result<()>>>| {
            runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await }).expect(what)
        };
        {
            // Three futures wait for the same tensor; the waker of the middle one panics.
            let mut panicking = std::pin::pin!(kept.tensor("t9"));
            let before = std::pin::pin!(async { kept.tensor("t9").await.map(drop) });
            let after = std::pin::pin!(async { kept.tensor("t9").await.map(drop) });
            let mut others: [Pin<&mut dyn Future<Output = dmaload::Result<()>>>; 2] = [before, after];
            let [wakes_before, wakes_after] = [Arc::new(CountWakes::default()), Arc::new(CountWakes::default())];
            assert!(others[0].as_mut().poll(&mut Context::from_waker(&wakes_before.clone().into())).is_pending());
            assert!(panicking.as_mut().poll(&mut Context::from_waker(&of_tensor)).is_pending());
            assert!(others[1].as_mut().poll(&mut Context::from_waker(&wakes_after.clone().into())).is_pending());
            gate.open();
            for waker in &wakers {
                wait_until_woken(&waker.0);
                // The panic is recorded before the load drops its clone of the waker, so wait
                // until only this test's two clones remain.
                while Arc::strong_count(waker) > 2 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            // The other wakers are called even though one panicked.
            [wakes_before, wakes_after].iter().for_each(|wakes| wait_until_woken(&wakes.0));
            let polled = panicking.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(&polled, Poll::Ready(Err(error)) if *error == panicked()), "{route}: {polled:?}");
            for other in others {
                in_time("the tensor of another waiter", other).unwrap();
            }
        }
        // The load continues.
        let image = runtime.block_on(async { tokio::time::timeout(PATIENCE, kept).await }).unwrap().unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &expected, route.name());
        let noop = &mut Context::from_waker(Waker::noop());
        assert_eq!(Pin::new(&mut load).poll_next(noop).map_ok(drop), Poll::Ready(Some(Err(panicked()))), "{route}");
        // The failed wait lost no events.
        let tensor = load.tensor_blocking("t0").unwrap();
        assert_eq!(tensor.bytes().unwrap().len(), 1_000_000);
        assert_eq!(Pin::new(&mut segments).poll_next(noop).map_ok(drop), Poll::Ready(Some(Err(panicked()))), "{route}");
        let mut length = [0, 0];
        in_time(
            "the segments",
            std::pin::pin!(async {
                while let Some(segment) = load.next().await {
                    length[0] += segment?.len();
                }
                while let Some(segment) = segments.next().await {
                    length[1] += segment?.len();
                }
                Ok::<_, Error>(())
            }),
        )
        .unwrap();
        assert_eq!(length, [expected.len(); 2], "{route}");
        for finish in [load.into_future(), finish] {
            let image = runtime.block_on(async { tokio::time::timeout(PATIENCE, finish).await }).unwrap().unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &expected, route.name());
        }
        for waker in wakers {
            assert_eq!(waker.0.load(Ordering::SeqCst), 1, "{route}: each waker must be called exactly once");
        }
        assert_eq!(load_all(&loader, &path, loader.load_options()).unwrap(), expected.len() as u64, "the next load");
    }
}

/// Hooks that block allocations until the test opens the gate.
#[derive(Debug, Clone, Default)]
struct Gate(Arc<(Mutex<bool>, std::sync::Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

impl HeapHooks for Gate {
    fn before_allocate(&self, _: usize) -> Result<(), HeapError> {
        note_thread();
        drop(self.0.1.wait_while(self.0.0.lock().unwrap(), |open| !*open).unwrap());
        Ok(())
    }

    fn before_populate(&self, _: Range<usize>, _: Range<usize>) -> Result<(), HeapError> {
        note_thread();
        Ok(())
    }
}

fn load_all(loader: &Loader, path: &Path, options: LoadOptions) -> dmaload::Result<u64> {
    let load = loader.load(path).options(options).start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let image = runtime
        .block_on(async { tokio::time::timeout(PATIENCE, load.into_future()).await.expect("the load did not finish in time") })?;
    Ok(image.report().bytes)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum In {
    Begin,
    Describe,
    Bytes,
    LastBytes,
    DropOfVerifier,
    DropOfObserver,
    Nothing,
}

/// A verifier that accepts all bytes, but panics in the call that [`In`] names. The number is the
/// file's length in bytes.
struct Panics(In, u64);

/// An observer that accepts all bytes, but panics in the call that [`In`] names. It is either used
/// on its own or returned by [`Panics`].
struct PanicsToo(In, u64);

impl Verify for Panics {
    fn begin(&self, _: &[(&Path, u64)], _: Format) -> dmaload::Result<Arc<dyn Observer>> {
        note_thread();
        assert!(self.0 != In::Begin, "in begin");
        Ok(Arc::new(PanicsToo(self.0, self.1)))
    }

    fn describe(&self) -> String {
        note_thread();
        assert!(self.0 != In::Describe, "in describe");
        "nothing".to_owned()
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        note_thread();
        assert!(self.0 != In::DropOfVerifier, "in the drop of a verifier");
    }
}

impl Observer for PanicsToo {
    fn bytes(&self, _: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        note_thread();
        assert!(self.0 != In::Bytes, "in bytes");
        assert!(self.0 != In::LastBytes || offset + (bytes.len() as u64) < self.1, "in bytes");
        Ok(())
    }
}

impl Drop for PanicsToo {
    fn drop(&mut self) {
        note_thread();
        assert!(self.0 != In::DropOfObserver, "in the drop of an observer");
    }
}

#[test]
fn panicking_verifiers_and_observers_are_named() {
    let folder = folder();
    let bytes = random_bytes(6_000_000, 1);
    let (large, small) = (file(folder.path(), "large.bin", &bytes), file(folder.path(), "small.bin", &bytes[..5000]));
    for (number, route) in ROUTES.into_iter().enumerate() {
        let loader = Loader::builder()
            .load_options(LoadOptions::new().route(route).segment_bytes(SEGMENT))
            .allocator_threads(1 + number % 2)
            .build()
            .unwrap();
        for path in [&large, &small] {
            let length = std::fs::metadata(path).unwrap().len();
            for place in [In::Begin, In::Describe, In::Bytes, In::LastBytes, In::DropOfVerifier, In::DropOfObserver, In::Nothing]
            {
                let what = format!("{route}, {length} bytes, {place:?}");
                let beside = loader.load(path).start();
                let verified = load_all(&loader, path, loader.load_options().verify(Panics(place, length)));
                let observer: Arc<dyn Observer> = Arc::new(PanicsToo(place, length));
                let observed = load_all(&loader, path, loader.load_options().observer(observer));
                let panicked = |code: &str, message: &str| Err(format!("{code} panicked: {message}"));
                // Cut off the file and offset that follow the panic's message.
                let reported = |result: dmaload::Result<u64>| {
                    result.map_err(|error| {
                        let text = error.to_string();
                        assert!(!text.contains("in bytes (") || text.contains(".bin: "), "{text}");
                        text.split(" (").next().unwrap().to_owned()
                    })
                };
                let [verified, observed] = [verified, observed].map(reported);
                let expected = match place {
                    In::Begin => [panicked("the verifier", "in begin"), Ok(length)],
                    In::Describe => [panicked("the verifier", "in describe"), Ok(length)],
                    In::Bytes | In::LastBytes => [panicked("the verifier", "in bytes"), panicked("the observer", "in bytes")],
                    In::DropOfVerifier | In::DropOfObserver | In::Nothing => [Ok(length), Ok(length)],
                };
                assert_eq!([verified, observed], expected, "{what}");
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                let image = runtime.block_on(beside.into_future()).unwrap_or_else(|error| panic!("beside {what}: {error}"));
                assert_same(&image.files()[0].bytes().unwrap(), &bytes[..usize::try_from(length).unwrap()], &what);
                assert_eq!(load_all(&loader, path, loader.load_options()), Ok(length), "after {what}");
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(loader.shutdown()).unwrap();
    }
    let threads = THREADS.lock().unwrap();
    assert!(threads.iter().any(|name| name.starts_with("dmaload-observe")), "{threads:?}");
}

/// A loader owns its default options and their verifier, so dropping the loader drops both.
#[test]
fn verifier_in_default_options_may_panic_on_drop() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(3_000_000, 1));
    for place in [In::DropOfVerifier, In::DropOfObserver, In::Describe] {
        let options = LoadOptions::default().verify(Panics(place, 3_000_000));
        let loader = Loader::builder().load_options(options.segment_bytes(SEGMENT)).build().unwrap();
        for _ in 0..3 {
            assert_eq!(load_all(&loader, &path, loader.load_options()).is_ok(), place != In::Describe, "{place:?}");
        }
        assert_eq!(load_all(&loader, &path, LoadOptions::default()), Ok(3_000_000));
    }
}
