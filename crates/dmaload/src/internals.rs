//! What the small benches count the instructions of. No part of the interface: behind the feature `internals`, and it may change
//! or go at any time.

use crate::memory::window::{Permitted, Window};
use crate::options::choices::Layout;
use crate::plan::{Plan, Shape, Span};
use crate::ring::Slots;

/// Plans files of these lengths with the default sizes; how many pieces that makes.
pub fn plan(lengths: &[u64]) -> usize {
    let (segment_bytes, batch_bytes) = (64 << 20, 16 << 20);
    let shape = Shape { layout: Layout::Segmented, segment_bytes, batch_bytes, packed: true, batch_files: 64 };
    let spans: Vec<_> = lengths.iter().enumerate().map(|(file, &bytes)| Span::whole(file, bytes)).collect();
    Plan::new(&vec![4096; lengths.len()], &spans, shape).pieces.len()
}

/// Takes so many permits and gives each back, eight of them out at a time; how many were given.
pub fn window(permits: u64) -> u64 {
    const PERMIT_BYTES: u64 = 16 << 20;
    let mut window = Window::new(12 * PERMIT_BYTES, PERMIT_BYTES);
    let mut given = 0;
    for number in 0..permits {
        if number >= 8 {
            window.give_back(&0, PERMIT_BYTES);
        }
        given += u64::from(window.take(&0, PERMIT_BYTES) == Permitted::Yes);
    }
    given
}

/// Puts so many entries into slots, 32 of them in flight at a time, finds each once and removes it; how many were found.
pub fn slots(entries: usize) -> usize {
    let mut slots = Slots::new();
    let mut in_flight = std::collections::VecDeque::new();
    let mut found = 0;
    for entry in 0..entries {
        if in_flight.len() == 32
            && let Some((token, entry)) = in_flight.pop_front()
        {
            found += usize::from(slots.get_mut(token) == Some(&mut { entry }) && slots.remove(token) == Some(entry));
        }
        in_flight.push_back((slots.insert(entry), entry));
    }
    found + in_flight.into_iter().filter(|&(token, entry)| slots.remove(token) == Some(entry)).count()
}

#[cfg(test)]
mod tests {
    #[test]
    fn they_do_what_is_counted() {
        assert_eq!(super::plan(&[1, 20 << 20, 65 << 20]), 1 + 2 + 5);
        assert_eq!(super::window(1000), 1000);
        assert_eq!(super::slots(1000), 1000);
    }
}
