//! The window: how many bytes may be allocated and not yet filled; and what part of anything
//! shared a load may have.
//!
//! It is what keeps the allocator and the reader in step: a permit is taken before memory is allocated, and comes
//! back when that memory is full (or given up).
//!
//! Loads whose reads do not come back must not come to hold all of it. So there are two levels.
//!
//! - What a *file system* may hold depends on what is free: three times what it leaves free, at
//!   most (dynamic queue length thresholds: Choudhury and Hahne, 1998), and a usual permit must
//!   still fit into that. Alone it has three quarters, two have three sevenths each. All loads
//!   from one file system count as one, since they wait for the same server or device: one that
//!   does not answer takes three quarters, a second one three quarters of the rest, and so on. A
//!   file system that holds nothing may take whatever fits.
//! - A *load* that holds something leaves one permit within the part of its file system to a load
//!   that comes. Where a window has room for fewer than [`MANY`], that would cost too much speed.
//!
//! Loads that have no part of it at the moment get one in their turn: who grants permits (the
//! scheduler, the driver, the pool of threads) goes round. Reads in flight, staging, registered
//! buffers and threads are shared by the same rule.

/// A budget that loads share. Pure bookkeeping: who waits, and where, is the scheduler's business. `L` names a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window<L> {
    bytes: u64,
    held: Holders<L>,
    /// So much must be left for others.
    usual: u64,
    /// Whether file systems share on the first level, or each load for itself.
    by_file_system: bool,
}

/// What became of an attempt to take a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permitted {
    Yes,
    /// The load has its part: nobody has to wait for it.
    HasItsPart,
    /// The load holds nothing, and its file system has its part: no load of that file system may
    /// overtake it, or it would wait for ever. Loads of others may.
    FileSystemHasItsPart,
    /// The load's file system holds nothing, and there is no room: nobody may overtake it, or it
    /// would wait for ever.
    Full,
}

/// So many times what it leaves free is what a file system may hold.
const TIMES_THE_REST: u64 = 3;

/// Where fewer than so many have room, nothing is kept for other file systems: one of two would be
/// half of the speed.
const FEW: u64 = 4;

/// Where fewer than so many have room, a load keeps nothing for others of its file system: of
/// eight permits, of which six are for that file system, it would be a sixth of the speed; of
/// sixteen it is a twelfth.
const MANY: u64 = 16;

/// What somebody holds who asks for more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// The load itself.
    pub(crate) by_load: u64,
    /// All loads from its file system.
    pub(crate) by_file_system: u64,
}

/// Whether somebody who holds `held` of `all` things, of which `taken` are taken, may have one
/// more.
pub(crate) fn may_have_one(all: u64, taken: u64, held: Held) -> bool {
    may_have(all, taken, held, 1, 1)
}

/// Whether somebody who holds `held` of `all`, of which `taken` is taken, may have `more`, while
/// others may want `usual`.
fn may_have(all: u64, taken: u64, held: Held, more: u64, usual: u64) -> bool {
    let file_system_may_have = |taken, held| within_part(all, taken, held, more, usual);
    let leaves_one = || file_system_may_have(taken.saturating_add(more), held.by_file_system.saturating_add(more));
    let keeps_none = held.by_load == 0 || all / MANY < more;
    file_system_may_have(taken, held.by_file_system) && (keeps_none || leaves_one())
}

/// The first level: whether a file system whose loads hold `held` may have `more`.
fn within_part(all: u64, taken: u64, held: u64, more: u64, usual: u64) -> bool {
    let Some(rest) = taken.checked_add(more).and_then(|sum| all.checked_sub(sum)) else { return false };
    held == 0 || all / FEW < more || usual <= rest && held.saturating_add(more) <= rest.saturating_mul(TIMES_THE_REST)
}

/// Who holds how much of something that loads share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holders<L> {
    taken: u64,
    /// What each load that holds something holds for files of each file system.
    held: Vec<(L, u64, u64)>,
}

impl<L: Clone + PartialEq> Holders<L> {
    pub(crate) fn new() -> Self {
        Holders { taken: 0, held: Vec::new() }
    }

