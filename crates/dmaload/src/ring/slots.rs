//! Slots with generations. The token of an operation's slot is passed to the kernel as
//! `user_data`.
//!
//! A token packs an index and a generation. A reused slot has a new generation, so a late or
//! duplicate completion matches no entry, instead of matching that of a later operation.

use crate::support::convert::to_usize;

/// Identifies an entry of [`Slots`] until it is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Token(u64);

impl Token {
    fn new(index: u32, generation: u32) -> Self {
        Token(u64::from(generation) << 32 | u64::from(index))
    }

    pub(crate) fn from_user_data(user_data: u64) -> Self {
        Token(user_data)
    }

    pub(crate) fn user_data(self) -> u64 {
        self.0
    }

    fn index(self) -> usize {
        to_usize(self.0 & u64::from(u32::MAX))
    }
}

/// Converts the index of an entry; [`Slots::insert`] ensures that it fits into 32 bits.
fn narrow(index: usize) -> u32 {
    u32::try_from(index).expect("an entry's index should fit into 32 bits")
}

/// A table of entries, each with a token that is valid until the entry is removed.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    entries: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    pub(crate) fn new() -> Self {
        Slots { entries: Vec::new(), free: Vec::new() }
    }

    pub(crate) fn insert(&mut self, entry: T) -> Token {
        if let Some(index) = self.free.pop()
            && let Some((generation, place)) = self.entries.get_mut(index as usize)
        {
            *place = Some(entry);
            return Token::new(index, *generation);
        }
        let index = u32::try_from(self.entries.len()).expect("fewer than four billion entries should exist at once");
        self.entries.push((0, Some(entry)));
        Token::new(index, 0)
    }

    /// Removes and returns an entry. Returns `None` if the token is stale.
    pub(crate) fn remove(&mut self, token: Token) -> Option<T> {
        self.get_mut(token)?;
        let (generation, place) = self.entries.get_mut(token.index())?;
        *generation = generation.wrapping_add(1);
        self.free.push(narrow(token.index()));
        place.take()
    }

    pub(crate) fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        let (generation, place) = self.entries.get_mut(token.index())?;
        if Token::new(narrow(token.index()), *generation) == token { place.as_mut() } else { None }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn tokens(&self) -> Vec<Token> {
        let live = self.entries.iter().enumerate().filter(|(_, (_, entry))| entry.is_some());
        live.map(|(index, (generation, _))| Token::new(narrow(index), *generation)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reused_slot_has_a_new_token() {
        let mut slots = Slots::new();
        let first = slots.insert('a');
        assert_eq!(slots.remove(first), Some('a'));
        let second = slots.insert('b');
        assert_eq!(first.index(), second.index());
        assert_ne!(first, second);
        assert_eq!(slots.remove(first), None, "a stale token must not match any entry");
        assert_eq!(slots.get_mut(second), Some(&mut 'b'));
        assert_eq!(slots.len(), 1);
    }

    #[test]
    fn token_converts_to_user_data_and_back() {
        let mut slots = Slots::new();
        for _ in 0..3 {
            let token = slots.insert(());
            slots.remove(token);
        }
        let token = slots.insert(());
        assert_eq!(Token::from_user_data(token.user_data()), token);
        assert_eq!(slots.tokens(), [token]);
    }
}
