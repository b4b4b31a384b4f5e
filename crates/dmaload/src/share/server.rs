//! The side that has images: one thread, which never waits for a client.
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

use std::collections::HashMap;
use std::fmt;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dmabuf::Memfd;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, accept_with, recv, send as send_bytes, sendmsg,
};

use super::description::describe;
use super::listener::Listener;
use super::peer::{Users, user_of};
use super::protocol::{DESCRIPTORS_IN_A_MESSAGE, DESCRIPTORS_LIMIT, Reply, Status, parse_request, with_names};
use super::queue::is_unreceived;
use super::{PATIENCE, REQUEST_LIMIT_BYTES, TRANSFER_LIMIT};
use crate::error::{Error, Result};
use crate::load::image::Image;
use crate::memory::segment::Segment;

/// Connections at once of users who may attach, or fewer where the process may have few
/// descriptors.
const CONNECTIONS_LIMIT: usize = 256;
/// The same of users who may not attach, and are only answered that.
const STRANGERS_LIMIT: usize = 16;
/// Connections that are accepted before others are served again.
const ADMITTED_AT_ONCE: usize = 32;
/// Clients of a user that descriptors are on their way to. More than one, so that one that is
/// slow does not hold up the others.
const RECEIVERS_LIMIT: usize = 4;
/// How often a client is looked at again whose progress no event tells.
const RETRY: Duration = Duration::from_millis(20);

/// What a server does otherwise than by default.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Users besides the server's own that may attach, by their numbers. The socket then accepts
    /// connections of all users, and the kernel is asked who each is.
    ///
    /// In a user namespace that does not map every user, all that it does not map appear as the
    /// overflow id (usually 65534, `nobody`). A client that has it is refused even if the server
    /// appears as it, too, unless the id is in this list: that allows *every* user who is not
    /// mapped.
    pub allowed_users: Vec<u32>,
    /// Share dma-bufs, for clients with devices. **Whoever has a dma-buf can write to it.**
    /// Default: memory files, which nobody can write to any more.
    pub dma_bufs: bool,
}

impl ServerOptions {
    /// See [`Self::allowed_users`].
    #[must_use]
    pub fn allow_user(mut self, user: u32) -> Self {
        self.allowed_users.push(user);
        self
    }

    /// See [`Self::dma_bufs`].
    #[must_use]
    pub fn dma_bufs(mut self, shared: bool) -> Self {
        self.dma_bufs = shared;
        self
    }
}

