//! The thread that serves the clients of a server, and never waits for one.
//!
//! What a client can hold is bounded for its user, and nothing that a client says is believed:
//!
//! - Descriptors on their way over a Unix socket count against the *server's* user until they are
//!   received, even if the connection is closed meanwhile, and the kernel stops the server when
//!   there are more than it may open. Whether they were received is the kernel's word
//!   (`SIOCOUTQ`): a client that says so too early, or closes its half of the connection, is sent
//!   nothing more, and its connection is kept until the kernel says that nothing is on the way.
//!   So they always count, against the client's user.
//! - A user has no more than [`ClientLimits::descriptors`] on their way, to no more than
//!   [`ClientLimits::receivers`] clients. Its other clients wait, for [`PATIENCE`] at most; clients of
//!   other users do not.
//! - Of connections that wait for their client, the oldest of the user who has most makes place
//!   for a new one.
//! - A transfer takes [`TRANSFER_LIMIT`] at most.
//! - Descriptors that it sends are refused, or closed where nobody waits for that
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

/// Connections that are accepted before others are served again.
const ADMITTED_AT_ONCE: usize = 32;

/// How often a client is looked at again whose progress no event tells.
const RETRY: Duration = Duration::from_millis(20);

/// A connection.
struct Client {
    socket: Connection,
    /// Whether it is of a user who may attach. Others are answered when they have asked: to close
    /// before would lose the answer.
    allowed: bool,
    user: u32,
    /// When it came, or made progress last.
    since: Instant,
    state: ClientState,
}

enum ClientState {
    /// Its request has not come.
    Silent,
    /// It has asked before the first image was published.
    Early { request: Vec<u8> },
    /// It is being given an image, since `begun`.
    Receiving { published: Arc<Published>, next: usize, unreceived: usize, begun: Instant },
    /// It is sent nothing more, but has not received so many descriptors.
    Draining { unreceived: usize },
}

/// What a step with a client has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClientStep {
    Wait,
    Served,
    LetGo,
}

/// What clients of a user hold.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    receivers: usize,
    descriptors: usize,
}

impl Client {
    /// How many descriptors are on their way to it.
    fn unreceived(&self) -> usize {
        match self.state {
            ClientState::Receiving { unreceived, .. } | ClientState::Draining { unreceived } => unreceived,
            ClientState::Silent | ClientState::Early { .. } => 0,
        }
    }

    /// Whether no event tells when it can go on: it waits for others of its user, or for an
    /// image, or only the kernel knows.
    fn is_polled_by_time(&self) -> bool {
        match self.state {
            ClientState::Receiving { unreceived, .. } => unreceived == 0,
            ClientState::Draining { .. } => true,
            ClientState::Silent | ClientState::Early { .. } => false,
        }
    }

    /// When it is let go, or sent nothing more.
    fn deadline(&self) -> Option<Instant> {
        match self.state {
            ClientState::Silent | ClientState::Early { .. } => Some(self.since + PATIENCE),
            ClientState::Receiving { begun, .. } => Some((self.since + PATIENCE).min(begun + TRANSFER_LIMIT)),
            // Only it can take them, or end.
            ClientState::Draining { .. } => None,
        }
    }

    /// Answers, and is done with it.
    fn answer(&self, message: &[u8]) -> ClientStep {
        // It may have gone.
        let _ = send_bytes(&self.socket, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        ClientStep::LetGo
    }

    fn refuse(&self, status: Status, all: u32) -> ClientStep {
        self.answer(&Reply { status, all, here: 0 }.to_bytes())
    }

    /// Nothing more is sent; it is kept while descriptors are on their way.
    fn drain(&mut self) -> ClientStep {
        let unreceived = self.unreceived();
        // An error would be of a filter of system calls: the kernel's word is missing, so it goes
        // on counting.
        if unreceived > 0 && is_unreceived(&self.socket).unwrap_or(true) {
            self.state = ClientState::Draining { unreceived };
            return ClientStep::Wait;
        }
        ClientStep::LetGo
    }

    /// Its time is up.
    fn expire(&mut self) -> ClientStep {
        match self.state {
            ClientState::Early { .. } => self.refuse(Status::NotYet, 0),
            ClientState::Receiving { unreceived: 0, .. } => self.refuse(Status::Busy, 0),
            ClientState::Silent | ClientState::Receiving { .. } | ClientState::Draining { .. } => self.drain(),
        }
    }

    /// `others` is what other clients of its user hold.
    fn step(&mut self, shared: &ServerShared, others: Held, limits: ClientLimits) -> ClientStep {
        if matches!(self.state, ClientState::Draining { .. }) {
            return self.drain();
        }
        // A request; a byte for each message that was received; or its end.
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
                return self.ask(shared, request, others, limits);
            }
            (ClientState::Early { request }, None) => {
                let request = std::mem::take(request);
                return self.ask(shared, request, others, limits);
            }
            (ClientState::Receiving { unreceived: 0, .. }, None) => {}
            (ClientState::Receiving { .. }, None) => return ClientStep::Wait,
            (ClientState::Receiving { unreceived, .. }, Some(_))
                if *unreceived > 0 && is_unreceived(&self.socket) == Ok(false) =>
            {
                (*unreceived, self.since) = (0, Instant::now());
            }
            // It has spoken before it was answered: what it says is worth nothing.
            (ClientState::Early { .. } | ClientState::Receiving { .. } | ClientState::Draining { .. }, _) => return self.drain(),
        }
        self.send_next(others, limits)
    }

    fn ask(&mut self, shared: &ServerShared, request: Vec<u8>, others: Held, limits: ClientLimits) -> ClientStep {
        match shared.find(&request) {
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

    /// Sends as many descriptors as its user may have on their way.
    fn send_next(&mut self, others: Held, limits: ClientLimits) -> ClientStep {
        let ClientState::Receiving { published, next, unreceived, .. } = &mut self.state else {
            unreachable!("descriptors are sent only to a client that receives");
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
        match send(&self.socket, reply, part) {
            Ok(()) => {
                (*next, *unreceived) = (*next + part.len(), part.len());
                self.since = Instant::now();
                ClientStep::Wait
            }
            // Full for now; or others have too many descriptors of the server's user on their way.
            Err(Errno::AGAIN | Errno::INTR | Errno::TOOMANYREFS) => ClientStep::Wait,
            Err(_) => ClientStep::LetGo,
        }
    }
}

fn send(socket: &Connection, reply: Reply, descriptors: &[OwnedFd]) -> Result<(), Errno> {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_IN_A_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::INVAL);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&reply.to_bytes())], &mut control, flags).map(|_| ())
}

