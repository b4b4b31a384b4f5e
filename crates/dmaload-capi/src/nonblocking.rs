//! Loads for event loops. Each load has an eventfd that is readable while a result is available.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use dmaload::{Error, Progress, Segment, Segments};
use futures_core::Stream;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::failure::{Failure, Result};
use crate::outcome::{Finished, OwnedSegment};
use crate::request::Started;

/// An eventfd that is readable after [`Event::set`], until [`Event::clear`].
#[derive(Debug)]
struct Event(OwnedFd);

impl Event {
    fn set(&self) {
        // Fails only if the counter is at its maximum, in which case the eventfd is already
        // readable.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    fn clear(&self) {
        // Fails only if the eventfd is not set.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl Wake for Event {
    fn wake(self: Arc<Self>) {
        self.set();
    }
}

/// A load. It is created by `dmaload_start` and freed by `dmaload_free`.
#[allow(non_camel_case_types, reason = "the header uses this name")]
pub struct dmaload_load {
    event: Arc<Event>,
    wanted: Range<u64>,
    cpu_before: Duration,
    state: Mutex<State>,
}

enum State {
    Going {
        segments: Box<Segments>,
        /// The next result, which is fetched in advance so that the eventfd can signal it.
        /// `Some(None)` is the end of the load.
        next: Option<Option<std::result::Result<Segment, Error>>>,
    },
    Finished {
        report: Box<Finished>,
    },
    Failed(Failure),
}

impl fmt::Debug for dmaload_load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("dmaload_load").finish_non_exhaustive()
    }
}

/// The result of [`dmaload_load::poll`].
pub(crate) enum Fetched {
    Nothing,
    Segment(OwnedSegment),
    Finished,
}

impl dmaload_load {
    /// Wraps a started load. From now on, its eventfd signals results.
    pub(crate) fn new(started: Started) -> Result<Self> {
        let Started { segments, wanted, cpu_before } = started;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.map_err(|errno| Failure::system(errno, "cannot create an eventfd"))?;
        let load = dmaload_load {
            event: Arc::new(Event(event)),
            wanted,
            cpu_before,
            state: Mutex::new(State::Going { segments: Box::new(segments), next: None }),
        };
        load.fetch_ahead(&mut load.state());
        Ok(load)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn event_fd(&self) -> i32 {
        self.event.0.as_raw_fd()
    }

    /// Fetches the next result and sets the eventfd if a result is available. If not, the eventfd
    /// will be set when one arrives.
    fn fetch_ahead(&self, state: &mut State) {
        let State::Going { segments, next } = state else { return self.event.set() };
        if next.is_none() {
            let waker = Waker::from(Arc::clone(&self.event));
            if let Poll::Ready(result) = Pin::new(&mut **segments).poll_next(&mut Context::from_waker(&waker)) {
                *next = Some(result);
            }
        }
        if next.is_some() {
            self.event.set();
        }
    }

    pub(crate) fn poll(&self) -> Result<Fetched> {
        let mut state = self.state();
        self.event.clear();
        self.fetch_ahead(&mut state);
        let fetched = match &mut *state {
            State::Finished { .. } => return Ok(Fetched::Finished),
            State::Failed(failure) => return Err(failure.clone()),
            State::Going { segments, next } => match next.take() {
                None => return Ok(Fetched::Nothing),
                Some(Some(Ok(segment))) => OwnedSegment::new(&segment, &self.wanted),
                Some(Some(Err(error))) => Err(error.into()),
                Some(None) => match segments.report().cloned() {
                    Some(report) => {
                        let finished = State::Finished { report: Box::new(Finished::new(report, self.cpu_before)) };
                        let going = std::mem::replace(&mut *state, finished);
                        self.event.set();
                        drop(state);
                        drop(going);
                        return Ok(Fetched::Finished);
                    }
                    None => Err(Failure::cancelled("the load ended without a report")),
                },
            },
        };
        match fetched {
            Ok(segment) => {
                self.event.clear();
                self.fetch_ahead(&mut state);
                Ok(Fetched::Segment(segment))
            }
            Err(failure) => {
                let going = std::mem::replace(&mut *state, State::Failed(failure.clone()));
                self.event.set();
                drop(state);
                drop(going);
                Err(failure)
            }
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        match &*self.state() {
            State::Going { segments, .. } => segments.progress(),
            State::Finished { .. } | State::Failed(_) => Progress::default(),
        }
    }

    pub(crate) fn report(&self) -> Result<Finished> {
        match &*self.state() {
            State::Finished { report } => Ok(report.as_ref().clone()),
            State::Failed(failure) => Err(failure.clone()),
            State::Going { .. } => Err(Failure::new(Errno::INPROGRESS, "the load has not finished")),
        }
    }

    pub(crate) fn cancel(&self) {
        let mut state = self.state();
        let cancelled = if let State::Going { .. } = &*state {
            let failed = State::Failed(Failure::cancelled("the load was cancelled"));
            self.event.set();
            Some(std::mem::replace(&mut *state, failed))
        } else {
            None
        };
        drop(state);
        // Drop the load only after releasing the lock. The load may be the last owner of its
        // loader, and other calls on this load must not wait while the loader shuts down.
        drop(cancelled);
    }
}
