//! Moves the memory of dropped segments to the pool, or to the thread that unmaps it.
//!
//! Unmapping and freeing a segment takes milliseconds, and the segment's last owner may be an
//! async task, which must not be delayed for that long. Dropping a segment therefore only moves
//! its memory to the pool or to the thread's list. The list is intrusive, so adding to it does not
//! allocate. The thread runs as long as memory can still be added to the list, which may be longer
//! than the loader lives.
//!
//! The **pool** keeps whole allocations, mapped and populated, so later loads need not allocate,
//! zero or populate them. It keeps only memory that was never handed out, because other code may
//! still access memory that was. Every release of memory takes the pool's lock. The pool is
//! therefore indexed by age and by size, so no operation has to search all of it while holding the
//! lock.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use dmabuf::{AddressRange, DmaBuf, Mapping, Memory, NotMoved};

use crate::memory::charge::Charge;

/// Maximum number of holdings that [`Reaper::trim_pool`] removes before it releases the lock.
/// Removing 64 takes about 20 µs.
const TRIM_BATCH: usize = 64;

/// A mapped allocation, with everything that the reaper needs to pool or free it.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) mapping: Mapping,
    pub(crate) memory: Memory,
    /// The dma-buf that was exported from the memory, if any. It holds references to the pages, so
    /// closing it may free them, which takes as long as unmapping. The reaper therefore closes it,
    /// too.
    pub(crate) exported: OnceLock<DmaBuf>,
    /// Whether the memory may be reused, because it is complete and was not handed out.
    pub(crate) reusable: AtomicBool,
    next: Option<Box<Holding>>,
    /// Declared last, so the charge is returned only after everything else is freed.
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

    /// Moves the mapping to offset `at` in `range`. If the kernel refuses, returns the unchanged
    /// holding and the error.
    pub(crate) fn move_to(self, range: &Arc<AddressRange>, at: usize) -> Result<Box<Self>, (Box<Self>, dmabuf::Error)> {
        let Holding { mapping, memory, exported, reusable, next, charge } = self;
        match mapping.move_to(range, at) {
            Ok(mapping) => Ok(Box::new(Holding { mapping, memory, exported, reusable, next, charge })),
            Err(NotMoved { mapping, error }) => {
                crate::support::foreign::emit(|| tracing::debug!(%error, "cannot reuse memory from the pool"));
                Err((Box::new(Holding { mapping, memory, exported, reusable, next, charge }), error))
            }
        }
    }
}

/// Holdings that are waiting to be freed, last in first out.
#[derive(Debug, Default)]
struct Stack {
    head: Option<Box<Holding>>,
}

impl Stack {
    fn push(&mut self, mut holding: Box<Holding>) {
        holding.next = self.head.take();
        self.head = Some(holding);
    }

    fn pop(&mut self) -> Option<Box<Holding>> {
        let mut found = self.head.take()?;
        self.head = found.next.take();
        Some(found)
    }
}

impl Drop for Stack {
    /// Pops the holdings one by one, because dropping a long chain would recurse once per holding.
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

/// Holdings that are kept for reuse, by age and by size.
#[derive(Debug, Default)]
struct Pool {
    /// Holdings by insertion number, so the oldest comes first.
    by_age: BTreeMap<u64, Box<Holding>>,
    /// Pairs of the size in bytes and the insertion number.
    by_size: BTreeSet<(u64, u64)>,
    bytes: u64,
    next: u64,
}

impl Pool {
    fn push(&mut self, holding: Box<Holding>) {
        let bytes = holding.bytes();
        self.bytes += bytes;
        self.by_size.insert((bytes, self.next));
        self.by_age.insert(self.next, holding);
        self.next += 1;
    }

    fn remove(&mut self, number: u64) -> Option<Box<Holding>> {
        let holding = self.by_age.remove(&number)?;
        self.bytes -= holding.bytes();
        self.by_size.remove(&(holding.bytes(), number));
        Some(holding)
    }

    fn take_oldest(&mut self) -> Option<Box<Holding>> {
        let number = *self.by_age.keys().next()?;
        self.remove(number)
    }

