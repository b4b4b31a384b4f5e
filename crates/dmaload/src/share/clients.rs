//! The thread that serves a server's clients. It never waits for any of them.
//!
//! The resources that clients can hold are limited per user, and nothing that a client sends is
//! trusted:
//!
//! - Descriptors in flight over a Unix socket count against the *server's* user until they are
//!   received, even if the server closes the connection in the meantime. Above the server's limit
//!   on open files, the kernel refuses to send more. The server asks the kernel whether
//!   descriptors were received (`SIOCOUTQ`), and does not rely on the client's confirmation. If a
//!   client confirms too early, or closes its half of the connection, the server stops sending,
//!   but keeps the connection until no descriptor is in flight. Until then, the descriptors count
//!   against the client's user.
//! - A user has at most [`ClientLimits::descriptors`] in flight, to at most
//!   [`ClientLimits::receivers`] clients. The user's other clients wait, for at most [`PATIENCE`];
//!   clients of other users do not.
//! - When the limit on connections is reached, a new connection replaces the oldest one of the
//!   user with the most connections. Connections with descriptors in flight are neither
//!   counted here nor replaced. If all connections have descriptors in flight, the limit is
//!   exceeded.
//! - The server stops sending to a client when its transfer has taken [`TRANSFER_LIMIT`].
//! - Descriptors sent by clients are refused, or closed on threads that the server never waits for
//!   ([`super::connection`]).

use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, accept_with, send as send_bytes, sendmsg,
    shutdown,
};

use super::connection::Connection;
use super::limits::ClientLimits;
use super::peer::user_of;
use super::protocol::{DESCRIPTORS_IN_A_MESSAGE, Reply, Status};
use super::published::{Published, ServerShared, count};
use super::queue::is_unreceived;
use super::{PATIENCE, REQUEST_LIMIT_BYTES, TRANSFER_LIMIT};
use crate::error::Result;

/// Maximum number of connections to accept before existing clients are served again.
const ADMITTED_AT_ONCE: usize = 32;

/// How often to poll a client when no event signals that it can continue.
const RETRY: Duration = Duration::from_millis(20);

/// A client's connection.
struct Client {
    socket: Connection,
    /// Whether the client's user may attach. Clients of other users are refused only after their
    /// request has arrived: if the connection were closed earlier, sending the request would fail,
    /// and a client might give up before it reads the answer.
    allowed: bool,
    user: u32,
    /// When the client connected or last made progress.
    since: Instant,
    state: ClientState,
}

enum ClientState {
    /// The request has not arrived yet.
    Silent,
    /// The request arrived before the first image was published.
    Early { request: Vec<u8> },
    /// The client has been receiving an image since `begun`.
    Receiving { published: Arc<Published>, next: usize, unreceived: usize, begun: Instant },
    /// The server sends nothing more, but the client has not yet received this many descriptors.
    Draining { unreceived: usize },
}

/// The result of serving a client once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClientStep {
    Wait,
    Served,
    LetGo,
}

/// The number of one user's clients that have descriptors in flight, and the number of those
/// descriptors.
#[derive(Debug, Clone, Copy, Default)]
struct HeldByUser {
    receivers: usize,
    descriptors: usize,
}

impl Client {
    /// Number of descriptors in flight to the client.
    fn unreceived(&self) -> usize {
        match self.state {
            ClientState::Receiving { unreceived, .. } | ClientState::Draining { unreceived } => unreceived,
            ClientState::Silent | ClientState::Early { .. } => 0,
        }
    }

    /// Whether the client has to be polled at intervals, because no event signals that it can
    /// continue. Either the server cannot send to it yet, or it still has to receive descriptors
    /// that are in flight.
    fn is_polled_by_time(&self) -> bool {
        match self.state {
            ClientState::Receiving { unreceived, .. } => unreceived == 0,
            ClientState::Draining { .. } => true,
            ClientState::Silent | ClientState::Early { .. } => false,
        }
    }

    /// The time at which the server closes the connection or stops sending.
    fn deadline(&self) -> Option<Instant> {
        match self.state {
            ClientState::Silent | ClientState::Early { .. } => Some(self.since + PATIENCE),
            ClientState::Receiving { begun, .. } => Some((self.since + PATIENCE).min(begun + TRANSFER_LIMIT)),
            // Only the client can end this state, by receiving the descriptors or closing its
            // socket.
            ClientState::Draining { .. } => None,
        }
    }

