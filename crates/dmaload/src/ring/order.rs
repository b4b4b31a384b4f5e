//! Collects items that become ready in any order, and releases them one at a time, by position.

use std::collections::BTreeMap;

/// Items that each cover a range. Together, the ranges are contiguous and start at 0.
#[derive(Debug)]
pub(super) struct InOrder<T> {
    /// Where the next item starts.
    next: u64,
    /// Whether an item was taken and is not finished yet.
    busy: bool,
    waiting: BTreeMap<u64, (u64, T)>,
}

impl<T> InOrder<T> {
    pub(super) fn new() -> Self {
        InOrder { next: 0, busy: false, waiting: BTreeMap::new() }
    }

    /// Adds a ready item, which covers the `bytes` bytes at `start`.
    pub(super) fn insert(&mut self, start: u64, bytes: u64, thing: T) {
        let before = self.waiting.insert(start, (start + bytes, thing));
        assert!(before.is_none() && start >= self.next, "position {start} is ready twice");
    }

    /// Takes the next item if it is ready and the previous one is finished.
    pub(super) fn take(&mut self) -> Option<T> {
        if self.busy {
            return None;
        }
        let first = self.waiting.first_entry().filter(|first| *first.key() == self.next)?;
        let (end, thing) = first.remove();
        (self.next, self.busy) = (end, true);
        Some(thing)
    }

    /// Records that the taken item is finished.
    pub(super) fn finish(&mut self) {
        assert!(self.busy, "an item must be taken before it is finished");
        self.busy = false;
    }

    /// Removes all remaining items.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> + use<T> {
        std::mem::take(&mut self.waiting).into_values().map(|(_, thing)| thing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_released_one_at_a_time_in_order() {
        let mut order = InOrder::new();
        order.insert(5, 2, "c");
        assert_eq!(order.take(), None);
        order.insert(0, 3, "a");
        assert_eq!(order.take(), Some("a"));
        order.insert(3, 2, "b");
        assert_eq!(order.take(), None, "`b` must wait until `a` is finished");
        order.finish();
        assert_eq!(order.take(), Some("b"));
        order.finish();
        assert_eq!(order.take(), Some("c"));
        order.insert(7, 1, "d");
        assert_eq!(order.drain().collect::<Vec<_>>(), ["d"]);
    }

    #[test]
    #[should_panic(expected = "ready twice")]
    fn position_that_is_ready_twice_panics() {
        let mut order = InOrder::new();
        order.insert(0, 3, ());
        order.take();
        order.insert(0, 3, ());
    }
}
