//! The window: how many bytes may be allocated and not yet filled; and what part of that one load may have.
//!
//! It is what keeps the allocator and the reader in step: a permit is taken before memory is allocated, and comes
//! back when that memory is full (or given up).
//!
//! A load whose reads do not come back must not come to hold all of it. So what a load may hold depends on what is free: three
//! times what it leaves free, at most (dynamic queue length thresholds: Choudhury and Hahne, 1998), and a usual permit must still
//! fit into that. Alone it has three quarters, two have three sevenths each, and something is left for one that comes. Who holds
//! nothing may take whatever fits. Reads in flight, staging, registered buffers and threads are shared by the same rule.

/// A budget that loads share. Pure bookkeeping: who waits, and where, is the scheduler's business. `L` names a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window<L> {
    bytes: u64,
    taken_bytes: u64,
    /// What each load holds that holds something.
    held: Vec<(L, u64)>,
    /// So much must be left for others.
    usual: u64,
}

/// What became of an attempt to take a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permitted {
    Yes,
    /// The load has its part: nobody has to wait for it.
    HasItsPart,
    /// The load holds nothing, and there is no room: nobody may overtake it, or it would wait for ever.
    Full,
}

/// So many times what it leaves free is what a load may hold.
const TIMES_THE_REST: u64 = 3;

/// Where fewer than so many have room, nothing is kept for others: one of two would be half of the speed.
const FEW: u64 = 4;

/// Whether one that holds `held` of `all` things, of which `taken` are taken, may have one more.
pub(crate) fn may_have_one(all: u64, taken: u64, held: u64) -> bool {
    may_have(all, taken, held, 1, 1)
}

/// Whether one that holds `held` of `all`, of which `taken` is taken, may have `more`, while others may want `usual`.
fn may_have(all: u64, taken: u64, held: u64, more: u64, usual: u64) -> bool {
    let Some(rest) = taken.checked_add(more).and_then(|sum| all.checked_sub(sum)) else { return false };
    held == 0 || all / FEW < more || usual <= rest && held.saturating_add(more) <= rest.saturating_mul(TIMES_THE_REST)
}

impl<L: Clone + PartialEq> Window<L> {
    /// One of so many, of which permits are for `usual` or less, or else are few.
    pub(crate) fn new(bytes: u64, usual: u64) -> Self {
        Window { bytes, taken_bytes: 0, held: Vec::new(), usual: usual.min(bytes / FEW) }
    }

    /// What this load holds.
    pub(crate) fn held_by(&self, load: &L) -> u64 {
        self.held.iter().find(|(other, _)| other == load).map_or(0, |&(_, bytes)| bytes)
    }

    /// Takes a permit for `bytes`, all of it or nothing.
    #[must_use]
    pub(crate) fn take(&mut self, load: &L, bytes: u64) -> Permitted {
        let held = self.held_by(load);
        if bytes == 0 {
            return Permitted::Yes;
        }
        if !may_have(self.bytes, self.taken_bytes, held, bytes, self.usual) {
            return if held == 0 { Permitted::Full } else { Permitted::HasItsPart };
        }
        self.taken_bytes += bytes;
        match self.held.iter_mut().find(|(other, _)| other == load) {
            Some((_, held)) => *held += bytes,
            None => self.held.push((load.clone(), bytes)),
        }
        Permitted::Yes
    }

    /// Gives a permit back.
    ///
    /// # Panics
    /// When more comes back than was taken: the bookkeeping is broken, and going on would allocate without bound.
    pub(crate) fn give_back(&mut self, load: &L, bytes: u64) {
        let held = self.held_by(load);
        assert!(bytes <= held, "{bytes} bytes come back to a window that has given out {held}");
        self.taken_bytes -= bytes;
        self.held.retain_mut(|(other, held)| {
            *held -= if other == load { bytes } else { 0 };
            *held > 0
        });
    }