    /// Takes the most recently added holding of this size, whose pages are most likely to be in a
    /// CPU cache.
    fn take_newest(&mut self, bytes: u64) -> Option<Box<Holding>> {
        let &(_, number) = self.by_size.range((bytes, 0)..=(bytes, u64::MAX)).next_back()?;
        self.remove(number)
    }
}

#[derive(Debug, Default)]
struct List {
    dead: Stack,
    /// Memory that is kept for later loads, at most `pool_bytes` bytes.
    pool: Pool,
    pool_bytes: u64,
    /// Whether the thread is freeing a holding that it has taken off the list.
    busy: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct ReaperShared {
    list: Mutex<List>,
    changed: Condvar,
    idle: Condvar,
}

impl ReaperShared {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle to the reaper thread. The thread exits once the last clone of the handle is dropped
/// and the thread's list is empty.
#[derive(Debug, Clone)]
pub(crate) struct Reaper {
    shared: Arc<Closing>,
}

#[derive(Debug)]
struct Closing(Arc<ReaperShared>);

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
    /// If the thread can't be started.
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::new(ReaperShared::default());
        let reaper = Reaper { shared: Arc::new(Closing(Arc::clone(&shared))) };
        thread::Builder::new().name("dmaload-reap".to_owned()).spawn(move || run(&shared))?;
        Ok(reaper)
    }

    #[cfg(test)]
    pub(crate) fn without_thread() -> Self {
        Reaper { shared: Arc::new(Closing(Arc::default())) }
    }

    /// Frees everything on the list on the calling thread.
    #[cfg(test)]
    pub(crate) fn run_once(&self) {
        let dead = std::mem::take(&mut self.shared.0.list().dead);
        drop(dead);
    }

    /// Waits until the thread has freed everything on its list, or until `timeout` has elapsed.
    /// Returns whether there was anything to wait for.
    pub(crate) fn wait_until_idle(&self, timeout: Duration) -> bool {
        let list = self.shared.0.list();
        if !list.is_busy() {
            return false;
        }
        let _ = self.shared.0.idle.wait_timeout_while(list, timeout, |list| list.is_busy());
        true
    }

    /// Whether the thread has freed everything on its list and returned the charges.
    pub(crate) fn is_idle(&self) -> bool {
        !self.shared.0.list().is_busy()
    }

    /// Accepts memory that is no longer used. The memory goes to the pool if it may be reused and
    /// fits, possibly displacing older memory. Otherwise, the thread unmaps and frees it.
    pub(crate) fn release(&self, holding: Box<Holding>) {
        let bytes = holding.bytes();
        let mut ledger = None;
        // Account for the memory as pooled before another load can take it from the pool. If it
        // turns out not to fit, it counts as pooled until it is freed.
        if holding.reusable.load(Ordering::Acquire) && bytes <= self.shared.0.list().pool_bytes {
            ledger = holding.charge.ledger();
            holding.charge.pool();
        }
        if ledger.is_some() {
            let most = self.shared.0.list().pool_bytes;
            self.trim_pool(most.saturating_sub(bytes));
        }
        let mut list = self.shared.0.list();
        if holding.reusable.load(Ordering::Acquire) && bytes <= list.pool_bytes {
            // Make room again if other threads have added memory since.
            let room = list.pool_bytes - bytes;
            list.shrink_pool(room, usize::MAX);
            list.pool.push(holding);
        } else {
            list.dead.push(holding);
        }
        drop(list);
        self.shared.0.changed.notify_one();
        if let Some(ledger) = ledger.and_then(|ledger| ledger.upgrade()) {
            // A waiting load may have searched the pool just before this memory was added. This
            // call makes it search again.
            ledger.unpooled(0);
        }
    }

    /// Sets the pool's capacity, and removes the oldest memory until the pool fits into it.
    pub(crate) fn set_pool_bytes(&self, bytes: u64) {
        self.shared.0.list().pool_bytes = bytes;
        self.trim_pool(bytes);
    }

    /// Reduces the pool to `keep_bytes` bytes, removing the oldest memory first, and returns the
    /// number of bytes removed. The thread frees the removed memory. The lock is released after
    /// every [`TRIM_BATCH`] holdings, so threads that drop segments don't wait long.
    pub(crate) fn trim_pool(&self, keep_bytes: u64) -> u64 {
        let mut freed = 0;
        // Memory that enters the pool during this call is not counted; otherwise the call might
        // never return.
        let excess = self.pooled_bytes().saturating_sub(keep_bytes);
        while freed < excess {
            let part = self.shared.0.list().shrink_pool(keep_bytes, TRIM_BATCH);
            if part == 0 {
                break;
            }
            freed += part;
            self.shared.0.changed.notify_one();
        }
        freed
    }

