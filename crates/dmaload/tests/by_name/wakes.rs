//! Tests which tasks a load wakes, and how often.

use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use dmaload::{Load, Loader, Observer, Rejection, Tensor};

use crate::common::{assert_same, file, folder};
use crate::{Gate, PATIENCE, Planned, SEGMENT, TENSORS, check, in_time, last_segment_start, model, options, poll};

/// An observer that blocks at the first bytes past a position, which consists of a file index and
/// an offset. The test advances the position.
#[derive(Debug, Default)]
struct Steps {
    place: Mutex<(usize, u64)>,
    changed: Condvar,
}

impl Steps {
    fn let_through(&self, end: usize) {
        self.set((0, end as u64));
    }

    fn let_through_file(&self, file_index: usize) {
        self.set((file_index, u64::MAX));
    }

    fn set(&self, place: (usize, u64)) {
        *self.place.lock().unwrap() = place;
        self.changed.notify_all();
    }
}

impl Observer for Steps {
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        let end = (file_index, offset + bytes.len() as u64);
        drop(self.changed.wait_while(self.place.lock().unwrap(), |place| end > *place).unwrap());
        Ok(())
    }
}

#[derive(Default)]
struct CountWakes(AtomicUsize);

impl Wake for CountWakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn unpolled_waiter_does_not_delay_others() {
    let folder = folder();
    let (path, bytes) = model(folder.path(), "model.safetensors", 3);
    let last = TENSORS - 1;
    let gate = Gate::before(0, 0);
    let load = Loader::new().unwrap().load(&path).options(options().observer(gate.clone())).start();
    let last_name = format!("t{last}");
    // These two futures are polled once, and not again until the last tensor has arrived.
    let wakes = Arc::new(CountWakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let mut idle = pin!(load.tensor("t0"));
    let mut other = pin!(load.tensor(&last_name));
    assert!(poll(idle.as_mut(), &waker).is_pending() && poll(other.as_mut(), &waker).is_pending());
    gate.open();
    // Only this third future processes the load's events.
    check(&in_time("the last tensor", load.tensor(&last_name)).await.unwrap(), last, &bytes);
    assert!(wakes.0.load(Ordering::SeqCst) >= 2, "not every future was woken");
    // The first two futures find the tensors that the third one received.
    for (waiter, number) in [(idle, 0), (other, last)] {
        let Poll::Ready(tensor) = poll(waiter, Waker::noop()) else { panic!("t{number} is complete but its waiter is pending") };
        check(&tensor.unwrap(), number, &bytes);
    }
}

/// A task that waits for a tensor and is polled only after a wake.
struct Task<'a> {
    future: Pin<Box<dyn Future<Output = dmaload::Result<Tensor>> + 'a>>,
    wakes: Arc<CountWakes>,
    /// The number of wakes when the task was last polled.
    seen: usize,
    tensor: Option<Tensor>,
}

impl<'a> Task<'a> {
    fn start(load: &'a Load, name: String) -> Self {
        let future = Box::pin(async move { load.tensor(&name).await });
        let mut task = Task { future, wakes: Arc::default(), seen: 0, tensor: None };
        task.poll();
        task
    }

    fn poll(&mut self) {
        if let Poll::Ready(tensor) = poll(self.future.as_mut(), &Waker::from(Arc::clone(&self.wakes))) {
            self.tensor = Some(tensor.unwrap());
        }
    }

    fn poll_if_woken(&mut self) {
        let wakes = self.wakes.0.load(Ordering::SeqCst);
        if self.tensor.is_none() && std::mem::replace(&mut self.seen, wakes) < wakes {
            self.poll();
        }
    }
}

