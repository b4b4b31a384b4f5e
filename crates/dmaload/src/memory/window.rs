//! The window limits how many bytes may be allocated but not yet filled. It also limits how much
//! of a shared resource each load may hold.
//!
//! The window keeps allocation and reading in step: a permit is taken before memory is allocated,
//! and returned when that memory is filled or abandoned. The engine's permits are
//! `engine::WindowPermit`; in `engine::schedule`, the next batch of a load waits for one.
//!
//! Loads whose reads never complete must not end up holding the whole window. The share of each
//! load is therefore limited on two levels:
//!
//! - A *file system* may hold at most three times as much as remains free, and a permit of the
//!   usual size must still fit into the rest. (Such dynamic thresholds are described by Choudhury
//!   and Hahne, 1998.) A single file system therefore gets three quarters of the window, and two
//!   get three sevenths each. A file system that holds nothing may take anything that fits.
//!   Windows with room for fewer than [`FEW`] permits are exempt.
//!
//!   All loads from one file system count as one, because they wait for the same server or device.
//!   If that server or device stops responding, its loads hold up to three quarters of the window.
//!   If a second file system stops responding, its loads hold up to three quarters of the rest,
//!   and so on.
//! - A *load* that already holds something must leave one permit of its file system's share free,
//!   so a new load can start. Windows with room for fewer than [`MANY`] permits are exempt,
//!   because the unused permit would cost too much speed.
//!
//! Loads that hold nothing take turns: the scheduler and the driver serve loads round-robin, and
//! the thread pool serves reads in order of arrival.
//!
//! The same rules govern reads in flight, staging, registered buffers and threads. They also
//! govern open small files, but with shares per load rather than per file system
//! ([`Window::per_load`]).

/// A number of bytes that loads share through permits. This type only does the bookkeeping; the
/// scheduler decides which loads wait. `L` identifies a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window<L> {
    bytes: u64,
    held: Holders<L>,
    /// The number of bytes that must stay free for others. This is the usual size of a permit, but
    /// at most the window divided by [`FEW`].
    usual: u64,
    /// Whether shares are per file system; if not, they are per load.
    by_file_system: bool,
}

/// The result of trying to take a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permitted {
    Yes,
    /// The load already holds something, and the permit would exceed a share or does not fit.
    /// Other loads may overtake this one.
    LoadAtShare,
    /// The load holds nothing, but other loads from its file system do, and the permit would
    /// exceed the share of that file system or does not fit. Loads from that file system must not
    /// overtake this one, or it could wait forever. Loads from other file systems may.
    FileSystemAtShare,
    /// The load's file system holds nothing, but the permit does not fit. No other load may
    /// overtake it, or it could wait forever.
    Full,
}

/// Maximum ratio of held to free space for one file system. With this ratio, a single file system
/// gets three quarters of the window.
const HELD_TO_FREE_MAX: u64 = 3;

/// If the window has room for fewer permits than this, nothing is reserved for other file systems:
/// reserving one of two would halve the speed.
const FEW: u64 = 4;

/// If the window has room for fewer permits than this, a load leaves none for other loads from its
/// file system. Of eight permits, a file system gets six, so leaving one free would cost a sixth
/// of the speed. Of sixteen permits, it gets twelve, so leaving one free costs only a twelfth.
const MANY: u64 = 16;

/// How much a load and its file system already hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Held by the load itself.
    pub(crate) by_load: u64,
    /// Held by all loads of its file system.
    pub(crate) by_file_system: u64,
}

/// Whether a load that holds `held` may take one more of `all` units, of which all loads together
/// already hold `taken`.
pub(crate) fn may_have_one(all: u64, taken: u64, held: Held) -> bool {
    may_have(all, taken, held, 1, 1)
}

