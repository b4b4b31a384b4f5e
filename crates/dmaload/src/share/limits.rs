//! How much clients may hold.

use super::protocol::DESCRIPTORS_IN_A_MESSAGE;

/// Connections at once of users who may attach, or fewer where the process may have few
/// descriptors.
const CONNECTIONS_LIMIT: usize = 256;

/// The same of users who may not attach, and are only answered that.
const STRANGERS_LIMIT: usize = 16;

/// Clients of a user that descriptors are on their way to. More than one, so that one that is
/// slow does not hold up the others.
const RECEIVERS_LIMIT: usize = 4;

/// What is held for clients at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClientLimits {
    /// Connections of users who may attach.
    pub(super) connections: usize,
    /// Connections of users who may not.
    pub(super) strangers: usize,
    /// Clients of one user that descriptors are on their way to.
    pub(super) receivers: usize,
    /// Descriptors on their way to clients of one user.
    pub(super) descriptors: usize,
}

impl ClientLimits {
    /// For a process that may have so many descriptors, and so many users who may attach. The
    /// kernel allows a user the same number on their way; half of it is left for other senders.
    pub(super) fn new(descriptors: usize, users: usize) -> Self {
        ClientLimits {
            connections: CONNECTIONS_LIMIT.min(descriptors / 2).max(1),
            strangers: STRANGERS_LIMIT.min(descriptors / 8).max(1),
            receivers: RECEIVERS_LIMIT.min(descriptors / 8 / users).max(1),
            descriptors: (RECEIVERS_LIMIT * DESCRIPTORS_IN_A_MESSAGE).min(descriptors / 2 / users).max(1),
        }
    }
}
