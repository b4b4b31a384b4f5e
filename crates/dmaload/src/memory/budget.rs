//! Limits the memory that loads hold: segments being filled, and segments that their consumers
//! have not dropped yet.
//!
//! Each admitted load has a reservation that no other load can use. A *kept* load, whose consumer
//! keeps all segments (an image, for example), reserves all of its memory. A *stream*, whose
//! consumer may drop each segment before it takes the next, reserves its largest segment, or the
//! segments of its largest tensor if these are larger. Every load can therefore proceed once its
//! own consumer drops something, and a consumer that stops taking segments delays only its own
//! load.
//!
//! A load may exceed its reservation under two conditions. It may hold at most an equal share of
//! half the limit (that half divided by the number of admitted loads), and the other half must
//! stay free for the reservations of later loads.
//!
//! A kept load holds its memory forever if its file system stops responding. The kept loads from
//! one file system together therefore get at most three quarters of the limit, unless a single one
//! needs more. (Streams are exempt: a consumer may read several streams in any order, so one must
//! not wait for another.)
//!
//! ```text
//!   limit   |- reserved, or held if that is more ----|- held by finished loads -|---- free -----|
//!   present |------------------- held by any load ------------------|-- pool --|
//! ```
//!
//! Memory in the pool is not held by any load, but it is still allocated. If all allocated memory
//! and a new allocation together would exceed the limit, pooled memory is freed first.
//!
//! This module only does the bookkeeping; the scheduler decides which loads wait.

/// The memory budget of a loader. `L` identifies a load.
#[derive(Debug)]
pub(crate) struct Budget<L> {
    limit: u64,
    accounts: Vec<Account<L>>,
    /// Bytes held by loads that were closed.
    loose: u64,
    pooled: u64,
}

#[derive(Debug)]
struct Account<L> {
    load: L,
    /// The load's file system, if the load is kept.
    kept_from: Option<u64>,
    reserved: u64,
    held: u64,
}

impl<L> Account<L> {
    /// Bytes that no other load may take.
    fn taken(&self) -> u64 {
        self.held.max(self.reserved)
    }
}

/// The result of trying to admit a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admitted {
    Yes,
    /// The load is kept, and other kept loads from its file system hold or reserve memory. Its
    /// reservation would exceed the file system's share, or does not fit. Loads from that file
    /// system must not overtake this one; loads from other file systems may.
    FileSystemAtShare,
    /// The reservation does not fit. Either the load is a stream, or no other kept load from its
    /// file system holds or reserves memory. No load may overtake this one.
    No,
}

/// Maximum ratio of reserved to free memory for the kept loads of one file system, which together
/// get at most three quarters of the limit.
const HELD_TO_FREE_MAX: u64 = 3;

/// The result of trying to take memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    Yes,
    /// The load has reached its share and must wait until memory is returned.
    No,
    /// The pool has to free this many bytes first.
    Pooled(u64),
}

impl<L: PartialEq> Budget<L> {
    pub(crate) fn new(limit: u64) -> Self {
        Budget { limit, accounts: Vec::new(), loose: 0, pooled: 0 }
    }

    pub(crate) fn is_unlimited(&self) -> bool {
        self.limit == u64::MAX
    }

    /// The number of bytes that are neither held nor reserved.
    fn free(&self) -> u64 {
        let taken = self.accounts.iter().map(Account::taken).fold(self.loose, u64::saturating_add);
        self.limit.saturating_sub(taken)
    }

    /// The number of bytes that loads hold, including closed ones.
    pub(crate) fn held(&self) -> u64 {
        self.accounts.iter().map(|account| account.held).fold(self.loose, u64::saturating_add)
    }

    /// The number of bytes that this load holds; 0 if the load is not admitted or is closed.
    pub(crate) fn held_by(&self, load: &L) -> u64 {
        self.accounts.iter().find(|account| account.load == *load).map_or(0, |account| account.held)
    }