/// Returns whether a load that holds `held` may take `more` of a resource. `all` is the total
/// amount of the resource, and `taken` is the amount that all loads hold together. `usual` is the
/// amount that must stay free for others, unless the window is exempt.
fn may_have(all: u64, taken: u64, held: Held, more: u64, usual: u64) -> bool {
    let file_system_may_have = |taken, held| within_share(all, taken, held, more, usual);
    let leaves_one = || file_system_may_have(taken.saturating_add(more), held.by_file_system.saturating_add(more));
    let keeps_none = held.by_load == 0 || all / MANY < more;
    file_system_may_have(taken, held.by_file_system) && (keeps_none || leaves_one())
}

/// First-level admission check: returns whether a file system whose loads together hold `held` may
/// take `more`. `all`, `taken` and `usual` have the same meaning as in [`may_have`].
fn within_share(all: u64, taken: u64, held: u64, more: u64, usual: u64) -> bool {
    let Some(rest) = taken.checked_add(more).and_then(|sum| all.checked_sub(sum)) else { return false };
    held == 0 || all / FEW < more || usual <= rest && held.saturating_add(more) <= rest.saturating_mul(HELD_TO_FREE_MAX)
}

/// How much of a shared resource each load holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holders<L> {
    taken: u64,
    /// Triples of a load, a file system, and how much the load holds for files on that file
    /// system.
    held: Vec<(L, u64, u64)>,
}

impl<L: Clone + PartialEq> Holders<L> {
    pub(crate) fn new() -> Self {
        Holders { taken: 0, held: Vec::new() }
    }

    /// How much is held in total.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// How much this load holds in total, and how much all loads hold for files on this file
    /// system.
    pub(crate) fn held_by(&self, load: &L, file_system: u64) -> Held {
        let mut held = Held::default();
        for (other, from, amount) in &self.held {
            held.by_load += if other == load { *amount } else { 0 };
            held.by_file_system += if *from == file_system { *amount } else { 0 };
        }
        held
    }

    /// Returns whether this load may take another unit for a file on this file system. `all` is
    /// the number of units that exist.
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

    /// Returns part of what this load holds for files on this file system.
    ///
    /// # Panics
    /// If more is returned than was taken, because the bookkeeping is then broken.
    pub(crate) fn give_back(&mut self, load: &L, file_system: u64, amount: u64) {
        let own = |(other, from, _): &(L, u64, u64)| other == load && *from == file_system;
        let held = self.held.iter().find(|entry| own(entry)).map_or(0, |&(.., held)| held);
        assert!(amount <= held, "{amount} are returned, but only {held} are held");
        self.taken -= amount;
        self.held.retain_mut(|entry| {
            entry.2 -= if own(entry) { amount } else { 0 };
            entry.2 > 0
        });
    }
}

impl<L: Clone + PartialEq> Window<L> {
    /// Creates a window of `bytes` bytes. Most permits are for at most `usual` bytes.
    pub(crate) fn new(bytes: u64, usual: u64) -> Self {
        Window { bytes, held: Holders::new(), usual: usual.min(bytes / FEW), by_file_system: true }
    }

    /// Creates a window whose shares are per load rather than per file system.
    pub(crate) fn per_load(bytes: u64, usual: u64) -> Self {
        Window { by_file_system: false, ..Window::new(bytes, usual) }
    }

    #[cfg(test)]
    pub(crate) fn held_by(&self, load: &L) -> u64 {
        self.held.held_by(load, 0).by_load
    }