    /// Sends a final message, after which the connection is closed.
    fn answer(&self, message: &[u8]) -> ClientStep {
        // Errors can be ignored, because the connection is closed in any case.
        let _ = send_bytes(&self.socket, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        ClientStep::LetGo
    }

    fn refuse(&self, status: Status, all: u32) -> ClientStep {
        self.answer(&Reply { status, all, here: 0 }.to_bytes())
    }

    /// Stops sending, and keeps the connection while descriptors are in flight.
    fn drain(&mut self) -> ClientStep {
        let unreceived = self.unreceived();
        // Only a system call filter can make the query fail. Without the kernel's answer, the
        // descriptors still count as in flight.
        if unreceived > 0 && is_unreceived(&self.socket).unwrap_or(true) {
            self.state = ClientState::Draining { unreceived };
            return ClientStep::Wait;
        }
        ClientStep::LetGo
    }

    /// Handles a client that has reached its deadline.
    fn expire(&mut self) -> ClientStep {
        match self.state {
            ClientState::Early { .. } => self.refuse(Status::NotYet, 0),
            ClientState::Receiving { unreceived: 0, .. } => self.refuse(Status::Busy, 0),
            ClientState::Silent | ClientState::Receiving { .. } | ClientState::Draining { .. } => self.drain(),
        }
    }

    /// Serves the client once. `others` counts what is in flight to the same user's other clients.
    fn advance(&mut self, shared: &ServerShared, others: HeldByUser, limits: ClientLimits) -> ClientStep {
        if matches!(self.state, ClientState::Draining { .. }) {
            return self.drain();
        }
        // The client sends a request, confirms a message with one byte, or closes the connection.
        let mut message = [0; REQUEST_LIMIT_BYTES + 1];
        let message = match self.socket.receive(&mut message) {
            Ok(0) => return self.drain(),
            Ok(bytes) => message.get(..bytes),
            Err(Errno::AGAIN | Errno::INTR) => None,
            Err(_) => return self.drain(),
        };
        match (&mut self.state, message) {
            (ClientState::Silent, None) => return ClientStep::Wait,
            (ClientState::Silent, Some(_)) if !self.allowed => return self.refuse(Status::NotAllowed, self.user),
            (ClientState::Silent, Some(request)) => {
                let request = request.to_vec();
                return self.handle_request(shared, request, others, limits);
            }
            (ClientState::Early { request }, None) => {
                let request = std::mem::take(request);
                return self.handle_request(shared, request, others, limits);
            }
            (ClientState::Receiving { unreceived: 0, .. }, None) => {}
            (ClientState::Receiving { .. }, None) => return ClientStep::Wait,
            (ClientState::Receiving { unreceived, .. }, Some(_))
                if *unreceived > 0 && is_unreceived(&self.socket) == Ok(false) =>
            {
                (*unreceived, self.since) = (0, Instant::now());
            }
            // The client has violated the protocol by sending a message out of turn.
            (ClientState::Early { .. } | ClientState::Receiving { .. } | ClientState::Draining { .. }, _) => return self.drain(),
        }
        self.send_next(others, limits)
    }

    fn handle_request(
        &mut self,
        shared: &ServerShared,
        request: Vec<u8>,
        others: HeldByUser,
        limits: ClientLimits,
    ) -> ClientStep {
        match shared.find_image(&request) {
            Ok(published) => {
                self.since = Instant::now();
                self.state = ClientState::Receiving { published, next: 0, unreceived: 0, begun: self.since };
                self.send_next(others, limits)
            }
            Err((Status::NotYet, _)) => {
                self.state = ClientState::Early { request };
                ClientStep::Wait
            }
            Err((_, answer)) => self.answer(&answer),
        }
    }

    /// Sends the next descriptors: as many as fit into one message, without exceeding the user's
    /// limit on descriptors in flight.
    fn send_next(&mut self, others: HeldByUser, limits: ClientLimits) -> ClientStep {
        let ClientState::Receiving { published, next, unreceived, .. } = &mut self.state else {
            unreachable!("descriptors are sent only in the state `Receiving`");
        };
        let rest = published.descriptors.get(*next..).unwrap_or_default();
        if rest.is_empty() {
            return ClientStep::Served;
        }
        let room = limits.descriptors.saturating_sub(others.descriptors);
        if others.receivers >= limits.receivers || room == 0 {
            return ClientStep::Wait;
        }
        let part = rest.get(..DESCRIPTORS_IN_A_MESSAGE.min(rest.len()).min(room)).unwrap_or_default();
        let reply = Reply { status: Status::Ok, all: count(published.descriptors.len()), here: count(part.len()) };
        match send_descriptors(&self.socket, reply, part) {
            Ok(()) => {
                (*next, *unreceived) = (*next + part.len(), part.len());
                self.since = Instant::now();
                ClientStep::Wait
            }
            // The client's receive queue is full, or the server's user has too many descriptors in
            // flight.
            Err(Errno::AGAIN | Errno::INTR | Errno::TOOMANYREFS) => ClientStep::Wait,
            Err(_) => ClientStep::LetGo,
        }
    }
}

fn send_descriptors(socket: &Connection, reply: Reply, descriptors: &[OwnedFd]) -> Result<(), Errno> {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_IN_A_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::INVAL);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&reply.to_bytes())], &mut control, flags).map(|_| ())
}