    /// The number of bytes that are allocated: held, or in the pool.
    pub(crate) fn present(&self) -> u64 {
        self.held().saturating_add(self.pooled)
    }

    /// Admits a load if its reservation fits into the free memory and, for a kept load, into the
    /// share of its file system, `kept_from`.
    pub(crate) fn admit(&mut self, load: L, reserved: u64, kept_from: Option<u64>) -> Admitted {
        let same = self.accounts.iter().filter(|account| kept_from.is_some() && account.kept_from == kept_from);
        let by_file_system = same.map(Account::taken).fold(0, u64::saturating_add);
        let left = self.free().checked_sub(reserved);
        let within_share =
            left.is_some_and(|left| by_file_system.saturating_add(reserved) <= left.saturating_mul(HELD_TO_FREE_MAX));
        if by_file_system > 0 && !within_share {
            return Admitted::FileSystemAtShare;
        }
        if left.is_none() {
            return Admitted::No;
        }
        self.accounts.push(Account { load, kept_from, reserved, held: 0 });
        Admitted::Yes
    }

    /// Takes memory for an admitted load.
    #[must_use]
    pub(crate) fn take(&mut self, load: &L, bytes: u64) -> Taken {
        let taken = self.may_take(load, bytes);
        if taken == Taken::Yes
            && bytes > 0
            && let Some(account) = self.accounts.iter_mut().find(|account| account.load == *load)
        {
            account.held = account.held.saturating_add(bytes);
        }
        taken
    }

    /// Returns the result that [`Self::take`] would return, without taking memory.
    pub(crate) fn may_take(&self, load: &L, bytes: u64) -> Taken {
        if bytes == 0 {
            return Taken::Yes;
        }
        let (free, present, accounts) = (self.free(), self.present(), self.accounts.len() as u64);
        let half = self.limit / 2;
        let account = self.accounts.iter().find(|account| account.load == *load);
        let account = account.expect("a load must be admitted before it takes memory");
        let wanted = account.held.saturating_add(bytes);
        let extra = wanted.saturating_sub(account.held.max(account.reserved));
        let shared =
            wanted <= account.reserved.max(half / accounts.max(1)) && free.checked_sub(extra).is_some_and(|left| left >= half);
        if extra > 0 && !shared {
            return Taken::No;
        }
        match present.saturating_add(bytes).checked_sub(self.limit) {
            None | Some(0) => Taken::Yes,
            Some(short) => Taken::Pooled(short),
        }
    }

    /// Returns memory that was freed or was not needed.
    ///
    /// # Panics
    /// If more is returned than was taken. The bookkeeping is then broken, and continuing could
    /// allocate without bound.
    pub(crate) fn give_back(&mut self, load: &L, bytes: u64) {
        let held = match self.accounts.iter_mut().find(|account| account.load == *load) {
            Some(account) => &mut account.held,
            None => &mut self.loose,
        };
        assert!(bytes <= *held, "{bytes} bytes are returned, but only {held} are held");
        *held -= bytes;
    }

    /// Ends a load's reservation. Memory that the load still holds continues to count against the
    /// limit.
    pub(crate) fn close(&mut self, load: &L) {
        if let Some(at) = self.accounts.iter().position(|account| account.load == *load) {
            self.loose += self.accounts.swap_remove(at).held;
        }
    }

    /// Moves memory that a load held to the pool.
    pub(crate) fn pool(&mut self, load: &L, bytes: u64) {
        self.give_back(load, bytes);
        self.pooled += bytes;
    }

