//! Operations in progress: loads, streams of tensors, and other library futures.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use dmaload::share::{AttachOptions, attach};
use dmaload::{Image, Inspected, Load, Progress, Source, Tensors};
use futures_core::Stream;
use pyo3::prelude::*;

use crate::describe;
use crate::errors::{Failure, Raised, guarded};
use crate::image;
use crate::options::Keywords;
use crate::process::{Owned, detached, lock};
use crate::tensor::{self, Part};
use crate::waiting::{Hub, Parked};

/// What an operation produces if it does not fail.
#[derive(Debug)]
pub(crate) enum Outcome {
    Image(Image),
    Tensor(dmaload::Tensor),
    /// A tensor whose position in the file was already known.
    Part(Part),
    Headers(Vec<Inspected>),
    /// The end of a stream.
    End,
}

/// The result of an operation, or the reason why it failed.
pub(crate) type Answer = Result<Outcome, Failure>;

/// A library future, boxed.
pub(crate) type Work = Pin<Box<dyn Future<Output = Answer> + Send>>;

enum Origin {
    Load(Load),
    Stream(Tensors),
    Future(Work),
    /// The operation has finished or was closed.
    Nothing,
}

struct State {
    source: Origin,
    /// A result that has not been taken yet.
    ready: Option<Answer>,
    progress: Progress,
}

/// An operation in progress. Dropping or closing it cancels the operation.
#[pyclass(frozen, module = "dmaload._native")]
pub(crate) struct Loading(Owned<Mutex<State>>);

impl Loading {
    fn new(source: Origin) -> Self {
        Loading(Owned::new(Mutex::new(State { source, ready: None, progress: Progress::default() })))
    }

    pub(crate) fn from_work(work: Work) -> Self {
        Loading::new(Origin::Future(work))
    }

    fn state(&self) -> Result<&Mutex<State>, Failure> {
        self.0.in_its_process("this load")
    }
}

impl State {
    /// Returns whether a result can be taken. If not, the waker is called once a result may have
    /// become available.
    fn poll(&mut self, waker: &Waker) -> bool {
        if self.ready.is_some() {
            return true;
        }
        let mut context = Context::from_waker(waker);
        let answer = match &mut self.source {
            Origin::Nothing => Poll::Ready(Err(Failure::new("ClosedError", "this load was closed"))),
            Origin::Future(work) => work.as_mut().poll(&mut context),
            Origin::Stream(tensors) => {
                let next = Pin::new(&mut *tensors).poll_next(&mut context);
                self.progress = tensors.progress();
                next.map(|next| match next {
                    Some(Ok(tensor)) => Ok(Outcome::Tensor(tensor)),
                    Some(Err(error)) => Err(error.into()),
                    None => Ok(Outcome::End),
                })
            }
            Origin::Load(load) => {
                let ended = Self::poll_load(load, &mut context);
                self.progress = load.progress();
                ended.map_ok(|()| Outcome::End)
            }
        };
        let Poll::Ready(answer) = answer else { return false };
        // A stream continues after it has yielded a tensor. All other operations have a single
        // result.
        let goes_on = matches!((&self.source, &answer), (Origin::Stream(_), Ok(Outcome::Tensor(_))));
        let source = if goes_on { None } else { Some(std::mem::replace(&mut self.source, Origin::Nothing)) };
        self.ready = Some(match (source, answer) {
            (Some(Origin::Load(load)), Ok(_)) => Self::image(load, &mut context),
            (Some(Origin::Stream(_) | Origin::Future(_)), Ok(Outcome::End)) => {
                // Later calls report the end again.
                self.source = Origin::Future(Box::pin(async { Ok(Outcome::End) }));
                Ok(Outcome::End)
            }
            (_, answer) => answer,
        });
        true
    }

    /// Polls a load until all of its segments are loaded. The load keeps the segments.
    fn poll_load(load: &mut Load, context: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        loop {
            match std::task::ready!(Pin::new(&mut *load).poll_next(context)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                None => return Poll::Ready(Ok(())),
            }
        }
    }

    fn image(load: Load, context: &mut Context<'_>) -> Answer {
        match load.into_future().as_mut().poll(context) {
            Poll::Ready(image) => Ok(Outcome::Image(image?)),
            Poll::Pending => unreachable!("the image should be ready once the load has yielded its last segment"),
        }
    }
}

