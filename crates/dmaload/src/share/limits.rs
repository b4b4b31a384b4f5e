//! Limits on connections, and on descriptors in flight to clients.

use super::protocol::DESCRIPTORS_IN_A_MESSAGE;

/// Maximum number of simultaneous connections from users who may attach. If the process's limit on
/// open files is low, fewer are allowed.
const CONNECTIONS_LIMIT: usize = 256;

/// Maximum number of simultaneous connections from users who may not attach and only receive a
/// refusal. If the process's limit on open files is low, fewer are allowed.
const STRANGERS_LIMIT: usize = 16;

/// Maximum number of clients of one user that may have descriptors in flight at the same time. If
/// the process's limit on open files is low, fewer are allowed. The maximum is more than one, so
/// a slow client does not block the user's other clients.
const RECEIVERS_LIMIT: usize = 4;

/// The limits of one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClientLimits {
    /// Connections of users who may attach.
    pub(super) connections: usize,
    /// Connections of users who may not attach.
    pub(super) strangers: usize,
    /// Clients of one user with descriptors in flight.
    pub(super) receivers: usize,
    /// Descriptors in flight to clients of one user.
    pub(super) descriptors: usize,
}

impl ClientLimits {
    /// Computes the limits for a process that may open `descriptors` descriptors, when `users`
    /// users may attach. The kernel lets the server's user have the same number of descriptors in
    /// flight. Half of that number is left for the user's other processes.
    pub(super) fn new(descriptors: usize, users: usize) -> Self {
        ClientLimits {
            connections: CONNECTIONS_LIMIT.min(descriptors / 2).max(1),
            strangers: STRANGERS_LIMIT.min(descriptors / 8).max(1),
            receivers: RECEIVERS_LIMIT.min(descriptors / 8 / users).max(1),
            descriptors: (RECEIVERS_LIMIT * DESCRIPTORS_IN_A_MESSAGE).min(descriptors / 2 / users).max(1),
        }
    }
}
