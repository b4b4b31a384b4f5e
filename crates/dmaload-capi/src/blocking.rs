//! Loads that block the calling thread until they have finished.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use dmaload::{Loader, Segments};
use futures_core::Stream;

use crate::failure::{Failure, Result};
use crate::outcome::{self, Finished, OwnedSegment};
use crate::request::Started;
use crate::types::dmaload_options;

/// The interval at which progress is reported and the cancel flag is checked, as documented in the
/// header.
const TICK: Duration = Duration::from_millis(20);

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future to completion on this thread.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// The caller's progress function and cancel flag.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Control<'a>(&'a dmaload_options);

impl<'a> Control<'a> {
    pub(crate) fn new(options: &'a dmaload_options) -> Self {
        Control(options)
    }

    fn is_set(self) -> bool {
        self.0.progress.is_some() || !self.0.cancel.is_null()
    }

    /// Reports progress and checks whether to cancel.
    ///
    /// # Safety
    /// The pointers in the options are valid as the header requires.
    unsafe fn check(self, segments: &Segments) -> Result<()> {
        if !self.0.cancel.is_null() {
            // SAFETY: the flag is valid during the call, as the caller guarantees. It is read
            // atomically, because another thread or a signal handler may write it.
            let flag = unsafe { AtomicI32::from_ptr(self.0.cancel.cast_mut()) };
            if flag.load(Ordering::Relaxed) != 0 {
                return Err(Failure::cancelled("the load was cancelled: its `cancel` flag was set"));
            }
        }
        let Some(call) = self.0.progress else { return Ok(()) };
        let progress = outcome::progress(segments.progress());
        // SAFETY: `call` and `user` are the caller's function and its argument, which the caller
        // guarantees to be valid. `progress` lives until the call returns.
        match unsafe { call(self.0.user, &raw const progress) } {
            0 => Ok(()),
            other => Err(Failure::cancelled(&format!("the load was cancelled: its progress function returned {other}"))),
        }
    }
}

/// Collects all segments of a load, and its report. If the load fails or is cancelled, closes the
/// segments collected so far.
///
/// # Safety
/// The pointers in the options of `control` are valid as the header requires.
pub(crate) unsafe fn collect_segments(started: Started, control: Control<'_>) -> Result<(Vec<OwnedSegment>, Finished)> {
    let Started { mut segments, wanted, cpu_before } = started;
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let (mut all, mut due) = (Vec::new(), Instant::now() + TICK);
    loop {
        let polled = Pin::new(&mut segments).poll_next(&mut Context::from_waker(&waker));
        match polled {
            Poll::Ready(Some(segment)) => all.push(OwnedSegment::new(&segment?, &wanted)?),
            Poll::Ready(None) => break,
            Poll::Pending if control.is_set() => thread::park_timeout(due.saturating_duration_since(Instant::now())),
            Poll::Pending => thread::park(),
        }
        // This check also runs while segments arrive without a pause.
        if due <= Instant::now() {
            // SAFETY: the pointers in the options are valid, as the caller guarantees.
            unsafe { control.check(&segments)? };
            due = Instant::now() + TICK;
        }
    }
    // SAFETY: the pointers in the options are valid, as the caller guarantees.
    unsafe { control.check(&segments)? };
    let report = segments.report().cloned();
    let report = report.ok_or_else(|| Failure::cancelled("the load ended without a report"))?;
    Ok((all, Finished::new(report, cpu_before)))
}

/// Shuts down a loader after its only load, and waits for its threads.
pub(crate) fn shut_down(loader: Loader) {
    // The load has finished, so no memory can leak and the result can be ignored.
    let _ = block_on(loader.shutdown());
}

/// Returns the descriptor of a load with exactly one segment.
pub(crate) fn single_descriptor(mut segments: Vec<OwnedSegment>) -> Result<c_int> {
    let one = segments.pop().filter(|_| segments.is_empty());
    let one = one.ok_or_else(|| Failure::invalid("the file was not loaded into a single segment"))?;
    Ok(std::os::fd::IntoRawFd::into_raw_fd(one.into_fd()))
}
