//! The side that has images: one thread, which never waits for a client.

use std::collections::HashMap;
use std::fmt;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dmabuf::Memfd;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, connect, listen, recv, sendmsg, socket_with, sockopt,
};

use super::description::describe;
use super::protocol::{DESCRIPTORS_IN_A_MESSAGE, DESCRIPTORS_LIMIT, Reply, Status, parse_request};
use super::{PATIENCE, REQUEST_LIMIT_BYTES};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::segment::Segment;

/// Connections at once; of more, the one that has waited longest of the user who has most is let go.
const CONNECTIONS_LIMIT: usize = 256;
/// The same of users who may not attach, who are only told so.
const STRANGERS_LIMIT: usize = 16;
/// Connections that are taken in before others are served again.
const ADMITTED_AT_ONCE: usize = 32;
/// Clients of a user that have descriptors on their way to them: they count against the server's user until they are received, also
/// when the connection is closed. A user who hoards them holds up itself alone.
const UNRECEIVED_LIMIT: usize = 4;
/// How often a client that can't be served yet is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// What a server does otherwise than by default.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Users besides the server's own that may attach, by their numbers. The socket is then open to everybody's connections, and
    /// each is asked who it is.
    pub allowed_users: Vec<u32>,
    /// Share dma-bufs, for clients with devices. **Whoever has a dma-buf can write to it.** Default: memory files, which nobody can
    /// write to any more.
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

/// Hands images out to other processes; see [the module](super). Dropping it stops handing out; what clients have, they keep.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    options: ServerOptions,
    wake: OwnedFd,
    images: Mutex<Images>,
    served: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Images {
    by_name: HashMap<String, (Image, Arc<Published>)>,
    closed: bool,
}

/// What clients are given.
#[derive(Debug)]
struct Published {
    /// The description, then the memories.
    descriptors: Vec<OwnedFd>,
}

