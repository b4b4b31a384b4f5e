//! Where the memory of dropped segments goes: into the pool, or to the thread that unmaps.
//!
//! Unmapping and freeing a segment takes milliseconds, and its last owner may be an async task: the drop only puts it
//! on a list. The lists are intrusive, so that dropping allocates nothing. The thread lives as long as anybody may still
//! put something on its list, which may be longer than the loader.
//!
//! The **pool** keeps whole segments, mapped and with their pages, for loads to come: their memory needs no allocating, no
//! zeroing and no populating. Only what nobody outside can see any more is kept: a segment whose descriptor was handed out is
//! freed.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use dmabuf::{AddressRange, DmaBuf, Mapping, Memory, NotMoved};

use crate::charge::Charge;

/// Mapped memory on its way to be freed, or not yet.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) mapping: Mapping,
    pub(crate) memory: Memory,
    /// The dma-buf that was made of the memory. Closing it frees pages, too.
    pub(crate) exported: OnceLock<DmaBuf>,
    /// Whether it may be used again: complete, and no descriptor of it was handed out.
    pub(crate) reusable: AtomicBool,
    next: Option<Box<Holding>>,
    /// The last field: it is given back when all else is freed.
    pub(crate) charge: Charge,
}

impl Holding {
    pub(crate) fn new(mapping: Mapping, memory: Memory) -> Box<Self> {
        Box::new(Holding {
            mapping,
            memory,
            exported: OnceLock::new(),
            reusable: AtomicBool::new(false),
            next: None,
            charge: Charge::default(),
        })
    }

    fn bytes(&self) -> u64 {
        self.mapping.bytes() as u64
    }

    /// The same memory, mapped elsewhere; as it was where the kernel does not move it.
    pub(crate) fn moved_to(self, range: &Arc<AddressRange>, at: usize) -> Result<Box<Self>, Box<Self>> {
        let Holding { mapping, memory, exported, reusable, next, charge } = self;
        match mapping.move_to(range, at) {
            Ok(mapping) => Ok(Box::new(Holding { mapping, memory, exported, reusable, next, charge })),
            Err(NotMoved { mapping, error }) => {
                crate::foreign::emit(|| tracing::debug!(%error, "memory of the pool can't be used again"));
                Err(Box::new(Holding { mapping, memory, exported, reusable, next, charge }))
            }
        }
    }
}

/// Holdings, the last one first.
#[derive(Debug, Default)]
struct Stack {
    head: Option<Box<Holding>>,
    bytes: u64,
}

impl Stack {
    fn push(&mut self, mut holding: Box<Holding>) {
        self.bytes += holding.bytes();
        holding.next = self.head.take();
        self.head = Some(holding);
    }

    fn pop(&mut self) -> Option<Box<Holding>> {
        self.take_first(|_| true)
    }

    /// Takes out the first one that is wanted.
    fn take_first(&mut self, wanted: impl Fn(&Holding) -> bool) -> Option<Box<Holding>> {
        let mut place = &mut self.head;
        while place.as_ref().is_some_and(|holding| !wanted(holding)) {
            place = &mut place.as_mut()?.next;
        }
        let mut found = place.take()?;
        *place = found.next.take();
        self.bytes -= found.bytes();
        Some(found)
    }

    /// Takes out the one that has been here longest.
    fn take_last(&mut self) -> Option<Box<Holding>> {
        self.take_first(|holding| holding.next.is_none())
    }
}

impl Drop for Stack {
    /// One by one: the drop of a long chain would recurse as deep.
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

#[derive(Debug, Default)]
struct List {
    dead: Stack,
    /// What is kept for loads to come, at most so much of it.
    pool: Stack,
    pool_bytes: u64,
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
        let dead = std::mem::take(&mut self.shared.0.list().dead);
        drop(dead);
    }

    /// Waits until all that was left to the thread is freed, or the time is up; whether there was anything to wait for.
    pub(crate) fn wait_until_idle(&self, timeout: Duration) -> bool {
        let is_busy = |list: &mut List| list.busy || list.dead.head.is_some();
        let mut list = self.shared.0.list();
        if !is_busy(&mut list) {
            return false;
        }
        let _ = self.shared.0.idle.wait_timeout_while(list, timeout, is_busy);
        true
    }

