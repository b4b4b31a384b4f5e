//! How much memory loads may hold: in segments that are being filled, and in those that their consumers have not dropped.
//!
//! Each load that was let in has a reservation that nobody else can take: its largest segment, or, where all of it will be in memory at
//! once, all of it. So it can always go on when its own consumer drops something, and a consumer that stops blocks itself alone.
//! What is beyond reservations is shared, up to half of the limit: the other half is for reservations of loads to come.
//!
//! Loads that are kept reserve all of themselves, and a file system that does not answer would
//! have that reserved for ever. So such loads from one file system have three quarters of the
//! limit together, unless a single one needs more. (A consumer may take from several streams in
//! any order, so that one of them must not wait for another.)
//!
//! ```text
//!   limit |- reserved, or held where that is more -|- held by loads that are over -|--------- free ---------|
//!   there |------------------- held by anybody ------------------|-- pool --|
//! ```
//!
//! The pool is memory that nobody holds. It is there, though: it has to give way before more is allocated.
//!
//! Pure bookkeeping: who waits, and where, is the scheduler's business.

/// See the module. `L` names a load.
#[derive(Debug)]
pub(crate) struct Budget<L> {
    limit: u64,
    accounts: Vec<Account<L>>,
    /// Held by loads that take nothing any more.
    loose: u64,
    pooled: u64,
}

#[derive(Debug)]
struct Account<L> {
    load: L,
    /// The file system of a load that is kept.
    kept_from: Option<u64>,
    reserved: u64,
    held: u64,
}

impl<L> Account<L> {
    /// What nobody else may take.
    fn taken(&self) -> u64 {
        self.held.max(self.reserved)
    }
}

/// What became of an attempt to let a load in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admitted {
    Yes,
    /// Its file system has its part: loads of others may be let in before it.
    FileSystemHasItsPart,
    /// There is no room.
    No,
}

/// So many times what it leaves free is what kept loads from a file system may reserve.
const TIMES_THE_REST: u64 = 3;

/// What became of an attempt to take memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    Yes,
    /// The load has its share; something has to be dropped first.
    No,
    /// The pool has to give so much first.
    Pooled(u64),
}

impl<L: PartialEq> Budget<L> {
    pub(crate) fn new(limit: u64) -> Self {
        Budget { limit, accounts: Vec::new(), loose: 0, pooled: 0 }
    }

    pub(crate) fn is_unlimited(&self) -> bool {
        self.limit == u64::MAX
    }

    /// What nobody holds or has reserved.
    fn free(&self) -> u64 {
        let taken = self.accounts.iter().map(Account::taken).fold(self.loose, u64::saturating_add);
        self.limit.saturating_sub(taken)
    }

    /// What is held by anybody.
    pub(crate) fn held(&self) -> u64 {
        self.accounts.iter().map(|account| account.held).fold(self.loose, u64::saturating_add)
    }

    /// What is there: held, or kept in the pool.
    pub(crate) fn there(&self) -> u64 {
        self.held().saturating_add(self.pooled)
    }

    /// Lets a load in, if what it reserves is free. One that is kept is `kept_from` a file system.
    pub(crate) fn admit(&mut self, load: L, reserved: u64, kept_from: Option<u64>) -> Admitted {
        let same = self.accounts.iter().filter(|account| kept_from.is_some() && account.kept_from == kept_from);
        let by_file_system = same.map(Account::taken).fold(0, u64::saturating_add);
        let left = self.free().checked_sub(reserved);
        let within_part = left.is_some_and(|left| by_file_system.saturating_add(reserved) <= left.saturating_mul(TIMES_THE_REST));
        if by_file_system > 0 && !within_part {
            return Admitted::FileSystemHasItsPart;
        }
        if left.is_none() {
            return Admitted::No;
        }
        self.accounts.push(Account { load, kept_from, reserved, held: 0 });
        Admitted::Yes
    }