    /// Takes a permit for `bytes` bytes of a file on this file system. Either all of the bytes are
    /// granted, or none.
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
                Held { by_load: 0, .. } => Permitted::FileSystemAtShare,
                Held { .. } => Permitted::LoadAtShare,
            };
        }
        self.held.take(load, file_system, bytes);
        Permitted::Yes
    }

    /// Returns a permit.
    ///
    /// # Panics
    /// If more is returned than was taken. The bookkeeping is then broken, and continuing could
    /// allocate without bound.
    pub(crate) fn give_back(&mut self, load: &L, file_system: u64, bytes: u64) {
        self.held.give_back(load, file_system, bytes);
    }

    pub(crate) fn taken_bytes(&self) -> u64 {
        self.held.taken()
    }

    /// Iterates over the loads that hold permits: one item for each load and each file system that
    /// the load holds permits for.
    pub(crate) fn holders(&self) -> impl Iterator<Item = (&L, u64)> {
        self.held.held.iter().map(|(load, file_system, _)| (load, *file_system))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lets the loads take permits in turn until none can take another, and returns how many each
    /// has. `file_systems[n]` is the file system of `loads[n]`.
    fn take_in_turn<const N: usize>(window: &mut Window<usize>, loads: [usize; N], file_systems: [u64; N]) -> [u64; N] {
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
    fn window_never_exceeds_its_size() {
        let mut window = Window::new(10, 1);
        assert_eq!(window.take(&1, 1, 10), Permitted::Yes);
        assert_eq!(window.take(&2, 2, 1), Permitted::Full);
        window.give_back(&1, 1, 4);
        assert_eq!(window.take(&2, 2, 5), Permitted::Full);
        assert_eq!(window.take(&2, 2, 4), Permitted::Yes);
        assert_eq!(window.taken_bytes(), 10);
    }

    #[test]
    fn window_leaves_something_for_later_loads() {
        for (size, alone, [first, second]) in [(8, 6, [3, 3]), (32, 23, [13, 13]), (128, 95, [54, 54])] {
            let mut window = Window::new(size, 1);
            assert_eq!(take_in_turn(&mut window, [1], [1]), [alone], "window of {size}");
            assert_eq!(window.take(&1, 1, 1), Permitted::LoadAtShare);
            // The first load never returns its permits. Others can still take some, one after
            // another, and return them.
            assert_eq!(window.take(&2, 2, 1), Permitted::Yes);
            window.give_back(&2, 2, 1);
            let mut window = Window::new(size, 1);
            assert_eq!(take_in_turn(&mut window, [1, 2], [1, 2]), [first, second], "window of {size}");
        }
    }

    #[test]
    fn loads_from_one_file_system_count_as_one() {
        for (size, [first, second, third], other) in [(8, [3, 3, 0], 1), (32, [12, 11, 1], 5), (128, [48, 47, 1], 23)] {
            let mut window = Window::new(size, 1);
            assert_eq!(take_in_turn(&mut window, [1, 2], [7, 7]), [first, second], "window of {size}");
            // If many permits fit, one is left for one new load, but not for a second.
            assert_eq!(take_in_turn(&mut window, [3], [7]), [third], "window of {size}");
            assert_eq!(window.take(&4, 7, 1), Permitted::FileSystemAtShare);
            assert_eq!(window.taken_bytes(), size * 3 / 4);
            // A load from another file system gets three quarters of the rest and, if many permits
            // fit, leaves one of them.
            assert_eq!(take_in_turn(&mut window, [5], [8]), [other], "window of {size}");
            window.give_back(&1, 7, 1);
            assert_ne!(window.take(&5, 8, 1), Permitted::Full);
        }
    }

    #[test]
    fn window_for_few_permits_reserves_none() {
        for size in 1..4 {
            assert_eq!(take_in_turn(&mut Window::new(size, 1), [1], [1]), [size]);
        }
        assert_eq!(take_in_turn(&mut Window::new(4, 1), [1], [1]), [3]);
    }

    #[test]
    fn remaining_window_has_room_for_a_usual_permit() {
        let mut window = Window::new(16, 4);
        assert_eq!(window.take(&1, 1, 8), Permitted::Yes);
        assert_eq!([1; 3].map(|bytes| window.take(&2, 2, bytes)), [Permitted::Yes; 3]);
        assert_eq!(
            window.take(&2, 2, 1),
            Permitted::LoadAtShare,
            "one permit should be left for the next load from its file system"
        );
        assert_eq!(window.take(&3, 2, 1), Permitted::Yes);
        assert_eq!(window.take(&4, 2, 1), Permitted::FileSystemAtShare);
        assert_eq!(window.take(&3, 3, 4), Permitted::Yes);
    }

    #[test]
    #[should_panic(expected = "are returned")]
    fn returning_a_permit_that_was_never_taken_panics() {
        let mut window = Window::new(10, 1);
        assert_eq!(window.take(&1, 1, 5), Permitted::Yes);
        window.give_back(&1, 2, 1);
    }

    /// The default window, in MiB: eight batches of 16 MiB.
    #[test]
    fn one_load_gets_six_batches_and_two_silent_ones_leave_one() {
        let mut window = Window::new(8 << 4, 1 << 4);
        let mut take = |load, file_system| window.take(&load, file_system, 1 << 4);
        assert_eq!([(); 6].map(|()| take(1, 1)), [Permitted::Yes; 6]);
        assert_eq!(take(1, 1), Permitted::LoadAtShare);
        for load in 2..20 {
            assert_eq!(take(load, 1), Permitted::FileSystemAtShare);
        }
        assert_eq!(take(20, 2), Permitted::Yes);
        for load in 21..40 {
            assert_eq!(take(load, 2), Permitted::FileSystemAtShare);
        }
        assert_eq!(take(40, 3), Permitted::Yes);
        assert_eq!(take(41, 4), Permitted::Full);
    }

    proptest! {
        #[test]
        fn permits_never_exceed_the_window(
            size in 0u64..1000,
            file_systems in 1u8..4,
            steps in proptest::collection::vec((any::<bool>(), 0u8..6, 1u64..1200), 0..200),
        ) {
            let mut window = Window::new(size, 1);
            let mut out: Vec<(u8, u64)> = Vec::new();
            for (take, load, bytes) in steps {
                let file_system_of = |load: u8| u64::from(load % file_systems);
                if take {
                    let sum = |counts: &dyn Fn(u8) -> bool| -> u64 {
                        out.iter().filter(|&&(other, _)| counts(other)).map(|&(_, bytes)| bytes).sum()
                    };
                    let room = size - sum(&|_| true);
                    let own = sum(&|other| other == load);
                    let by_file_system = sum(&|other| file_system_of(other) == file_system_of(load));
                    let permitted = window.take(&load, file_system_of(load), bytes);
                    let expected_refusal = match (own, by_file_system) {
                        (0, 0) => Permitted::Full,
                        (0, _) => Permitted::FileSystemAtShare,
                        _ => Permitted::LoadAtShare,
                    };
                    prop_assert!(permitted == Permitted::Yes || permitted == expected_refusal);
                    let yes = permitted == Permitted::Yes;
                    prop_assert!(!yes || bytes <= room);
                    prop_assert!(by_file_system > 0 || yes == (bytes <= room), "a file system that holds nothing should get what fits");
                    if yes && by_file_system > 0 && bytes <= size / FEW {
                        prop_assert!(by_file_system + bytes <= HELD_TO_FREE_MAX * (room - bytes), "no file system should exceed its share");
                        prop_assert!(room > bytes, "something should be left for other file systems");
                    }
                    if yes {
                        out.push((load, bytes));
                    }
                } else if let Some((load, bytes)) = out.pop() {
                    window.give_back(&load, file_system_of(load), bytes);
                }
                prop_assert_eq!(window.taken_bytes(), out.iter().map(|&(_, bytes)| bytes).sum::<u64>());
            }
        }

        /// Any number of loads take permits, in any order, and never return them.
        #[test]
        fn two_silent_file_systems_leave_something_for_a_third(
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

        /// A load that runs alone loses at most one permit to the rule that it must leave one free
        /// for other loads from its file system.
        #[test]
        fn one_load_gets_its_file_systems_share_minus_at_most_one(size in 1u64..2000) {
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