impl Server {
    /// Listens at a path. A socket that nobody listens at any more is replaced; only the server's user may connect, unless others
    /// are allowed.
    ///
    /// # Errors
    /// [`Error::Share`] when somebody else listens there, or what the kernel answered.
    pub fn bind(socket: impl AsRef<Path>, options: ServerOptions) -> Result<Self> {
        let path = socket.as_ref().to_owned();
        let failed = |what: &str, errno: Errno| refuse(&path, format!("cannot {what}: {}", dmabuf::errno::describe(errno)));
        let listener = listener(&path, !options.allowed_users.is_empty())?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| failed("wait", errno))?;
        let shared = Arc::new(Shared {
            socket: path.clone(),
            options,
            wake,
            images: Mutex::default(),
            served: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new().name("dmaload-share".to_owned()).spawn(move || serve(&own, &listener));
        let thread = thread.map_err(|error| failed("start a thread", Errno::from_io_error(&error).unwrap_or(Errno::AGAIN)))?;
        Ok(Server { shared, thread: Some(thread) })
    }

    /// Hands this image out under a name, in the place of another one of that name. Its memory is sealed, and never recycled by a
    /// pool.
    ///
    /// # Errors
    /// [`Error::NoDescriptor`] for memory of another kind than is shared; [`Error::Viewed`] where dma-bufs are shared and views of its
    /// bytes are alive; [`Error::Share`] where descriptors run out.
    pub fn publish(&self, name: &str, image: Image) -> Result<()> {
        let published = Arc::new(self.shared.prepare(&image)?);
        let before = self.shared.images().by_name.insert(name.to_owned(), (image, published));
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
        let _ = rustix::io::write(&self.shared.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // It never waits for anybody.
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.shared.socket);
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

/// A socket that listens at a path.
fn listener(path: &Path, for_others: bool) -> Result<OwnedFd> {
    let failed =
        |what: &'static str| move |errno: Errno| refuse(path, format!("cannot {what}: {}", dmabuf::errno::describe(errno)));
    let address = SocketAddrUnix::new(path).map_err(failed("have a socket of this name"))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(failed("make a socket"));
    let listener = socket()?;
    match bind(&listener, &address) {
        Err(Errno::ADDRINUSE) => {
            // Somebody's, or what is left of somebody. A file that is no socket refuses connections, too.
            let is_socket = std::fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket());
            if !is_socket || connect(&socket()?, &address) != Err(Errno::CONNREFUSED) {
                return Err(refuse(path, "another process listens there, or it is no socket"));
            }
            std::fs::remove_file(path).map_err(|error| {
                failed("remove a socket that nobody listens at")(Errno::from_io_error(&error).unwrap_or(Errno::IO))
            })?;
            bind(&listener, &address).map_err(failed("bind"))?;
        }
        bound => bound.map_err(failed("bind"))?,
    }
    let mode = if for_others { 0o666 } else { 0o600 };
    let allowed = std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    allowed.map_err(|error| failed("set its permissions")(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    listen(&listener, 128).map_err(failed("listen"))?;
    Ok(listener)
}

impl Shared {
    fn images(&self) -> MutexGuard<'_, Images> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// What a request asks for.
    fn find(&self, request: &[u8]) -> Result<Arc<Published>, Status> {
        let name = parse_request(request).ok_or(Status::Malformed)?;
        let images = self.images();
        let found = match name {
            "" if images.by_name.len() == 1 => images.by_name.values().next(),
            name => images.by_name.get(name),
        };
        found.map(|(_, published)| Arc::clone(published)).ok_or(Status::NoSuchImage)
    }

    fn may(&self, user: u32) -> bool {
        user == rustix::process::geteuid().as_raw() || self.options.allowed_users.contains(&user)
    }
}

/// A connection.
struct Client {
    socket: OwnedFd,
    /// Whether it is of a user who may attach. Others are told when they have asked: to close before would throw the answer away.
    allowed: bool,
    user: u32,
    since: Instant,
    /// `None` until its request has come.
    sending: Option<Sending>,
}

struct Sending {
    published: Arc<Published>,
    next: usize,
    /// It has been sent descriptors that it has not said to have received.
    unreceived: bool,
}

/// What a step with a client has led to.
enum Step {
    Wait,
    Served,
    LetGo,
}

impl Client {
    /// Whether descriptors are on their way to it.
    fn is_unreceived(&self) -> bool {
        self.sending.as_ref().is_some_and(|sending| sending.unreceived)
    }

    /// Whether it waits for us, not we for it.
    fn is_waiting(&self) -> bool {
        self.sending.as_ref().is_some_and(|sending| !sending.unreceived)
    }

    /// `busy` is how many clients of its user have descriptors on their way.
    fn step(&mut self, shared: &Shared, busy: usize) -> Step {
        // A request; a byte for each message that was received; or its end.
        let mut message = [0; REQUEST_LIMIT_BYTES + 1];
        match (recv(&self.socket, &mut message[..], RecvFlags::DONTWAIT), &mut self.sending) {
            (Err(Errno::AGAIN | Errno::INTR), Some(sending)) if !sending.unreceived => {}
            (Err(Errno::AGAIN | Errno::INTR), _) => return Step::Wait,
            (Err(_) | Ok((0, _)), _) => return Step::LetGo,
            (Ok((bytes, _)), None) => {
                let request = message.get(..bytes).unwrap_or_default();
                let found = if self.allowed { shared.find(request) } else { Err(Status::NotAllowed) };
                match found {
                    Ok(published) => self.sending = Some(Sending { published, next: 0, unreceived: false }),
                    Err(status) => {
                        let _ = send(&self.socket, Reply { status, all: 0, here: 0 }, &[]);
                        return Step::LetGo;
                    }
                }
            }
            (Ok(_), Some(sending)) => sending.unreceived = false,
        }
        let Some(Sending { published, next, unreceived }) = &mut self.sending else { return Step::Wait };
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let rest = published.descriptors.get(*next..).unwrap_or_default();
        let part = rest.get(..DESCRIPTORS_IN_A_MESSAGE.min(rest.len())).unwrap_or_default();
        if part.is_empty() {
            return Step::Served;
        }
        if busy >= UNRECEIVED_LIMIT {
            return Step::Wait;
        }
        let reply = Reply { status: Status::Ok, all: count(published.descriptors.len()), here: count(part.len()) };
        match send(&self.socket, reply, part) {
            Ok(()) => {
                (*next, *unreceived) = (*next + part.len(), true);
                Step::Wait
            }
            // Full for now; or too many descriptors of the server's user are on their way, which takes others to receive theirs.
            Err(Errno::AGAIN | Errno::INTR | Errno::TOOMANYREFS) => Step::Wait,
            Err(_) => Step::LetGo,
        }
    }
}

fn send(socket: &OwnedFd, reply: Reply, descriptors: &[OwnedFd]) -> Result<(), Errno> {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_IN_A_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::INVAL);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&reply.to_bytes())], &mut control, flags).map(|_| ())
}

