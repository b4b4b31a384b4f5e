//! The worker threads, which run the scheduled jobs, and the thread that replaces workers that are
//! waiting for a server.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use dmabuf::Memory;

use super::heap_code::HeapCode;
use super::jobs::WatchReport;
use super::mailbox::Message;
use super::schedule::{Job, Need};
use super::state::LoadShared;
use super::workers::WorkerId;
use super::{BudgetPermit, Engine, WindowPermit, bug_error};
use crate::error::Error;
use crate::files::header::find_header;
use crate::support::foreign;

impl Engine {
    pub(super) fn start_worker(self: &Arc<Self>, worker: WorkerId, heap: &HeapCode) -> io::Result<()> {
        let (own, heap) = (Arc::clone(self), heap.clone());
        let builder = thread::Builder::new().name(format!("dmaload-alloc-{}", worker.number()));
        let started = self.start_counted(|| builder.spawn(move || own.work(worker, heap)).map(|_| ()));
        if started.is_err() {
            self.jobs.dismiss(worker);
        }
        started
    }

    /// The body of the thread that starts substitutes for stalled workers.
    pub(super) fn watch(self: Arc<Self>, heap: HeapCode) {
        let mut refused = false;
        while let Some(WatchReport { stalled, substitutes, is_exhausted }) = self.jobs.watch() {
            let mut error = None;
            for worker in substitutes {
                error = self.start_worker(worker, &heap).err().or(error);
            }
            if !stalled.is_empty() {
                let loads = stalled.into_iter().map(|task| task.load).collect();
                self.mailbox.push([Message::Stalled { loads, is_exhausted }]);
            }
            // The next check retries a failed start, but only the first failure is reported.
            if let Some(error) = error.filter(|_| !refused) {
                refused = true;
                self.mailbox.push([Message::NoSubstitute { error }]);
            }
        }
        drop(heap);
        self.thread_has_ended();
    }

    /// The body of a worker thread.
    fn work(self: Arc<Self>, worker: WorkerId, heap: HeapCode) {
        while let Some((job, load)) = self.jobs.next(worker) {
            if let Some(another) = self.jobs.hire_more()
                && let Err(error) = self.start_worker(another, &heap)
            {
                // The thread that runs `watch` tries again.
                foreign::emit(|| tracing::debug!(%error, "cannot start another worker"));
            }
            // Until the job is done, keeps open any files that the caller passed as descriptors,
            // even if the load ends in the meantime.
            let open = load.inputs();
            let done = foreign::call(|| match job {
                Job::Open(_) => self.open(&load, &heap),
                Job::Allocate(_, batch, need) => {
                    let advance = BudgetPermit { engine: Arc::clone(&self), load: load.id, bytes: need.held_bytes };
                    let need = Need { held_bytes: 0, ..need };
                    let permit = WindowPermit { engine: Arc::clone(&self), load: load.id, need };
                    self.allocate(&load, &heap, worker, batch, permit, advance);
                }
                Job::MakeRoom(_, bytes) => {
                    self.reaper.trim_pool(self.reaper.pooled_bytes().saturating_sub(bytes));
                }
                Job::Check(_, file) => self.check(&load, file),
                Job::Finish(_, memory) => self.finish(&load, &heap, memory),
            });
            if let Err(message) = done {
                // This is a bug in this crate, because panics of heaps and verifiers are caught
                // where they are called. Unwinding has released the permits that the job held.
                self.fail(&load, bug_error("a worker thread", message));
            }
            // The drops below may close files, which may wait for a server.
            self.jobs.begin_file(worker);
            foreign::discard(open);
            foreign::discard(load);
        }
        drop(heap);
        self.thread_has_ended();
    }

    /// Checks a file that was read. If the file changed, the load fails before the file's last
    /// segment is handed over.
    fn check(&self, load: &Arc<LoadShared>, file: usize) {
        // `None` if the load has ended.
        let Some((open, identity)) = load.take_file(file) else { return };
        // `whole_file` returns the bytes of small files only, whose headers are parsed from their
        // memory. A large file's header was read during planning.
        let checked = load.whole_file(file).map_or(Ok(None), |bytes| {
            let tensors = find_header(&open, bytes.as_ref(), load.options.format)?;
            let source = load.sources().get(file).expect("only planned files should be checked");
            source.check(tensors.as_ref())?;
            Ok(tensors)
        });
        let checked = checked.map_err(|error| open.blame_change(&identity, error));
        let checked = checked.and_then(|tensors| open.check_unchanged(&identity).map(|()| tensors));
        let checked = checked.and_then(|tensors| open.check_end(&identity).map(|()| tensors));
        match checked {
            Ok(tensors) => {
                drop(open);
                match load.record_checked_file(file, tensors.map(Arc::new)) {
                    Ok(()) => self.queue_delivery(load),
                    Err(error) => self.fail(load, error),
                }
            }
            Err(error) => self.fail(load, error),
        }
    }

    /// Finishes a full allocation: moves its tensors to their final places, and exports it as a
    /// dma-buf if the heap supports that.
    #[allow(unsafe_code)]
    fn finish(&self, load: &Arc<LoadShared>, heap: &HeapCode, number: usize) {
        // `None` if the load has ended.
        let Some((backing, moves)) = load.full_memory(number) else { return };
        let start = Instant::now();
        for slot in &moves {
            // SAFETY: an allocation is finished only once its `pieces_left` is 0. By then, the
            // driver has returned all of its pieces, so it is filled and nothing else writes to
            // it. Nothing else reads it either. It has no segments yet, because `is_ready` is
            // false until `record_finished_memory`. `check` reads only small files from memory,
            // and the `tensors` layout, the only one that moves bytes, has none.
            unsafe { backing.move_down(slot) };
        }
        let export = |memory: &Memory| {
            let exported = heap.call(load.heap(), |heap| heap.export(memory)).map_err(Refused::Load)?;
            exported.map_err(Refused::Kernel)
        };
        match if self.facts.exports { backing.export(export) } else { Ok(()) } {
            Ok(()) => {
                drop(backing);
                load.record_finished_memory(number, start);
                self.queue_delivery(load);
            }
            Err(Refused::Kernel(refusal)) => self.fail(load, load.memory_error(refusal)),
            Err(Refused::Load(error)) => self.fail(load, error),
        }
    }
}

/// Why memory was not exported.
enum Refused {
    Kernel(dmabuf::Error),
    Load(Error),
}

impl From<dmabuf::Error> for Refused {
    fn from(refusal: dmabuf::Error) -> Self {
        Refused::Kernel(refusal)
    }
}
