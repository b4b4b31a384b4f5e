//! The teller: the thread that delivers events to consumers and to `tracing` subscribers, on
//! behalf of the other threads; see [`super::mailbox`].

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::jobs::DropKey;
use super::mailbox::Message;
use super::state::{HandOverStatus, LoadShared};
use super::workers::MOST_SUBSTITUTES;
use super::{Engine, WindowPermit, bug_error};
use crate::files::source::OpenFile;
use crate::memory::backing::PieceBuffer;
use crate::ring::{Events, LeftBehind, LoadEvent, Output};
use crate::support::errno;
use crate::support::foreign;
use crate::support::id::LoadId;
use crate::telemetry::report::Measured;

impl Engine {
    /// The body of the teller thread.
    pub(super) fn run_teller(self: Arc<Self>) {
        let mut broke = false;
        while let Some(messages) = self.mailbox.next() {
            for message in messages {
                let ring_ended = matches!(message, Message::RingEnded { .. });
                let Err(message) = foreign::call(|| self.handle(message)) else { continue };
                // A broken invariant: no load may wait for a thread whose state is unknown, so all
                // loads fail. This thread continues, to deliver their errors. It closes the engine
                // only once, because the code that panicked may panic again for each load.
                if !std::mem::replace(&mut broke, true) {
                    let error = bug_error("the teller thread", message);
                    foreign::emit(|| tracing::error!(%error, "all loads fail"));
                    // If the ring thread has already panicked, its error is kept.
                    let _ = self.broken.set(error);
                    let _ = foreign::call(|| self.close());
                }
                if ring_ended {
                    self.jobs.finish();
                }
            }
        }
        // All workers have exited by now, except those that hang.
        self.jobs.drop_deferred();
        self.mailbox.end();
    }

    fn handle(&self, message: Message<Engine>) {
        match message {
            Message::Ring(output) => self.handle_output(output),
            Message::Deliver(load) => {
                self.deliver(&load);
                self.release_load(load);
            }
            Message::RingBroke { errno, leaked_bytes } => foreign::emit(|| {
                let errno = errno::describe(errno);
                tracing::error!(errno, leaked_bytes, "io_uring failed: memory that reads may still write to is leaked");
            }),
            Message::Stalled { loads, is_exhausted } => foreign::emit(|| {
                for load in loads {
                    tracing::warn!(
                        load = load.0,
                        "a file's server is not answering: the load waits, and another worker takes over"
                    );
                }
                if is_exhausted {
                    tracing::error!(
                        "all workers are waiting for files, and {MOST_SUBSTITUTES} were already replaced: no load can proceed"
                    );
                }
            }),
            Message::NoSubstitute { error } => {
                foreign::emit(
                    || tracing::warn!(%error, "cannot start a thread to replace a worker that is stuck waiting for a file"),
                );
            }
            Message::RingEnded { engine, panic } => {
                if let Some(message) = panic {
                    let error = bug_error("the ring thread", message);
                    foreign::emit(|| tracing::error!(%error, "all loads fail"));
                    // If this thread has already panicked, its error is kept.
                    let _ = self.broken.set(error);
                }
                // Loads remain only after a panic or a missed deadline. They must not wait
                // forever.
                self.close();
                // Workers empty the drop queue before they exit.
                self.jobs.finish();
                // This is not the last reference: the teller holds another one.
                drop(engine);
            }
            #[cfg(test)]
            Message::Panic => panic!("requested by a test"),
        }
    }

    fn handle_output(&self, output: Output<()>) {
        let id = output.load();
        let is_gone = matches!(output, Output::Event { event: LoadEvent::Gone { .. }, .. });
        // A load that failed or was dropped is already forgotten while the driver drains its
        // reads.
        if let Some(load) = self.jobs.load_of(id) {
            if let Err(message) = foreign::call(|| self.record_output(&load, output)) {
                self.fail(&load, bug_error("the teller thread", message));
            }
            self.deliver(&load);
            self.release_load(load);
        } else {
            // The output may contain the load's observer, whose drop is the caller's code.
            foreign::discard(output);
        }
        if is_gone {
            self.jobs.end();
        }
    }