    /// What is held by anybody.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// What this load holds, and its file system.
    pub(crate) fn held_by(&self, load: &L, file_system: u64) -> Held {
        let mut held = Held::default();
        for (other, from, amount) in &self.held {
            held.by_load += if other == load { *amount } else { 0 };
            held.by_file_system += if *from == file_system { *amount } else { 0 };
        }
        held
    }

    /// Whether this load may have one more of `all` for a file of this file system.
    pub(crate) fn may_have_one(&self, all: u64, load: &L, file_system: u64) -> bool {
        may_have_one(all, self.taken, self.held_by(load, file_system))
    }

    pub(crate) fn take(&mut self, load: &L, file_system: u64, amount: u64) {
        self.taken += amount;
        match self.held.iter_mut().find(|(other, from, _)| other == load && *from == file_system) {
            Some((.., held)) => *held += amount,
            None if amount > 0 => self.held.push((load.clone(), file_system, amount)),
            None => {}
        }
    }

    /// # Panics
    /// When more comes back than was taken: the bookkeeping is broken.
    pub(crate) fn give_back(&mut self, load: &L, file_system: u64, amount: u64) {
        let own = |(other, from, _): &(L, u64, u64)| other == load && *from == file_system;
        let held = self.held.iter().find(|entry| own(entry)).map_or(0, |&(.., held)| held);
        assert!(amount <= held, "{amount} of {held} that are held come back");
        self.taken -= amount;
        self.held.retain_mut(|entry| {
            entry.2 -= if own(entry) { amount } else { 0 };
            entry.2 > 0
        });
    }
}

impl<L: Clone + PartialEq> Window<L> {
    /// One of so many, of which permits are for `usual` or less, or else are few.
    pub(crate) fn new(bytes: u64, usual: u64) -> Self {
        Window { bytes, held: Holders::new(), usual: usual.min(bytes / FEW), by_file_system: true }
    }

    /// The same of something that each load shares for itself, whatever file system it reads.
    pub(crate) fn of_loads(bytes: u64, usual: u64) -> Self {
        Window { by_file_system: false, ..Window::new(bytes, usual) }
    }

    /// What this load holds.
    #[cfg(test)]
    pub(crate) fn held_by(&self, load: &L) -> u64 {
        self.held.held_by(load, 0).by_load
    }

    /// Takes a permit for `bytes` of a file of this file system, all of it or nothing.
    #[must_use]
    pub(crate) fn take(&mut self, load: &L, file_system: u64, bytes: u64) -> Permitted {
        if bytes == 0 {
            return Permitted::Yes;
        }
        let mut held = self.held.held_by(load, file_system);
        if !self.by_file_system {
            held.by_file_system = held.by_load;
        }
        if !may_have(self.bytes, self.held.taken(), held, bytes, self.usual) {
            return match held {
                Held { by_load: 0, by_file_system: 0 } => Permitted::Full,
                Held { by_load: 0, .. } => Permitted::FileSystemHasItsPart,
                Held { .. } => Permitted::HasItsPart,
            };
        }
        self.held.take(load, file_system, bytes);
        Permitted::Yes
    }

    /// Gives a permit back.
    ///
    /// # Panics
    /// When more comes back than was taken: the bookkeeping is broken, and going on would allocate without bound.
    pub(crate) fn give_back(&mut self, load: &L, file_system: u64, bytes: u64) {
        self.held.give_back(load, file_system, bytes);
    }

    pub(crate) fn taken_bytes(&self) -> u64 {
        self.held.taken()
    }