/// Hands images out to other processes; see [the module](super). Dropping it stops handing out;
/// what clients have, they keep.
pub struct Server {
    shared: Arc<ServerShared>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct ServerShared {
    socket: PathBuf,
    listener: Listener,
    options: ServerOptions,
    users: Users,
    wake: OwnedFd,
    images: Mutex<Images>,
    served: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Images {
    by_name: HashMap<String, (Image, Arc<Published>)>,
    /// One was published, now or before.
    any_yet: bool,
    closed: bool,
}

/// What clients are given.
#[derive(Debug)]
struct Published {
    /// The description, then the memories.
    descriptors: Vec<OwnedFd>,
}

impl Server {
    /// Listens at a path, which can be of any length. A socket that refuses connections is
    /// replaced, anything else is not; only the server's user may connect, unless others are
    /// allowed.
    ///
    /// It is safe in a folder that another user owns: see `share/listener.rs`. While a server is
    /// made or removed, its folder also has one of the name `.NAME.dmaload`.
    ///
    /// Clients that come before the first image is published wait for it, for [`PATIENCE`] at
    /// most.
    ///
    /// # Errors
    /// [`Error::Share`] when another process listens there, or what the kernel answered.
    pub fn bind(socket: impl AsRef<Path>, options: ServerOptions) -> Result<Self> {
        let path = socket.as_ref().to_owned();
        let failed = |what: &str, errno: Errno| refuse(&path, format!("cannot {what}: {}", dmabuf::errno::describe(errno)));
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| failed("make an eventfd", errno))?;
        // Each connection is asked who it is; the mode only keeps others from asking in vain.
        let mode = Mode::from_raw_mode(if options.allowed_users.is_empty() { 0o600 } else { 0o666 });
        let listener = Listener::bind(&path, mode).map_err(|reason| refuse(&path, reason))?;
        // Asked once here, so that a filter of system calls is an error now, and not a client
        // that is never served.
        is_unreceived(&listener.socket).map_err(|errno| failed("ask what clients have received", errno))?;
        let shared = Arc::new(ServerShared {
            socket: path.clone(),
            listener,
            options,
            users: Users::of_this_process(),
            wake,
            images: Mutex::default(),
            served: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let mut server = Server { shared: Arc::clone(&shared), thread: None };
        let thread = thread::Builder::new().name("dmaload-share".to_owned()).spawn(move || serve(&shared));
        let no_thread = |error| failed("start a thread", Errno::from_io_error(&error).unwrap_or(Errno::AGAIN));
        server.thread = Some(thread.map_err(no_thread)?);
        Ok(server)
    }

    /// Whether [`Self::bind`] could have this path now, for those who load for minutes before
    /// they bind.
    ///
    /// # Errors
    /// Those of [`Self::bind`].
    pub fn check(socket: impl AsRef<Path>) -> Result<()> {
        let path = socket.as_ref();
        Listener::check(path).map_err(|reason| refuse(path, reason))
    }

    /// Hands this image out under a name, in the place of another one of that name. Its memory is
    /// sealed, and never recycled by a pool.
    ///
    /// # Errors
    /// [`Error::NoDescriptor`] for memory of another kind than is shared; [`Error::Viewed`] where
    /// dma-bufs are shared and views of its bytes are alive; [`Error::Share`] where descriptors
    /// run out.
    pub fn publish(&self, name: &str, image: Image) -> Result<()> {
        let published = Arc::new(self.shared.prepare(&image)?);
        let before = {
            let mut images = self.shared.images();
            images.any_yet = true;
            images.by_name.insert(name.to_owned(), (image, published))
        };
        // Clients may wait for it.
        self.shared.wake();
        // Outside of the lock: it may be the last owner of gigabytes.
        drop(before);
        Ok(())
    }

    /// Stops handing out the image of this name, and gives it back.
    pub fn withdraw(&self, name: &str) -> Option<Image> {
        let removed = self.shared.images().by_name.remove(name);
        removed.map(|(image, _)| image)
    }

    /// The names of the images, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.shared.images().by_name.keys().cloned().collect();
        names.sort();
        names
    }

    /// How many clients were given an image, and how many connections were refused or let go.
    pub fn served(&self) -> (u64, u64) {
        (self.shared.served.load(Ordering::Relaxed), self.shared.refused.load(Ordering::Relaxed))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.images().closed = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // It never waits for a client.
            let _ = thread.join();
        }
        // The thread is gone, so this ends the listener, which removes its socket.
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("socket", &self.shared.socket).field("names", &self.names()).finish_non_exhaustive()
    }
}

fn refuse(socket: &Path, reason: impl Into<String>) -> Error {
    Error::Share { socket: socket.to_owned(), reason: reason.into() }
}

impl ServerShared {
    fn images(&self) -> MutexGuard<'_, Images> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the thread look at what has changed.
    fn wake(&self) {
        // It fails only when the count is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Collects an image's descriptors.
    fn prepare(&self, image: &Image) -> Result<Published> {
        let no_room = |errno: Errno| refuse(&self.socket, format!("no descriptor to share: {}", dmabuf::errno::describe(errno)));
        let json = describe(image, self.options.dma_bufs);
        let description = Memfd::create("dmaload-description", json.len()).map_err(|error| no_room(error.errno))?;
        let mut rest = json.as_bytes();
        let mut at = 0;
        while !rest.is_empty() {
            let written = rustix::io::pwrite(&description, rest, at).map_err(no_room)?;
            rest = rest.get(written..).unwrap_or_default();
            at += written as u64;
        }
        description.seal_against_writes().map_err(|error| no_room(error.errno))?;
        if image.report().memories >= DESCRIPTORS_LIMIT {
            return Err(refuse(&self.socket, format!("{} segments are too many to share", image.report().memories)));
        }
        if !self.options.dma_bufs {
            // What clients look at nobody may write to by another way.
            image.segments().iter().try_for_each(Segment::keep_unwritten)?;
        }
        let own = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|error| no_room(Errno::from_io_error(&error).unwrap_or(Errno::MFILE)))
        };
        let mut descriptors = vec![own(description.as_fd())?];
        for (index, segment) in image.segments().iter().enumerate() {
            let before = index.checked_sub(1).and_then(|before| image.segments().get(before));
            if before.is_some_and(|before| segment.shares_memory_with(before)) {
                continue;
            }
            descriptors.push(if self.options.dma_bufs { segment.to_dma_buf()? } else { own(segment.memfd()?)? });
        }
        Ok(Published { descriptors })
    }