/// Polls tasks when they are woken, until all of them have their tensors.
#[track_caller]
fn run(tasks: &mut [Task<'_>]) {
    let deadline = Instant::now() + PATIENCE;
    while tasks.iter().any(|task| task.tensor.is_none()) {
        assert!(Instant::now() < deadline, "a task was not woken");
        tasks.iter_mut().for_each(Task::poll_if_woken);
    }
}

/// Thousands of tasks can wait for a model with many segments, so a segment must not wake them
/// all.
#[test]
fn segment_wakes_only_tasks_whose_tensor_it_completes() {
    const COUNT: usize = 400;
    const BYTES: usize = 50_000;
    let folder = folder();
    let bytes = dmaload_testing::safetensors_of(COUNT, BYTES, 13);
    let path = file(folder.path(), "model.safetensors", &bytes);
    let gate = Gate::before(0, 0);
    let passed = Arc::new(Steps::default());
    let verify = Planned { gate: gate.clone(), observer: passed.clone() };
    let load = Loader::new().unwrap().load(&path).options(options().verify(verify)).start();
    let mut tasks: Vec<_> = (0..COUNT).map(|number| Task::start(&load, format!("t{number}"))).collect();
    gate.open();
    let data_start = bytes.len() - COUNT * BYTES;
    let mut complete = 0;
    for end in (1..).map(|segments| segments * usize::try_from(SEGMENT).unwrap()) {
        passed.let_through(end.min(bytes.len()));
        // The number of tensors that end within the segments let through so far.
        let until = (end.saturating_sub(data_start) / BYTES).min(COUNT);
        let deadline = Instant::now() + PATIENCE;
        while tasks[complete..until].iter().any(|task| task.tensor.is_none()) {
            assert!(Instant::now() < deadline, "a task was not woken");
            tasks.iter_mut().for_each(Task::poll_if_woken);
        }
        assert!(tasks[until..].iter().all(|task| task.tensor.is_none()), "t{until} or a later tensor was complete too early");
        complete = until;
        if complete == COUNT {
            break;
        }
    }
    assert!(bytes.len() as u64 > 9 * SEGMENT, "the model must have many segments");
    for (number, task) in tasks.iter().enumerate() {
        let tensor = task.tensor.as_ref().unwrap();
        assert_same(&tensor.bytes().unwrap(), &bytes[data_start + number * BYTES..][..BYTES], tensor.name());
        // One wake when the load is planned, and one for the segment with the tensor's last byte.
        let wakes = task.wakes.0.load(Ordering::SeqCst);
        assert!(wakes <= 2, "t{number} was woken {wakes} times");
    }
}

/// Without an index, any file can contain a name, so a task waits until all headers are read. It
/// must not be woken for each header.
#[test]
fn small_files_wake_each_task_at_most_twice() {
    const FILES: usize = 48;
    let folder = folder();
    let model = |number: usize| {
        let header = format!(r#"{{"t{number}":{{"dtype":"U8","shape":[400000],"data_offsets":[0,400000]}}}}"#);
        let bytes = dmaload_testing::safetensors(header.as_bytes(), &dmaload_testing::random_bytes(400_000, number as u64));
        file(folder.path(), &format!("{number:02}.safetensors"), &bytes)
    };
    let paths: Vec<_> = (0..FILES).map(model).collect();
    let gate = Gate::before(0, 0);
    let passed = Arc::new(Steps::default());
    let verify = Planned { gate: gate.clone(), observer: passed.clone() };
    let load = Loader::new().unwrap().load(&paths).options(options().verify(verify)).start();
    let mut tasks: Vec<_> = (0..FILES).map(|number| Task::start(&load, format!("t{number}"))).collect();
    gate.open();
    for file_index in 0..FILES {
        passed.let_through_file(file_index);
        // Leave time for unnecessary wakes.
        thread::sleep(Duration::from_millis(5));
        tasks.iter_mut().for_each(Task::poll_if_woken);
    }
    run(&mut tasks);
    for (number, task) in tasks.iter().enumerate() {
        assert_eq!(task.tensor.as_ref().unwrap().name(), format!("t{number}"));
        // One wake when the load is planned, and one for the last header.
        let wakes = task.wakes.0.load(Ordering::SeqCst);
        assert!(wakes <= 2, "t{number} was woken {wakes} times");
    }
}

#[tokio::test]
async fn dropped_waiter_loses_no_segment_and_is_never_woken() {
    let folder = folder();
    let (path, bytes) = model(folder.path(), "model.safetensors", 4);
    let gate = Gate::before(0, last_segment_start(&bytes));
    let mut load = Loader::new().unwrap().load(&path).options(options().observer(gate.clone())).start();
    let wakes = Arc::new(CountWakes::default());
    {
        let waker = Waker::from(Arc::clone(&wakes));
        let mut dropped = pin!(load.tensor("t11"));
        assert!(poll(dropped.as_mut(), &waker).is_pending());
        // Once `t8` has arrived, the two futures have received every segment but the last.
        check(&in_time("a tensor", load.tensor("t8")).await.unwrap(), 8, &bytes);
        assert!(poll(dropped.as_mut(), &waker).is_pending());
    }
    in_time("the waker to be dropped", async {
        // The thread that wakes tasks can still hold a clone of the waker.
        while Arc::strong_count(&wakes) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let woken = wakes.0.load(Ordering::SeqCst);
    gate.open();
    check(&in_time("a tensor", load.tensor("t11")).await.unwrap(), 11, &bytes);
    assert_eq!(wakes.0.load(Ordering::SeqCst), woken);
    // All segments still arrive, each once and in order.
    let mut indices = Vec::new();
    while let Some(segment) = in_time("a segment", load.next()).await {
        indices.push(segment.unwrap().index());
    }
    assert!(indices.iter().copied().eq(0..indices.len()), "{indices:?}");
    assert_eq!(indices.len() as u64, (bytes.len() as u64).div_ceil(SEGMENT));
    assert_same(&load.await.unwrap().files()[0].bytes().unwrap(), &bytes, "the image");
}