    /// Takes memory that nobody uses any more: for the pool, if it may be used again and there is room or older memory to
    /// make room; else for the thread, to be unmapped and freed.
    pub(crate) fn bury(&self, holding: Box<Holding>) {
        let bytes = holding.bytes();
        let mut ledger = None;
        // Before anybody can take it out again; where there is no room after all, it counts as the pool's until it is freed.
        if holding.reusable.load(Ordering::Acquire) && bytes <= self.shared.0.list().pool_bytes {
            ledger = holding.charge.ledger();
            holding.charge.pool();
        }
        let mut list = self.shared.0.list();
        if holding.reusable.load(Ordering::Acquire) && bytes <= list.pool_bytes {
            let room = list.pool_bytes - bytes;
            list.shrink_pool(room);
            list.pool.push(holding);
        } else {
            list.dead.push(holding);
        }
        drop(list);
        self.shared.0.changed.notify_one();
        if let Some(ledger) = ledger.and_then(|ledger| ledger.upgrade()) {
            // Whoever looked for room in the pool a moment ago did not find it.
            ledger.unpooled(0);
        }
    }

    /// How much the pool may keep; with less than it has, the oldest goes.
    pub(crate) fn set_pool_bytes(&self, bytes: u64) {
        let mut list = self.shared.0.list();
        list.pool_bytes = bytes;
        list.shrink_pool(bytes);
        drop(list);
        self.shared.0.changed.notify_one();
    }

    /// Frees what the pool has beyond `keep_bytes`, the oldest first; how much that is.
    pub(crate) fn trim_pool(&self, keep_bytes: u64) -> u64 {
        let freed = self.shared.0.list().shrink_pool(keep_bytes);
        self.shared.0.changed.notify_one();
        freed
    }

    /// How much the pool has.
    pub(crate) fn pooled_bytes(&self) -> u64 {
        self.shared.0.list().pool.bytes
    }

    /// Memory of this size from the pool, the one that came last.
    pub(crate) fn reuse(&self, bytes: usize) -> Option<Box<Holding>> {
        self.shared.0.list().pool.take_first(|holding| holding.mapping.bytes() == bytes)
    }
}

impl List {
    fn shrink_pool(&mut self, keep_bytes: u64) -> u64 {
        let before = self.pool.bytes;
        while self.pool.bytes > keep_bytes {
            let Some(oldest) = self.pool.take_last() else { break };
            self.dead.push(oldest);
        }
        before - self.pool.bytes
    }
}

fn run(shared: &Shared) {
    let mut list = shared.list();
    loop {
        match list.dead.pop() {
            Some(holding) => {
                list.busy = true;
                drop(list);
                drop(holding);
                list = shared.list();
                list.busy = false;
                if list.dead.head.is_none() {
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

    fn holding(range: &Arc<AddressRange>, page: usize, reusable: bool) -> Box<Holding> {
        let mapping = range.map(&Memory::Anonymous, page * 4096, 4096).unwrap();
        let holding = Holding::new(mapping, Memory::Anonymous);
        holding.reusable.store(reusable, Ordering::Release);
        holding
    }

    #[test]
    fn the_pool_keeps_the_newest_within_its_size_and_gives_by_size() {
        let reaper = Reaper::without_thread();
        let range = AddressRange::reserve(16 * 4096).unwrap();
        reaper.bury(holding(&range, 0, true));
        assert_eq!(reaper.pooled_bytes(), 0, "a pool of no size keeps nothing");
        reaper.set_pool_bytes(2 * 4096);
        reaper.bury(holding(&range, 1, false));
        assert_eq!(reaper.pooled_bytes(), 0, "what may not be used again is not kept");
        for page in 2..5 {
            reaper.bury(holding(&range, page, true));
        }
        assert_eq!(reaper.pooled_bytes(), 2 * 4096);
        assert!(reaper.reuse(8192).is_none(), "another size");
        let at = |holding: &Holding| holding.mapping.address().addr().get() - range.base().addr().get();
        let newest = reaper.reuse(4096).unwrap();
        assert_eq!(at(&newest), 4 * 4096);
        assert_eq!(at(&reaper.reuse(4096).unwrap()), 3 * 4096);
        assert!(reaper.reuse(4096).is_none(), "the oldest went");
        reaper.bury(newest);
        assert_eq!(reaper.trim_pool(0), 4096);
        reaper.run_once();
        assert_eq!(Arc::strong_count(&range), 1, "all of it is freed");
    }

    #[test]
    fn a_long_list_is_freed_without_a_deep_stack() {
        let reaper = Reaper::without_thread();
        let range = AddressRange::reserve(20_000 * 4096).unwrap();
        let whole = thread::Builder::new().stack_size(64 << 10).spawn(move || {
            for page in 0..20_000 {
                reaper.bury(holding(&range, page, false));
            }
            drop(reaper);
        });
        whole.unwrap().join().unwrap();
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
