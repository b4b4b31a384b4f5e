//! The thread that unmaps.
//!
//! Unmapping and freeing a segment takes milliseconds, and its last owner may be an async task: the drop only puts it
//! on a list. The list is intrusive, so that dropping allocates nothing. The thread lives as long as anybody may still
//! put something on the list, which may be longer than the loader.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use dmabuf::{DmaBuf, Mapping, Memory};

/// Mapped memory on its way to be freed, or not yet.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) mapping: Mapping,
    pub(crate) memory: Memory,
    /// The dma-buf that was made of the memory. Closing it frees pages, too.
    pub(crate) exported: OnceLock<DmaBuf>,
    next: Option<Box<Holding>>,
}

impl Holding {
    pub(crate) fn new(mapping: Mapping, memory: Memory) -> Box<Self> {
        Box::new(Holding { mapping, memory, exported: OnceLock::new(), next: None })
    }
}

#[derive(Debug, Default)]
struct List {
    head: Option<Box<Holding>>,
    /// Whether the thread is freeing something that is not on the list any more.
    busy: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    list: Mutex<List>,
    changed: Condvar,
    idle: Condvar,
}

impl Shared {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the reaper thread. The thread ends when the last clone is gone.
#[derive(Debug, Clone)]
pub(crate) struct Reaper {
    shared: Arc<Closing>,
}

#[derive(Debug)]
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.list().closed = true;
        self.0.changed.notify_one();
    }
}

impl Reaper {
    /// Starts the thread.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let reaper = Reaper { shared: Arc::new(Closing(Arc::clone(&shared))) };
        thread::Builder::new().name("dmaload-reap".to_owned()).spawn(move || run(&shared))?;
        Ok(reaper)
    }

    #[cfg(test)]
    pub(crate) fn without_thread() -> Self {
        Reaper { shared: Arc::new(Closing(Arc::default())) }
    }

    /// Does the thread's work in the caller.
    #[cfg(test)]
    pub(crate) fn run_once(&self) {
        let holding = self.shared.0.list().head.take();
        drop(holding);
    }

    /// Waits until all that was left to the thread is freed, or the time is up; whether there was anything to wait for.
    pub(crate) fn wait_until_idle(&self, timeout: Duration) -> bool {
        let is_busy = |list: &mut List| list.busy || list.head.is_some();
        let mut list = self.shared.0.list();
        if !is_busy(&mut list) {
            return false;
        }
        let _ = self.shared.0.idle.wait_timeout_while(list, timeout, is_busy);
        true
    }

    /// Leaves memory to the thread, to be unmapped and freed.
    pub(crate) fn bury(&self, mut holding: Box<Holding>) {
        let mut list = self.shared.0.list();
        holding.next = list.head.take();
        list.head = Some(holding);
        drop(list);
        self.shared.0.changed.notify_one();
    }
}

fn run(shared: &Shared) {
    let mut list = shared.list();
    loop {
        match list.head.take() {
            Some(mut holding) => {
                list.head = holding.next.take();
                list.busy = true;
                drop(list);
                drop(holding);
                list = shared.list();
                list.busy = false;
                if list.head.is_none() {
                    shared.idle.notify_all();
                }
            }
            None if list.closed => return,
            None => list = shared.changed.wait(list).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmabuf::AddressRange;
    use std::time::Instant;

    #[test]
    fn memory_on_its_way_to_be_freed_is_waited_for() {
        let reaper = Reaper::start().unwrap();
        assert!(!reaper.wait_until_idle(Duration::from_secs(10)), "there is nothing to wait for");
        let bytes = 64 << 20;
        let range = AddressRange::reserve(bytes).unwrap();
        for _ in 0..4 {
            let mapping = range.map(&Memory::Anonymous, 0, bytes).unwrap();
            mapping.populate(&Memory::Anonymous, 0..bytes, dmabuf::Pages::Small).unwrap();
            reaper.bury(Holding::new(mapping, Memory::Anonymous));
            reaper.wait_until_idle(Duration::from_secs(60));
            assert_eq!(Arc::strong_count(&range), 1, "it was freed before the wait ended");
        }
    }

    #[test]
    fn what_is_buried_is_unmapped_by_the_thread_even_after_the_last_handle_is_gone() {
        let reaper = Reaper::start().unwrap();
        let range = AddressRange::reserve(40 * 4096).unwrap();
        for at in 0..40 {
            let mapping = range.map(&Memory::Anonymous, at * 4096, 4096).unwrap();
            reaper.bury(Holding::new(mapping, Memory::Anonymous));
        }
        drop(reaper);
        let deadline = Instant::now() + Duration::from_secs(10);
        while Arc::strong_count(&range) > 1 {
            assert!(Instant::now() < deadline, "{} mappings are still there", Arc::strong_count(&range) - 1);
            thread::sleep(Duration::from_millis(1));
        }
    }
}