    /// Removes memory from the pool, because it was freed or because a load reuses it. Such a load
    /// has already taken the same amount from the budget.
    ///
    /// # Panics
    /// If more is removed than the pool has.
    pub(crate) fn unpool(&mut self, bytes: u64) {
        assert!(bytes <= self.pooled, "{bytes} bytes are removed from a pool of {}", self.pooled);
        self.pooled -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reservation_is_available_whatever_others_do() {
        let mut budget = Budget::new(100);
        assert_eq!(budget.admit(1, 10, None), Admitted::Yes);
        // A load that runs alone may take half of the limit.
        assert_eq!(budget.take(&1, 50), Taken::Yes);
        assert_eq!(budget.take(&1, 1), Taken::No);
        for load in 2..7 {
            assert_eq!(budget.admit(load, 10, None), Admitted::Yes, "{load}");
            assert_eq!(budget.take(&load, 10), Taken::Yes);
            assert_eq!(budget.take(&load, 1), Taken::No);
        }
        assert_eq!(budget.admit(7, 1, None), Admitted::No);
        assert_eq!(budget.held(), 100);
        budget.give_back(&3, 10);
        assert_eq!(budget.take(&2, 1), Taken::No, "load 2 should not get memory that load 3 has reserved");
        assert_eq!(budget.take(&3, 10), Taken::Yes);
    }

    #[test]
    fn finished_load_counts_until_its_memory_is_dropped() {
        let mut budget = Budget::new(10);
        assert_eq!(budget.admit(1, 10, None), Admitted::Yes);
        assert_eq!(budget.take(&1, 8), Taken::Yes);
        budget.close(&1);
        assert_eq!(budget.admit(2, 3, None), Admitted::No);
        budget.give_back(&1, 8);
        assert_eq!(budget.admit(2, 10, None), Admitted::Yes);
    }

    #[test]
    fn pool_yields_and_does_not_delay_admission() {
        let mut budget = Budget::new(10);
        assert_eq!(budget.admit(1, 10, None), Admitted::Yes);
        assert_eq!(budget.take(&1, 8), Taken::Yes);
        budget.close(&1);
        budget.pool(&1, 8);
        assert_eq!(budget.admit(2, 9, None), Admitted::Yes, "pooled memory should not delay admission");
        assert_eq!(budget.take(&2, 2), Taken::Yes);
        assert_eq!(budget.take(&2, 3), Taken::Pooled(3));
        budget.unpool(4);
        assert_eq!(budget.take(&2, 3), Taken::Yes);
        assert_eq!((budget.held(), budget.present()), (5, 9));
    }

    proptest! {
        #[test]
        fn limit_holds_and_reserved_memory_is_always_available(
            limit in 1u64..200,
            steps in proptest::collection::vec((0u8..6, 0usize..8, 1u64..60), 0..200),
        ) {
            let mut budget = Budget::new(limit);
            let (mut open, mut held, mut pooled) = (Vec::<(usize, u64)>::new(), Vec::<(usize, u64)>::new(), 0);
            for (number, (step, pick, bytes)) in steps.into_iter().enumerate() {
                match step {
                    0 if budget.admit(number, bytes, None) == Admitted::Yes => open.push((number, bytes)),
                    1 | 2 => {
                        if let Some(&(load, _)) = open.get(pick % open.len().max(1)) && budget.take(&load, bytes) == Taken::Yes {
                            held.push((load, bytes));
                        }
                    }
                    3 if !held.is_empty() => {
                        let (load, bytes) = held.swap_remove(pick % held.len());
                        budget.give_back(&load, bytes);
                    }
                    4 if !open.is_empty() => budget.close(&open.swap_remove(pick % open.len()).0),
                    5 if !held.is_empty() => {
                        let (load, bytes) = held.swap_remove(pick % held.len());
                        budget.pool(&load, bytes);
                        pooled += bytes;
                    }
                    _ => {}
                }
                let sum: u64 = held.iter().map(|(_, bytes)| bytes).sum();
                prop_assert_eq!((budget.held(), budget.present()), (sum, sum + pooled));
                prop_assert!(budget.present() <= limit);
                for &(load, reserved) in &open {
                    if !held.iter().any(|(holder, _)| *holder == load) {
                        let before = budget.held();
                        budget.unpool(pooled);
                        prop_assert_eq!(budget.take(&load, reserved), Taken::Yes);
                        budget.give_back(&load, reserved);
                        budget.pooled += pooled;
                        prop_assert_eq!(budget.held(), before);
                    }
                }
            }
        }
    }
}