    /// Who holds permits, and of files of which file systems; one of several for each of them.
    pub(crate) fn holders(&self) -> impl Iterator<Item = (&L, u64)> {
        self.held.held.iter().map(|(load, file_system, _)| (load, *file_system))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How often each of these loads gets one, in turns, until nobody gets any. Each has the file
    /// system of the same place.
    fn parts<const N: usize>(window: &mut Window<usize>, loads: [usize; N], file_systems: [u64; N]) -> [u64; N] {
        let mut got = [0; N];
        loop {
            let before = got;
            for (at, (load, file_system)) in loads.iter().zip(file_systems).enumerate() {
                got[at] += u64::from(window.take(load, file_system, 1) == Permitted::Yes);
            }
            if got == before {
                return got;
            }
        }
    }

    #[test]
    fn a_window_gives_out_no_more_than_its_size() {
        let mut window = Window::new(10, 1);
        assert_eq!(window.take(&1, 1, 10), Permitted::Yes);
        assert_eq!(window.take(&2, 2, 1), Permitted::Full);
        window.give_back(&1, 1, 4);
        assert_eq!(window.take(&2, 2, 5), Permitted::Full);
        assert_eq!(window.take(&2, 2, 4), Permitted::Yes);
        assert_eq!(window.taken_bytes(), 10);
    }

    #[test]
    fn something_is_left_for_those_to_come() {
        for (size, alone, [first, second]) in [(8, 6, [3, 3]), (32, 23, [13, 13]), (128, 95, [54, 54])] {
            let mut window = Window::new(size, 1);
            assert_eq!(parts(&mut window, [1], [1]), [alone], "of {size}");
            assert_eq!(window.take(&1, 1, 1), Permitted::HasItsPart);
            // The first holds what it has for ever: one after the other the others get something, and can give it back.
            assert_eq!(window.take(&2, 2, 1), Permitted::Yes);
            window.give_back(&2, 2, 1);
            let mut window = Window::new(size, 1);
            assert_eq!(parts(&mut window, [1, 2], [1, 2]), [first, second], "of {size}");
        }
    }

    #[test]
    fn loads_of_one_file_system_have_the_part_of_one_together() {
        for (size, [first, second, third]) in [(8, [3, 3, 0]), (32, [12, 11, 1]), (128, [48, 47, 1])] {
            let mut window = Window::new(size, 1);
            assert_eq!(parts(&mut window, [1, 2], [7, 7]), [first, second], "of {size}");
            // Where there are many, one is left to a load that comes; not to two.
            assert_eq!(parts(&mut window, [3], [7]), [third], "of {size}");
            assert_eq!(window.take(&4, 7, 1), Permitted::FileSystemHasItsPart);
            assert_eq!(window.taken_bytes(), size * 3 / 4);
            // Another file system has three quarters of the rest, as if it were alone with that.
            assert!(parts(&mut window, [5], [8])[0] >= size / 8, "of {size}");
            window.give_back(&1, 7, 1);
            assert_ne!(window.take(&5, 8, 1), Permitted::Full);
        }
    }

    #[test]
    fn a_window_with_room_for_few_is_all_for_one() {
        for size in 1..4 {
            assert_eq!(parts(&mut Window::new(size, 1), [1], [1]), [size]);
        }
        assert_eq!(parts(&mut Window::new(4, 1), [1], [1]), [3]);
    }

    #[test]
    fn what_is_left_has_room_for_a_usual_permit() {
        let mut window = Window::new(16, 4);
        assert_eq!(window.take(&1, 1, 8), Permitted::Yes);
        assert_eq!([1; 3].map(|bytes| window.take(&2, 2, bytes)), [Permitted::Yes; 3]);
        assert_eq!(window.take(&2, 2, 1), Permitted::HasItsPart, "one is left to the next load of its file system");
        assert_eq!(window.take(&3, 2, 1), Permitted::Yes);
        assert_eq!(window.take(&4, 2, 1), Permitted::FileSystemHasItsPart);
        assert_eq!(window.take(&3, 3, 4), Permitted::Yes);
    }

    #[test]
    #[should_panic(expected = "come back")]
    fn a_permit_that_was_never_taken_cannot_come_back() {
        let mut window = Window::new(10, 1);
        assert_eq!(window.take(&1, 1, 5), Permitted::Yes);
        window.give_back(&1, 2, 1);
    }

    /// What a load may have in the window by default, in batches of 16 MiB: as much as before
    /// loads were counted by file system.
    #[test]
    fn one_load_has_six_of_eight_batches_and_two_silent_file_systems_leave_one() {
        let mut window = Window::new(8 << 4, 1 << 4);
        let mut take = |load, file_system| window.take(&load, file_system, 1 << 4);
        assert_eq!([(); 6].map(|()| take(1, 1)), [Permitted::Yes; 6]);
        assert_eq!(take(1, 1), Permitted::HasItsPart);
        for load in 2..20 {
            assert_eq!(take(load, 1), Permitted::FileSystemHasItsPart);
        }
        assert_eq!(take(20, 2), Permitted::Yes);
        for load in 21..40 {
            assert_eq!(take(load, 2), Permitted::FileSystemHasItsPart);
        }
        assert_eq!(take(40, 3), Permitted::Yes);
        assert_eq!(take(41, 4), Permitted::Full);
    }

    proptest! {
        #[test]
        fn never_more_is_out_than_the_window_holds(
            size in 0u64..1000,
            file_systems in 1u8..4,
            steps in proptest::collection::vec((any::<bool>(), 0u8..6, 1u64..1200), 0..200),
        ) {
            let mut window = Window::new(size, 1);
            let mut out: Vec<(u8, u64)> = Vec::new();
            for (take, load, bytes) in steps {
                let of = |load: u8| u64::from(load % file_systems);
                if take {
                    let sum = |counts: &dyn Fn(u8) -> bool| -> u64 {
                        out.iter().filter(|&&(other, _)| counts(other)).map(|&(_, bytes)| bytes).sum()
                    };
                    let room = size - sum(&|_| true);
                    let own = sum(&|other| other == load);
                    let by_file_system = sum(&|other| of(other) == of(load));
                    let permitted = window.take(&load, of(load), bytes);
                    let expected_refusal = match (own, by_file_system) {
                        (0, 0) => Permitted::Full,
                        (0, _) => Permitted::FileSystemHasItsPart,
                        _ => Permitted::HasItsPart,
                    };
                    prop_assert!(permitted == Permitted::Yes || permitted == expected_refusal);
                    let yes = permitted == Permitted::Yes;
                    prop_assert!(!yes || bytes <= room);
                    prop_assert!(by_file_system > 0 || yes == (bytes <= room), "a file system that holds nothing gets what fits");
                    if yes && by_file_system > 0 && bytes <= size / FEW {
                        prop_assert!(by_file_system + bytes <= TIMES_THE_REST * (room - bytes), "and no more than its part");
                        prop_assert!(room > bytes, "something is left");
                    }
                    if yes {
                        out.push((load, bytes));
                    }
                } else if let Some((load, bytes)) = out.pop() {
                    window.give_back(&load, of(load), bytes);
                }
                prop_assert_eq!(window.taken_bytes(), out.iter().map(|&(_, bytes)| bytes).sum::<u64>());
            }
        }

        /// However many loads wait for two silent file systems, in whatever order they came.
        #[test]
        fn two_silent_file_systems_leave_something_to_a_third(
            size in 5u64..200,
            takes in proptest::collection::vec((0u64..2, 0usize..30), 0..1000),
        ) {
            let mut held = Holders::new();
            for (file_system, load) in takes {
                if held.may_have_one(size, &load, file_system) {
                    held.take(&load, file_system, 1);
                }
            }
            let by = |file_system| held.held_by(&usize::MAX, file_system).by_file_system;
            prop_assert!(by(0) <= size * 3 / 4 && by(1) <= size * 3 / 4);
            prop_assert!(by(0) + by(1) <= size * 15 / 16, "{} and {} of {size}", by(0), by(1));
            prop_assert!(held.may_have_one(size, &usize::MAX, 2));
        }

        /// One load and its file system, alone: what it may have hardly depends on there being two
        /// levels.
        #[test]
        fn one_load_has_what_its_file_system_has_less_one_at_most(size in 1u64..2000) {
            let (mut one, mut many) = (Holders::new(), Holders::new());
            while one.may_have_one(size, &0, 0) {
                one.take(&0, 0, 1);
            }
            while many.may_have_one(size, &many.taken(), 0) {
                let load = many.taken();
                many.take(&load, 0, 1);
            }
            prop_assert!(many.taken() == size * 3 / 4 || size < FEW);
            prop_assert_eq!(one.taken(), many.taken() - u64::from(size >= MANY));
        }
    }
}