#[pymethods]
impl Loading {
    /// Waits until a result can be taken, for at most `seconds`. Returns whether it can be taken.
    fn wait(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        guarded(py, || {
            let state = self.state()?;
            let patience = Duration::try_from_secs_f64(seconds).map_err(|error| Failure::config(error.to_string()))?;
            Ok(detached(py, || {
                let deadline = Instant::now() + patience;
                let parked = Parked::new();
                let waker = Waker::from(parked.clone());
                // Sleep without holding the lock, so another thread can take results, cancel the
                // load, or read the progress. If two threads wait, only the last one to poll is
                // woken; the other one polls again after `seconds`.
                while !lock(state).poll(&waker) {
                    if !parked.sleep_until(deadline) {
                        return false;
                    }
                }
                true
            }))
        })
    }

    /// Returns whether a result can be taken. If not, the hub receives `key` once a result may
    /// have become available.
    fn poll(&self, py: Python<'_>, hub: &Hub, key: u64) -> PyResult<bool> {
        guarded(py, || {
            let state = self.state()?;
            let waker = hub.waker(key);
            Ok(detached(py, || lock(state).poll(&waker)))
        })
    }

    /// Takes the result, and returns it in a tuple with one element. The result is an image, a
    /// tensor or headers, or `None` at the end of a stream. Returns `None` instead of a tuple if
    /// another thread took the result, or if there is no result yet.
    fn take(&self, py: Python<'_>) -> PyResult<Option<(Option<Py<PyAny>>,)>> {
        guarded(py, || {
            let state = self.state()?;
            let Some(answer) = detached(py, || lock(state).ready.take()) else { return Ok(None) };
            let taken = match answer? {
                Outcome::Image(loaded) => Some(Py::new(py, image::Image::new(py, loaded))?.into_any()),
                Outcome::Tensor(loaded) => Some(Py::new(py, tensor::Tensor::new(loaded))?.into_any()),
                Outcome::Part(part) => Some(Py::new(py, tensor::Tensor::of_part(part))?.into_any()),
                Outcome::Headers(headers) => Some(describe::headers(py, headers)?),
                Outcome::End => None,
            };
            Ok(Some((taken,)))
        })
    }

    /// Returns the number of bytes read and the number of bytes to read. Both are 0 until the load
    /// has been planned. They stay 0 for operations other than loads and streams.
    fn progress(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        guarded(py, || {
            let state = self.state()?;
            Ok(detached(py, || {
                let mut state = lock(state);
                match &state.source {
                    Origin::Load(load) => state.progress = load.progress(),
                    Origin::Stream(tensors) => state.progress = tensors.progress(),
                    Origin::Future(_) | Origin::Nothing => {}
                }
                (state.progress.read_bytes, state.progress.planned_bytes)
            }))
        })
    }

    /// Cancels the operation if it is still running. Does nothing in a forked child.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guarded(py, || {
            if let Ok(state) = self.state() {
                detached(py, || {
                    let mut state = lock(state);
                    state.source = Origin::Nothing;
                    state.ready = None;
                });
            }
            Ok(())
        })
    }
}

/// Starts loading an image.
#[pyfunction]
pub(crate) fn start_load(py: Python<'_>, paths: Vec<PathBuf>, keywords: Keywords) -> PyResult<Loading> {
    guarded(py, || {
        let load = detached(py, || {
            let (loader, options) = keywords.resolve()?;
            Ok::<_, Failure>(loader.load(Source::paths(paths)).options(options).start())
        });
        Ok(Loading::new(Origin::Load(load?)))
    })
}

/// Starts a stream of tensors. The stream does not keep the tensors that it has yielded.
#[pyfunction]
pub(crate) fn start_stream(py: Python<'_>, paths: Vec<PathBuf>, keywords: Keywords) -> PyResult<Loading> {
    guarded(py, || {
        let tensors = detached(py, || {
            let (loader, options) = keywords.resolve()?;
            Ok::<_, Failure>(loader.load(Source::paths(paths)).options(options).tensors())
        });
        Ok(Loading::new(Origin::Stream(tensors?)))
    })
}

/// Starts attaching to an image that another process shares.
#[pyfunction]
pub(crate) fn start_attach(py: Python<'_>, socket: PathBuf, name: Option<String>, trusted_users: Vec<u32>) -> PyResult<Loading> {
    guarded(py, || {
        let options = AttachOptions::default();
        let options = name.into_iter().fold(options, AttachOptions::name);
        let options = trusted_users.into_iter().fold(options, AttachOptions::trust_user);
        Ok::<_, Raised>(Loading::from_work(Box::pin(attached(socket, options))))
    })
}

async fn attached(socket: PathBuf, options: AttachOptions) -> Answer {
    Ok(Outcome::Image(attach(socket, options).await?.image))
}
