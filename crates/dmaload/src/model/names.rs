//! Looks up tensors and keys by name.

/// The positions of a list's items, sorted by the items' names.
///
/// Unlike a hash map, this needs no second copy of the names, gives a hostile header no hash
/// collisions to exploit, and places duplicates next to each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct NameIndex(Vec<u32>);

impl NameIndex {
    /// Indexes `count` names. If two names are equal, the error is the position of one of them.
    pub(super) fn new<'a>(count: usize, name: impl Fn(usize) -> &'a str) -> Result<Self, usize> {
        let mut order: Vec<u32> = (0..).take(count).collect();
        order.sort_unstable_by_key(|&i| name(i as usize));
        match order.windows(2).find(|pair| name(pair[0] as usize) == name(pair[1] as usize)) {
            Some(pair) => Err(pair[0] as usize),
            None => Ok(Self(order)),
        }
    }

    pub(super) fn find<'a>(&self, wanted: &str, name: impl Fn(usize) -> &'a str) -> Option<usize> {
        let found = self.0.binary_search_by(|&i| name(i as usize).cmp(wanted)).ok()?;
        Some(self.0[found] as usize)
    }
}
