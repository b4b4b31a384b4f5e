//! What a caller can request of a load: all its options ([`load`]), the types of their values
//! ([`choices`]), and observers of its bytes ([`observer`]).
//!
//! Options are plain values with defaults. This module does not depend on how a load works. Before
//! a load starts, the engine checks whether its options are valid together. Observers and
//! verifiers are the caller's code, so an option that holds one catches panics in its `Drop`.
//! Nothing here makes a system call or has to be shut down.

pub(crate) mod choices;
pub(crate) mod load;
pub(crate) mod observer;