    /// Takes memory for a load that was let in.
    #[must_use]
    pub(crate) fn take(&mut self, load: &L, bytes: u64) -> Taken {
        if bytes == 0 {
            return Taken::Yes;
        }
        let (free, there, accounts) = (self.free(), self.there(), self.accounts.len() as u64);
        let half = self.limit / 2;
        let account = self.accounts.iter_mut().find(|account| account.load == *load);
        let account = account.expect("only a load that was let in takes memory");
        let wanted = account.held.saturating_add(bytes);
        let extra = wanted.saturating_sub(account.held.max(account.reserved));
        let shared =
            wanted <= account.reserved.max(half / accounts.max(1)) && free.checked_sub(extra).is_some_and(|left| left >= half);
        if extra > 0 && !shared {
            return Taken::No;
        }
        match there.saturating_add(bytes).checked_sub(self.limit) {
            None | Some(0) => {
                account.held = wanted;
                Taken::Yes
            }
            Some(short) => Taken::Pooled(short),
        }
    }

    /// Memory is freed, or was not needed.
    ///
    /// # Panics
    /// When more comes back than was taken: the bookkeeping is broken, and going on would allocate without bound.
    pub(crate) fn give_back(&mut self, load: &L, bytes: u64) {
        let held = match self.accounts.iter_mut().find(|account| account.load == *load) {
            Some(account) => &mut account.held,
            None => &mut self.loose,
        };
        assert!(bytes <= *held, "{bytes} bytes come back of {held} that are held");
        *held -= bytes;
    }

    /// A load takes nothing any more. What it holds, it holds until it is given back; from then on without its name.
    pub(crate) fn close(&mut self, load: &L) {
        if let Some(at) = self.accounts.iter().position(|account| account.load == *load) {
            self.loose += self.accounts.swap_remove(at).held;
        }
    }

    /// Memory that a load held is in the pool.
    pub(crate) fn pool(&mut self, load: &L, bytes: u64) {
        self.give_back(load, bytes);
        self.pooled += bytes;
    }

    /// Memory of the pool is used again by somebody who has taken it, or is freed.
    ///
    /// # Panics
    /// As [`Self::give_back`].
    pub(crate) fn unpool(&mut self, bytes: u64) {
        assert!(bytes <= self.pooled, "{bytes} bytes come out of a pool that has {}", self.pooled);
        self.pooled -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_reservation_is_there_whatever_others_do() {
        let mut budget = Budget::new(100);
        assert_eq!(budget.admit(1, 10, None), Admitted::Yes);
        // Alone it may take half of what there is.
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
        assert_eq!(budget.take(&2, 1), Taken::No, "what load 3 has reserved");
        assert_eq!(budget.take(&3, 10), Taken::Yes);
    }

    #[test]
    fn what_a_load_leaves_behind_counts_until_it_is_dropped() {
        let mut budget = Budget::new(10);
        assert_eq!(budget.admit(1, 10, None), Admitted::Yes);
        assert_eq!(budget.take(&1, 8), Taken::Yes);
        budget.close(&1);
        assert_eq!(budget.admit(2, 3, None), Admitted::No);
        budget.give_back(&1, 8);
        assert_eq!(budget.admit(2, 10, None), Admitted::Yes);
    }

    #[test]
    fn the_pool_gives_way_and_is_no_reason_to_wait() {
        let mut budget = Budget::new(10);
        assert_eq!(budget.admit(1, 10, None), Admitted::Yes);
        assert_eq!(budget.take(&1, 8), Taken::Yes);
        budget.close(&1);
        budget.pool(&1, 8);
        assert_eq!(budget.admit(2, 9, None), Admitted::Yes, "nobody holds it");
        assert_eq!(budget.take(&2, 2), Taken::Yes);
        assert_eq!(budget.take(&2, 3), Taken::Pooled(3));
        budget.unpool(4);
        assert_eq!(budget.take(&2, 3), Taken::Yes);
        assert_eq!((budget.held(), budget.there()), (5, 9));
    }

    proptest! {
        #[test]
        fn the_limit_is_never_passed_and_an_empty_load_can_always_take_what_it_reserved(
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
                prop_assert_eq!((budget.held(), budget.there()), (sum, sum + pooled));
                prop_assert!(budget.there() <= limit);
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