    /// Records an output of the ring thread.
    fn record_output(&self, load: &LoadShared, output: Output<()>) {
        match output {
            Output::PieceFull { load: id, piece, route, buffer: () } => {
                if let Some((mount, measured)) = load.measure(piece) {
                    self.choices().record(id, mount, &measured);
                    foreign::emit(|| {
                        let Measured { direct_bytes_per_second, staged_bytes_per_second, buffered_bytes_per_second, chosen } =
                            measured;
                        tracing::info!(
                            load = id.0,
                            direct_bytes_per_second,
                            staged_bytes_per_second,
                            buffered_bytes_per_second,
                            %chosen,
                            "measured which way of reading is the fastest"
                        );
                    });
                }
                self.jobs.schedule_follow_ups(id, load.record_full_piece(piece, route));
            }
            Output::Event { load: id, event } => match event {
                LoadEvent::SteppedDown { fallback } => load.record_fallback(fallback),
                LoadEvent::LessStaging { bytes, errno } => load.note_less_staging(bytes, errno),
                LoadEvent::NoThread => load.note_missing_thread(),
                LoadEvent::Retried { retried } => load.record_retry(&retried),
                LoadEvent::Traced { piece, span } => load.record_trace(piece, span, self.epoch),
                LoadEvent::Failed { failure } => {
                    self.defer_drop(id, [load.fail_for(failure)]);
                    self.forget(id);
                }
                LoadEvent::Gone { times, observation } => {
                    load.record_times(times);
                    drop(observation);
                }
            },
        }
    }

    /// Delivers to a load's consumer all segments and other events that are ready. Only the teller
    /// does this, to keep the order.
    fn deliver(&self, load: &Arc<LoadShared>) {
        let mut remains = Vec::new();
        let delivered = foreign::call(|| load.deliver(&mut remains));
        let over = match delivered {
            Ok(handover) => handover == HandOverStatus::Over,
            Err(message) => {
                self.fail(load, bug_error("the teller thread", message));
                false
            }
        };
        if !remains.is_empty() {
            self.defer_drop(load.id, remains);
            self.abandon(load);
        }
        if over {
            self.forget(load.id);
            // Drop the remains now, because the consumer may keep its handle for a long time.
            self.defer_drop(load.id, load.take_remains_if_over());
        }
    }

    /// Drops a reference to a load. If it is the last one, a worker drops the load.
    pub(super) fn release_load(&self, load: Arc<LoadShared>) {
        if let Some(load) = Arc::into_inner(load) {
            self.jobs.defer_drop(DropKey::Files(load.id), load);
        }
    }
}

impl Events<PieceBuffer<WindowPermit>> for Engine {
    fn on_outputs(&self, outputs: Vec<Output<PieceBuffer<WindowPermit>>>) {
        // Return the permits first, so allocators can proceed while the teller handles outputs.
        let messages: Vec<_> = outputs.into_iter().map(|output| Message::Ring(output.map_buffer(drop))).collect();
        self.mailbox.push(messages);
    }

    fn on_released_files(&self, files: Vec<(LoadId, Arc<OpenFile>)>) {
        for (load, file) in files {
            // If other references exist, the last holder closes the file.
            if let Some(file) = Arc::into_inner(file) {
                self.jobs.defer_drop(DropKey::Files(load), file);
            }
        }
    }

    fn on_ring_failure(&self, errno: Errno, leaked_bytes: u64) {
        self.mailbox.push([Message::RingBroke { errno, leaked_bytes }]);
    }

    fn on_end(self: Arc<Self>, left: LeftBehind, panic: Option<String>) {
        self.leaked_bytes.fetch_add(left.bytes, Ordering::AcqRel);
        self.left_threads.fetch_add(left.threads, Ordering::AcqRel);
        let (threads, mailbox) = (Arc::clone(&self.threads), Arc::clone(&self.mailbox));
        mailbox.push([Message::RingEnded { engine: self, panic }]);
        threads.end(&mailbox);
    }
}