    /// What a request asks for, or the answer to it.
    fn find(&self, request: &[u8]) -> Result<Arc<Published>, (Status, Vec<u8>)> {
        let refuse = |status| (status, Reply { status, all: 0, here: 0 }.to_bytes().to_vec());
        let name = parse_request(request).ok_or_else(|| refuse(Status::Malformed))?;
        let images = self.images();
        let found = match name {
            "" if images.by_name.len() == 1 => images.by_name.values().next(),
            name => images.by_name.get(name),
        };
        if let Some((_, published)) = found {
            return Ok(Arc::clone(published));
        }
        if !images.any_yet {
            return Err(refuse(Status::NotYet));
        }
        let several = name.is_empty() && !images.by_name.is_empty();
        let status = if several { Status::Several } else { Status::NoSuchImage };
        let mut names: Vec<&str> = images.by_name.keys().map(String::as_str).collect();
        names.sort_unstable();
        Err((status, with_names(Reply { status, all: count(names.len()), here: 0 }, names)))
    }

    fn may(&self, user: u32) -> bool {
        self.users.is_own(user) || self.options.allowed_users.contains(&user)
    }

    fn limits(&self) -> ClientLimits {
        let descriptors = dmabuf::Limit::OpenFiles.current().unwrap_or(1 << 20);
        // Its own user, too.
        ClientLimits::new(usize::try_from(descriptors).unwrap_or(1 << 20), self.options.allowed_users.len() + 1)
    }
}

fn count(len: usize) -> u32 {
    u32::try_from(len).expect("an image has fewer than 65536 descriptors, and a server fewer images than memory has bytes")
}

/// What is held for clients at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ClientLimits {
    /// Connections of users who may attach.
    connections: usize,
    /// Connections of users who may not.
    strangers: usize,
    /// Clients of one user that descriptors are on their way to.
    receivers: usize,
    /// Descriptors on their way to clients of one user.
    descriptors: usize,
}

impl ClientLimits {
    /// For a process that may have so many descriptors, and so many users who may attach. The
    /// kernel allows a user the same number on their way; half of it is left for other senders.
    fn new(descriptors: usize, users: usize) -> Self {
        ClientLimits {
            connections: CONNECTIONS_LIMIT.min(descriptors / 2).max(1),
            strangers: STRANGERS_LIMIT.min(descriptors / 8).max(1),
            receivers: RECEIVERS_LIMIT.min(descriptors / 8 / users).max(1),
            descriptors: (RECEIVERS_LIMIT * DESCRIPTORS_IN_A_MESSAGE).min(descriptors / 2 / users).max(1),
        }
    }
}

/// A connection.
struct Client {
    socket: OwnedFd,
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
        let message = match recv(&self.socket, &mut message[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return self.drain(),
            Ok((bytes, _)) => message.get(..bytes),
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

fn send(socket: &OwnedFd, reply: Reply, descriptors: &[OwnedFd]) -> Result<(), Errno> {
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
fn serve(shared: &ServerShared) {
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