    pub(crate) fn pooled_bytes(&self) -> u64 {
        self.shared.0.list().pool.bytes
    }

    /// Takes the most recently pooled memory of exactly this size.
    pub(crate) fn reuse(&self, bytes: usize) -> Option<Box<Holding>> {
        self.shared.0.list().pool.take_newest(bytes as u64)
    }
}

impl List {
    fn is_busy(&self) -> bool {
        self.busy || self.dead.head.is_some()
    }

    /// Moves the oldest holdings to the thread's list until the pool has at most `keep_bytes`
    /// bytes, or until `most` holdings have been moved. Returns the number of bytes moved.
    fn shrink_pool(&mut self, keep_bytes: u64, most: usize) -> u64 {
        let before = self.pool.bytes;
        for _ in 0..most {
            if self.pool.bytes <= keep_bytes {
                break;
            }
            let oldest = self.pool.take_oldest().expect("a pool with bytes should contain a holding");
            self.dead.push(oldest);
        }
        before - self.pool.bytes
    }
}

fn run(shared: &ReaperShared) {
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
    fn wait_covers_memory_that_is_still_being_freed() {
        let reaper = Reaper::start().unwrap();
        assert!(!reaper.wait_until_idle(Duration::from_secs(10)), "there should be nothing to wait for");
        let bytes = 64 << 20;
        let range = AddressRange::reserve(bytes).unwrap();
        for _ in 0..4 {
            let mapping = range.map(&Memory::Anonymous, 0, bytes).unwrap();
            mapping.populate(&Memory::Anonymous, 0..bytes, dmabuf::Pages::Small).unwrap();
            reaper.release(Holding::new(mapping, Memory::Anonymous));
            reaper.wait_until_idle(Duration::from_secs(60));
            assert_eq!(Arc::strong_count(&range), 1, "the memory should be freed before the wait ends");
        }
    }

    fn holding(range: &Arc<AddressRange>, page: usize, reusable: bool) -> Box<Holding> {
        let mapping = range.map(&Memory::Anonymous, page * 4096, 4096).unwrap();
        let holding = Holding::new(mapping, Memory::Anonymous);
        holding.reusable.store(reusable, Ordering::Release);
        holding
    }

    #[test]
    fn pool_evicts_the_oldest_and_reuses_the_newest_of_a_size() {
        let reaper = Reaper::without_thread();
        let range = AddressRange::reserve(16 * 4096).unwrap();
        reaper.release(holding(&range, 0, true));
        assert_eq!(reaper.pooled_bytes(), 0, "a pool without capacity should keep nothing");
        reaper.set_pool_bytes(2 * 4096);
        reaper.release(holding(&range, 1, false));
        assert_eq!(reaper.pooled_bytes(), 0, "memory that must not be reused should not be kept");
        for page in 2..5 {
            reaper.release(holding(&range, page, true));
        }
        assert_eq!(reaper.pooled_bytes(), 2 * 4096);
        assert!(reaper.reuse(8192).is_none(), "the pool should contain no memory of this size");
        let at = |holding: &Holding| holding.mapping.address().addr().get() - range.base().addr().get();
        let newest = reaper.reuse(4096).unwrap();
        assert_eq!(at(&newest), 4 * 4096);
        assert_eq!(at(&reaper.reuse(4096).unwrap()), 3 * 4096);
        assert!(reaper.reuse(4096).is_none(), "the oldest holding should have been evicted");
        reaper.release(newest);
        assert_eq!(reaper.trim_pool(0), 4096);
        reaper.run_once();
        assert_eq!(Arc::strong_count(&range), 1, "all memory should be freed");
    }

    /// Returns the minimum CPU time that `work` takes on a pool of `count` pages, over five runs.
    fn best_time(count: usize, work: impl Fn(&Reaper, &Arc<AddressRange>)) -> Duration {
        let range = AddressRange::reserve((count + 1) * 4096).unwrap();
        let times = [(); 5].map(|()| {
            let reaper = Reaper::without_thread();
            reaper.set_pool_bytes(count as u64 * 4096);
            (0..count).for_each(|page| reaper.release(holding(&range, page, true)));
            assert_eq!(reaper.pooled_bytes(), count as u64 * 4096);
            let start = thread_time();
            work(&reaper, &range);
            thread_time().saturating_sub(start)
        });
        times.into_iter().min().unwrap()
    }

    fn thread_time() -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
    }