/// The thread.
fn serve(shared: &Shared, listener: &OwnedFd) {
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let mut watched = vec![PollFd::new(&shared.wake, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        watched.extend(clients.iter().map(|client| PollFd::new(&client.socket, PollFlags::IN)));
        // Whoever waits longest is let go first. Who has descriptors on the way is kept, however long: so it counts.
        let patience = clients.iter().filter(|client| !client.is_unreceived()).map(|client| client.since).min();
        let patience = patience.map(|since| PATIENCE.saturating_sub(since.elapsed()) + Duration::from_millis(1));
        let retry = clients.iter().any(Client::is_waiting).then_some(RETRY);
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
        let mut busy: HashMap<u32, usize> = HashMap::new();
        for client in clients.iter().filter(|client| client.is_unreceived()) {
            *busy.entry(client.user).or_default() += 1;
        }
        let mut number = 1;
        clients.retain_mut(|client| {
            number += 1;
            let own = busy.entry(client.user).or_default();
            let is_ready = ready.get(number).copied().unwrap_or(false);
            let before = usize::from(client.is_unreceived());
            let step = if is_ready || client.is_waiting() { client.step(shared, *own - before) } else { Step::Wait };
            *own = *own - before + usize::from(matches!(step, Step::Wait) && client.is_unreceived());
            match step {
                Step::Wait if client.is_unreceived() || client.since.elapsed() < PATIENCE => true,
                Step::Served => {
                    shared.served.fetch_add(1, Ordering::Relaxed);
                    false
                }
                Step::Wait | Step::LetGo => {
                    shared.refused.fetch_add(1, Ordering::Relaxed);
                    false
                }
            }
        });
        if ready.get(1).copied().unwrap_or(false) {
            admit(shared, listener, &mut clients);
        }
    }
}

/// Takes in connections; not all at once, so that those that are there are served in between.
fn admit(shared: &Shared, listener: &OwnedFd, clients: &mut Vec<Client>) {
    for _ in 0..ADMITTED_AT_ONCE {
        let socket = match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            Err(Errno::MFILE | Errno::NFILE) if make_room(clients, |_| true) => {
                shared.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                // It stays in the queue; without a pause the thread would spin.
                thread::sleep(Duration::from_millis(10));
                return;
            }
            Err(_) => return,
        };
        let Ok(peer) = sockopt::socket_peercred(&socket) else { continue };
        let user = peer.uid.as_raw();
        let allowed = shared.may(user);
        let strangers = clients.iter().filter(|client| !client.allowed).count();
        let full = if allowed { clients.len() - strangers >= CONNECTIONS_LIMIT } else { strangers >= STRANGERS_LIMIT };
        if full && make_room(clients, |client| client.allowed == allowed) {
            shared.refused.fetch_add(1, Ordering::Relaxed);
        }
        clients.push(Client { socket, allowed, user, since: Instant::now(), sending: None });
    }
}

/// Lets the oldest connection go of the user who has most of these; `false` where there is none.
fn make_room(clients: &mut Vec<Client>, of: impl Fn(&Client) -> bool) -> bool {
    let mut by_user: HashMap<u32, usize> = HashMap::new();
    clients.iter().filter(|client| of(client)).for_each(|client| *by_user.entry(client.user).or_default() += 1);
    let most = by_user.into_iter().max_by_key(|&(_, count)| count).map(|(user, _)| user);
    let oldest = clients.iter().position(|client| of(client) && Some(client.user) == most);
    oldest.map(|at| clients.remove(at)).is_some()
}