/// The thread.
pub(super) fn serve(shared: &ServerShared) {
    let listener = &shared.listener.socket;
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let mut watched = vec![PollFd::new(&shared.wake, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        // A connection of which one half is closed is always ready, so those that drain are
        // looked at by time.
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
            turn_away(shared);
            return;
        }
        if polled.is_err_and(|errno| errno != Errno::INTR) {
            // No memory: a moment later there may be some.
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        let mut ready = ready.into_iter();
        let (is_woken, has_connections) = (ready.next() == Some(true), ready.next() == Some(true));
        if is_woken {
            // One read empties it; there is something to be read, or another wake-up comes.
            let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
        }
        let limits = shared.limits();
        let mut held: HashMap<u32, Held> = HashMap::new();
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
                step = client.step(shared, *own, limits);
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

/// Accepts connections; not all at once, so that those that are there are served in between.
fn admit(shared: &ServerShared, limits: ClientLimits, clients: &mut Vec<Client>) {
    for _ in 0..ADMITTED_AT_ONCE {
        let socket = match accept_with(&shared.listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            // Strangers first.
            Err(Errno::MFILE | Errno::NFILE) if make_room(clients, |client| !client.allowed) || make_room(clients, |_| true) => {
                shared.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Err(Errno::AGAIN) => return,
            Err(_) => {
                // No descriptors or memory, or a filter: it stays in the queue, and without a
                // pause the thread would spin.
                thread::sleep(Duration::from_millis(10));
                return;
            }
        };
        let socket = Connection::new(socket, shared.undertaker.clone());
        let Ok(user) = user_of(&socket) else {
            // Without a name there is no answer but the end.
            shared.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let allowed = shared.may(user);
        let strangers = clients.iter().filter(|client| !client.allowed).count();
        let full = if allowed { clients.len() - strangers >= limits.connections } else { strangers >= limits.strangers };
        if full && make_room(clients, |client| client.allowed == allowed) {
            shared.refused.fetch_add(1, Ordering::Relaxed);
        }
        clients.push(Client { socket, allowed, user, since: Instant::now(), state: ClientState::Silent });
    }
}

/// Lets go of the connections that nobody has accepted, and of those to come.
fn turn_away(shared: &ServerShared) {
    let listener = &shared.listener.socket;
    // An error would leave them to the listener's end.
    let _ = shutdown(listener, Shutdown::Both);
    while let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
        drop(Connection::new(socket, shared.undertaker.clone()));
    }
}

/// Lets the oldest of these connections go of the user who has most of them; `false` where there
/// is none. Those that descriptors are on their way to are kept, since they are what shows that
/// they are.
fn make_room(clients: &mut Vec<Client>, of: impl Fn(&Client) -> bool) -> bool {
    let of = |client: &Client| of(client) && client.unreceived() == 0;
    let mut by_user: HashMap<u32, usize> = HashMap::new();
    clients.iter().filter(|client| of(client)).for_each(|client| *by_user.entry(client.user).or_default() += 1);
    let most = by_user.into_iter().max_by_key(|&(_, count)| count).map(|(user, _)| user);
    let oldest = clients.iter().position(|client| of(client) && Some(client.user) == most);
    let Some(oldest) = oldest else { return false };
    clients.remove(oldest).refuse(Status::Busy, 0);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_users_together_have_room_for_others_left() {
        for descriptors in [16, 64, 128, 1024, 1 << 20] {
            for users in [1, 2, 3, 10, 100] {
                let limits = ClientLimits::new(descriptors, users);
                assert!(limits.connections >= 1 && limits.strangers >= 1 && limits.receivers >= 1 && limits.descriptors >= 1);
                assert!(limits.connections + limits.strangers < descriptors, "{limits:?} of {descriptors}");
                if users * 8 <= descriptors {
                    assert!(limits.descriptors * users <= descriptors / 2, "{limits:?} of {descriptors} for {users}");
                    assert!(limits.receivers * users <= descriptors / 8, "{limits:?} of {descriptors} for {users}");
                }
            }
        }
    }

    #[test]
    fn what_waits_for_a_client_has_a_deadline() {
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
            // It makes progress, but for too long.
            begun = now - TRANSFER_LIMIT;
            client.state = ClientState::Receiving { published: Arc::clone(&published), next: 0, unreceived, begun };
            assert_eq!(client.deadline(), Some(now));
        }
    }
}