    /// Asserts that `work` takes less than 32 times as long on 20,000 allocations as on 2,500.
    /// Linear work takes 8 times as long, and quadratic work 64 times.
    fn assert_linear(what: &str, work: impl Fn(&Reaper, &Arc<AddressRange>, usize)) {
        let [few, many] = [2_500, 20_000].map(|count| best_time(count, |reaper, range| work(reaper, range, count)));
        let ratio = many.as_secs_f64() / few.as_secs_f64().max(20e-6);
        assert!(ratio < 32.0, "{what}: {few:?} for 2,500 allocations, {many:?} for 20,000");
    }

    #[test]
    fn trimming_a_large_pool_takes_linear_time() {
        assert_linear("all at once", |reaper, _, count| {
            assert_eq!(reaper.trim_pool(0), count as u64 * 4096);
        });
        assert_linear("one by one", |reaper, _, count| {
            for left in (0..count).rev() {
                assert_eq!(reaper.trim_pool(left as u64 * 4096), 4096);
            }
        });
    }

    #[test]
    fn finding_sizes_in_a_large_pool_takes_linear_time() {
        assert_linear("no memory of this size", |reaper, _, count| {
            (0..count).for_each(|_| assert!(reaper.reuse(8192).is_none()));
        });
    }

    #[test]
    fn full_pool_replaces_its_oldest_in_constant_time() {
        assert_linear("the oldest is evicted", |reaper, range, count| {
            let newest = holding(range, count, true);
            let mut next = Some(newest);
            for _ in 0..count {
                reaper.release(next.take().unwrap());
                assert_eq!(reaper.pooled_bytes(), count as u64 * 4096);
                next = reaper.reuse(4096);
                // Put the evicted holding back, so the next call finds the pool full.
                let mut list = reaper.shared.0.list();
                let oldest = list.dead.pop().expect("a holding should have been evicted");
                list.pool.push(oldest);
            }
        });
    }

    #[test]
    fn pool_lock_is_held_for_few_allocations_at_a_time() {
        let reaper = Reaper::without_thread();
        let range = AddressRange::reserve(1000 * 4096).unwrap();
        reaper.set_pool_bytes(u64::MAX);
        (0..1000).for_each(|page| reaper.release(holding(&range, page, true)));
        let part = reaper.shared.0.list().shrink_pool(0, TRIM_BATCH);
        assert_eq!(part, TRIM_BATCH as u64 * 4096);
        assert_eq!(reaper.trim_pool(0), 1000 * 4096 - part);
    }

    #[test]
    fn long_list_is_freed_without_a_deep_stack() {
        let reaper = Reaper::without_thread();
        let range = AddressRange::reserve(20_000 * 4096).unwrap();
        let whole = thread::Builder::new().stack_size(64 << 10).spawn(move || {
            for page in 0..20_000 {
                reaper.release(holding(&range, page, false));
            }
            drop(reaper);
        });
        whole.unwrap().join().unwrap();
    }

    #[test]
    fn reaper_unmaps_even_after_the_last_handle_is_dropped() {
        let reaper = Reaper::start().unwrap();
        let range = AddressRange::reserve(40 * 4096).unwrap();
        for at in 0..40 {
            let mapping = range.map(&Memory::Anonymous, at * 4096, 4096).unwrap();
            reaper.release(Holding::new(mapping, Memory::Anonymous));
        }
        drop(reaper);
        let deadline = Instant::now() + Duration::from_secs(10);
        while Arc::strong_count(&range) > 1 {
            assert!(Instant::now() < deadline, "ranges still mapped: {}", Arc::strong_count(&range) - 1);
            thread::sleep(Duration::from_millis(1));
        }
    }
}