    pub(crate) fn taken_bytes(&self) -> u64 {
        self.taken_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How often each of these loads gets one, in turns, until nobody gets any.
    fn parts<const N: usize>(window: &mut Window<usize>, loads: [usize; N]) -> [u64; N] {
        let mut got = [0; N];
        loop {
            let before = got;
            for (at, load) in loads.iter().enumerate() {
                got[at] += u64::from(window.take(load, 1) == Permitted::Yes);
            }
            if got == before {
                return got;
            }
        }
    }

    #[test]
    fn a_window_gives_out_no_more_than_its_size() {
        let mut window = Window::new(10, 1);
        assert_eq!(window.take(&1, 10), Permitted::Yes);
        assert_eq!(window.take(&2, 1), Permitted::Full);
        window.give_back(&1, 4);
        assert_eq!(window.take(&2, 5), Permitted::Full);
        assert_eq!(window.take(&2, 4), Permitted::Yes);
        assert_eq!(window.taken_bytes(), 10);
    }

    #[test]
    fn something_is_left_for_those_to_come() {
        for (size, alone, [first, second]) in [(8, 6, [3, 3]), (32, 24, [14, 13]), (128, 96, [55, 54])] {
            let mut window = Window::new(size, 1);
            assert_eq!(parts(&mut window, [1]), [alone], "of {size}");
            assert_eq!(window.take(&1, 1), Permitted::HasItsPart);
            // The first holds what it has for ever: one after the other the others get something, and can give it back.
            assert_eq!(window.take(&2, 1), Permitted::Yes);
            window.give_back(&2, 1);
            let mut window = Window::new(size, 1);
            assert_eq!(parts(&mut window, [1, 2]), [first, second], "of {size}");
        }
    }

    #[test]
    fn a_window_with_room_for_few_is_all_for_one() {
        for size in 1..4 {
            assert_eq!(parts(&mut Window::new(size, 1), [1]), [size]);
        }
        assert_eq!(parts(&mut Window::new(4, 1), [1]), [3]);
    }

    #[test]
    fn what_is_left_has_room_for_a_usual_permit() {
        let mut window = Window::new(16, 4);
        assert_eq!(window.take(&1, 8), Permitted::Yes);
        assert_eq!([1; 4].map(|bytes| window.take(&2, bytes)), [Permitted::Yes; 4]);
        assert_eq!(window.take(&2, 1), Permitted::HasItsPart);
        assert_eq!(window.take(&3, 4), Permitted::Yes);
    }

    #[test]
    #[should_panic(expected = "come back")]
    fn a_permit_that_was_never_taken_cannot_come_back() {
        let mut window = Window::new(10, 1);
        assert_eq!(window.take(&1, 5), Permitted::Yes);
        window.give_back(&2, 1);
    }

    proptest! {
        #[test]
        fn never_more_is_out_than_the_window_holds(size in 0u64..1000, steps in proptest::collection::vec((any::<bool>(), 0u8..3, 1u64..1200), 0..200)) {
            let mut window = Window::new(size, 1);
            let mut out = Vec::new();
            for (take, load, bytes) in steps {
                if take {
                    let room = size - out.iter().map(|&(_, bytes)| bytes).sum::<u64>();
                    let holds = out.iter().any(|&(other, _)| other == load);
                    let permitted = window.take(&load, bytes);
                    prop_assert!(permitted != Permitted::Yes || bytes <= room);
                    prop_assert!(holds || (permitted == Permitted::Yes) == (bytes <= room), "who holds nothing gets what fits");
                    prop_assert!(holds || permitted != Permitted::HasItsPart);
                    if permitted == Permitted::Yes {
                        out.push((load, bytes));
                    }
                } else if let Some((load, bytes)) = out.pop() {
                    window.give_back(&load, bytes);
                }
                prop_assert_eq!(window.taken_bytes(), out.iter().map(|&(_, bytes)| bytes).sum::<u64>());
            }
        }
    }
}