/// Serves clients until the server is dropped: the body of the serving thread.
pub(super) fn serve(shared: &ServerShared) {
    let listener = &shared.listener.socket;
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let mut watched = vec![PollFd::new(&shared.wake, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        // A half-closed connection is always ready, so draining clients are polled at intervals
        // instead.
        let polled = clients.iter().filter(|client| !matches!(client.state, ClientState::Draining { .. }));
        watched.extend(polled.map(|client| PollFd::new(&client.socket, PollFlags::IN)));
        let now = Instant::now();
        let deadline = clients.iter().filter_map(Client::deadline).min();
        let patience = deadline.map(|at| at.saturating_duration_since(now) + Duration::from_millis(1));
        let retry = clients.iter().any(Client::is_polled_by_time).then_some(RETRY);
        let timeout = patience.into_iter().chain(retry).min().map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let polled = poll(&mut watched, timeout.as_ref());
        let ready: Vec<bool> = watched.iter().map(|watched| polled.is_ok() && !watched.revents().is_empty()).collect();
        drop(watched);
        if shared.images().closed {
            close_pending(shared);
            return;
        }
        if polled.is_err_and(|errno| errno != Errno::INTR) {
            // Memory has run out, or the limit on open files was lowered. Retry after a pause.
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        let mut ready = ready.into_iter();
        let (is_woken, has_connections) = (ready.next() == Some(true), ready.next() == Some(true));
        if is_woken {
            // One read resets the counter. If the read is interrupted, the next poll returns at
            // once.
            let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
        }
        let limits = shared.limits();
        let mut held: HashMap<u32, HeldByUser> = HashMap::new();
        for client in &clients {
            let own = held.entry(client.user).or_default();
            own.receivers += usize::from(client.unreceived() > 0);
            own.descriptors += client.unreceived();
        }
        clients.retain_mut(|client| {
            let is_draining = matches!(client.state, ClientState::Draining { .. });
            let is_ready = !is_draining && ready.next() == Some(true);
            let is_early = is_woken && matches!(client.state, ClientState::Early { .. });
            let own = held.entry(client.user).or_default();
            own.receivers -= usize::from(client.unreceived() > 0);
            own.descriptors -= client.unreceived();
            let is_expired = client.deadline().is_some_and(|deadline| deadline <= Instant::now());
            let mut step = ClientStep::Wait;
            if is_ready || is_early || client.is_polled_by_time() {
                step = client.advance(shared, *own, limits);
            }
            if step == ClientStep::Wait && is_expired && client.deadline().is_some_and(|deadline| deadline <= Instant::now()) {
                step = client.expire();
            }
            if step == ClientStep::Wait {
                own.receivers += usize::from(client.unreceived() > 0);
                own.descriptors += client.unreceived();
            }
            match step {
                ClientStep::Wait => return true,
                ClientStep::Served => shared.served.fetch_add(1, Ordering::Relaxed),
                ClientStep::LetGo => shared.refused.fetch_add(1, Ordering::Relaxed),
            };
            false
        });
        if has_connections {
            admit(shared, limits, &mut clients);
        }
    }
}

/// Accepts at most [`ADMITTED_AT_ONCE`] connections, so existing clients are served in between.
fn admit(shared: &ServerShared, limits: ClientLimits, clients: &mut Vec<Client>) {
    for _ in 0..ADMITTED_AT_ONCE {
        let socket = match accept_with(&shared.listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            // Descriptors have run out. Close a connection, preferably one from a user who may not
            // attach.
            Err(Errno::MFILE | Errno::NFILE) if make_room(clients, |client| !client.allowed) || make_room(clients, |_| true) => {
                shared.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Err(Errno::AGAIN) => return,
            Err(_) => {
                // Descriptors or memory have run out, or a system call filter refuses the call.
                // The connection stays in the backlog; without a pause, this thread would spin.
                thread::sleep(Duration::from_millis(10));
                return;
            }
        };
        let socket = Connection::new(socket, shared.closer.clone());
        let Ok(user) = user_of(&socket) else {
            // The limits are per user, so a client of an unknown user is not served.
            shared.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let allowed = shared.is_allowed(user);
        let strangers = clients.iter().filter(|client| !client.allowed).count();
        let full = if allowed { clients.len() - strangers >= limits.connections } else { strangers >= limits.strangers };
        if full && make_room(clients, |client| client.allowed == allowed) {
            shared.refused.fetch_add(1, Ordering::Relaxed);
        }
        clients.push(Client { socket, allowed, user, since: Instant::now(), state: ClientState::Silent });
    }
}

/// Closes connections that have not been accepted yet, and refuses new ones.
fn close_pending(shared: &ServerShared) {
    let listener = &shared.listener.socket;
    // If this fails, a connection that arrives later is closed together with the listener.
    let _ = shutdown(listener, Shutdown::Both);
    while let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        drop(Connection::new(socket, shared.closer.clone()));
    }
}

/// Closes one of the connections that `may_close` selects, namely the oldest one of the user who
/// has the most of them. Returns `false` if there are none. Connections with descriptors in flight
/// are kept, because the server must know when the descriptors are received.
fn make_room(clients: &mut Vec<Client>, may_close: impl Fn(&Client) -> bool) -> bool {
    let may_close = |client: &Client| may_close(client) && client.unreceived() == 0;
    let mut by_user: HashMap<u32, usize> = HashMap::new();
    clients.iter().filter(|client| may_close(client)).for_each(|client| *by_user.entry(client.user).or_default() += 1);
    let most = by_user.into_iter().max_by_key(|&(_, count)| count).map(|(user, _)| user);
    let oldest = clients.iter().position(|client| may_close(client) && Some(client.user) == most);
    let Some(oldest) = oldest else { return false };
    clients.remove(oldest).refuse(Status::Busy, 0);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_leave_descriptors_for_the_rest_of_the_process() {
        for descriptors in [16, 64, 128, 1024, 1 << 20] {
            for users in [1, 2, 3, 10, 100] {
                let limits = ClientLimits::new(descriptors, users);
                assert!(limits.connections >= 1 && limits.strangers >= 1 && limits.receivers >= 1 && limits.descriptors >= 1);
                assert!(limits.connections + limits.strangers < descriptors, "{limits:?} with {descriptors} descriptors");
                if users * 8 <= descriptors {
                    assert!(
                        limits.descriptors * users <= descriptors / 2,
                        "{limits:?} with {descriptors} descriptors, {users} users"
                    );
                    assert!(
                        limits.receivers * users <= descriptors / 8,
                        "{limits:?} with {descriptors} descriptors, {users} users"
                    );
                }
            }
        }
    }

    #[test]
    fn only_draining_clients_have_no_deadline() {
        let (socket, _other) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let socket = Connection::new(socket, None);
        let now = Instant::now();
        let published = Arc::new(Published { descriptors: Vec::new() });
        let mut client = Client { socket, allowed: true, user: 0, since: now, state: ClientState::Silent };
        assert_eq!(client.deadline(), Some(now + PATIENCE));
        client.state = ClientState::Early { request: Vec::new() };
        assert_eq!(client.deadline(), Some(now + PATIENCE));
        for unreceived in [0, 3] {
            let mut begun = now;
            client.state = ClientState::Receiving { published: Arc::clone(&published), next: 0, unreceived, begun };
            assert_eq!(client.deadline(), Some(now + PATIENCE));
            // The client has just made progress, but the transfer has already taken too long.
            begun = now - TRANSFER_LIMIT;
            client.state = ClientState::Receiving { published: Arc::clone(&published), next: 0, unreceived, begun };
            assert_eq!(client.deadline(), Some(now));
        }
        client.state = ClientState::Draining { unreceived: 3 };
        assert_eq!(client.deadline(), None);
    }
}
