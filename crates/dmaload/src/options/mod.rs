//! What a caller can request: the choices of a load and their names ([`choices`]), all options of
//! a load ([`load`]), and observers of its bytes ([`observer`]).
//!
//! Plain values with their defaults. Nothing here knows how a load works: the engine checks
//! whether the options are valid together before the load starts. Observers and verifiers are the
//! caller's code, so the options that hold them catch panics from dropping them. Makes no system
//! calls, and needs no shutdown.

pub(crate) mod choices;
pub(crate) mod load;
pub(crate) mod observer;
