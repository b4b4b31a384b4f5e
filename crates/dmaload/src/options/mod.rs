//! What a caller can request: the choices of a load and their names ([`choices`]), all options of
//! a load ([`load`]), and observers of its bytes ([`observer`]).
//!
//! Plain values with their defaults. Nothing here knows how a load works: the engine checks
//! whether the options are valid together before the load starts. Observers and verifiers are the
//! caller's code, so an option that holds one catches a panic of its `Drop`. Nothing here makes a
//! system call or has to be shut down.

pub(crate) mod choices;
pub(crate) mod load;
pub(crate) mod observer;
