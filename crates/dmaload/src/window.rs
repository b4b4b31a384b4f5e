//! The window: how many bytes may be allocated and not yet filled.
//!
//! It is what keeps the allocator and the reader in step: a permit is taken before memory is allocated, and comes
//! back when that memory is full (or given up).

/// A budget of bytes. Pure bookkeeping: who waits, and where, is the scheduler's business.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    bytes: u64,
    taken_bytes: u64,
}

impl Window {
    pub(crate) fn new(bytes: u64) -> Self {
        Window { bytes, taken_bytes: 0 }
    }

    /// Takes a permit for `bytes`, if there is room for all of it.
    #[must_use]
    pub(crate) fn take(&mut self, bytes: u64) -> bool {
        let fits = self.taken_bytes.checked_add(bytes).is_some_and(|sum| sum <= self.bytes);
        if fits {
            self.taken_bytes += bytes;
        }
        fits
    }

    /// Gives a permit back.
    ///
    /// # Panics
    /// When more comes back than was taken: the bookkeeping is broken, and going on would allocate without bound.
    pub(crate) fn give_back(&mut self, bytes: u64) {
        assert!(bytes <= self.taken_bytes, "{bytes} bytes come back to a window that has given out {}", self.taken_bytes);
        self.taken_bytes -= bytes;
    }

    #[cfg(test)]
    pub(crate) fn taken_bytes(&self) -> u64 {
        self.taken_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_window_gives_out_exactly_its_size() {
        let mut window = Window::new(10);
        assert!(window.take(10));
        assert!(!window.take(1));
        window.give_back(4);
        assert!(!window.take(5));
        assert!(window.take(4));
    }

    #[test]
    #[should_panic(expected = "come back")]
    fn a_permit_that_was_never_taken_cannot_come_back() {
        Window::new(10).give_back(1);
    }

    proptest! {
        #[test]
        fn never_more_is_out_than_the_window_holds(size in 0u64..1000, steps in proptest::collection::vec((any::<bool>(), 0u64..1200), 0..200)) {
            let mut window = Window::new(size);
            let mut out = Vec::new();
            for (take, bytes) in steps {
                if take {
                    let room = size - out.iter().sum::<u64>();
                    prop_assert_eq!(window.take(bytes), bytes <= room);
                    if bytes <= room {
                        out.push(bytes);
                    }
                } else if let Some(bytes) = out.pop() {
                    window.give_back(bytes);
                }
                prop_assert_eq!(window.taken_bytes(), out.iter().sum::<u64>());
            }
        }
    }
}
