//! What a caller may ask for: the choices of a load and their names ([`choices`]), all of them together
//! ([`load`]), and who looks at its bytes ([`observer`]).
//!
//! Plain values with their defaults. Nothing here knows how a load is done: whether options make
//! sense together is checked by the engine, before it starts anything. Observers and verifiers are
//! the caller's code, so what holds one catches the panics of its drop. No system calls; nothing
//! to end.

pub(crate) mod choices;
pub(crate) mod load;
pub(crate) mod observer;
