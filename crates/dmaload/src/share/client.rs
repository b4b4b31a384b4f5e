//! The client side. The sizes and offsets that a server sends are checked before memory is mapped:
//! a hostile server can provide wrong bytes, but cannot cause out-of-bounds access.
#![allow(unsafe_code)]

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dmabuf::{AddressRange, DmaBuf, Memfd, Memory, printable};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType, recvmsg, send,
    socket_with, sockopt,
};
use tokio::sync::oneshot;

use super::description::{Description, SegmentPlace};
use super::listener::connect_to;
use super::peer::{Users, user_of};
use super::protocol::{DESCRIPTORS_IN_A_MESSAGE, NAMES_LIMIT_BYTES, REPLY_BYTES, Reply, Status, encode_request, parse_names};
use super::{PATIENCE, REQUEST_LIMIT_BYTES, TRANSFER_LIMIT};
use crate::engine::event::LoadFile;
use crate::error::{Error, Result};
use crate::load::image::Image;
use crate::memory::backing::Backing;
use crate::memory::reaper::Reaper;
use crate::memory::segment::{Placement, Segment};
use crate::options::choices::Layout;
use crate::route::Route;
use crate::support::errno;
use crate::telemetry::report::{FileReport, Report};

/// An image shared by another process.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Attached {
    /// The files, segments and tensors, in memory shared by both processes. The image's report
    /// describes attaching, except for the route and the page sizes, which are those of the
    /// original load.
    pub image: Image,
    /// The id of the process that shares the image, in that process's PID namespace.
    pub process: u32,
    /// Whether the image's memory consists of dma-bufs, which others can write to.
    pub dma_bufs: bool,
}

/// Options for attaching to an image.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct AttachOptions {
    /// The image's name. Not needed if the server shares only one image.
    pub name: Option<String>,
    /// Users, besides this process's own user and root, whose servers are trusted. A server can
    /// keep a writable mapping of the memory that it shares and change bytes while they are being
    /// read, so trust only users whose servers won't do that.
    ///
    /// In a user namespace that does not map every user, all unmapped users appear as the overflow
    /// id (usually 65534, `nobody`). A server with that id is not trusted, even if this process
    /// has it as well, unless the id is in this list. Listing it trusts *every* unmapped user.
    pub trusted_users: Vec<u32>,
}

impl AttachOptions {
    /// Sets [`Self::name`].
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Adds a user to [`Self::trusted_users`].
    #[must_use]
    pub fn trust_user(mut self, user: u32) -> Self {
        self.trusted_users.push(user);
        self
    }
}

/// Attaches to an image that the server at this socket shares.
///
/// A new thread receives and maps the image. Dropping the future does not stop that thread, which
/// then finishes and drops the image.
///
/// # Errors
/// [`Error::Share`] if the image can't be received or mapped.
pub async fn attach(socket: impl AsRef<Path>, options: AttachOptions) -> Result<Attached> {
    let socket = socket.as_ref().to_owned();
    let (sender, receiver) = oneshot::channel();
    let path = socket.clone();
    let body = move || {
        let _ = sender.send(attach_blocking(&path, &options));
    };
    let no_thread = |error: std::io::Error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
        refuse(&socket, format!("cannot start a thread: {}", errno::describe(errno)))
    };
    std::thread::Builder::new().name("dmaload-attach".to_owned()).spawn(body).map_err(no_thread)?;
    receiver.await.unwrap_or_else(|_| Err(refuse(&socket, "the thread that receives the image panicked")))
}

/// Blocking version of [`attach`].
///
/// # Errors
/// [`Error::Share`].
pub fn attach_blocking(socket: impl AsRef<Path>, options: &AttachOptions) -> Result<Attached> {
    let path = socket.as_ref();
    let started = Instant::now();
    let descriptors = receive(path, options, PATIENCE + TRANSFER_LIMIT)?;
    let (description, memories) = parse_descriptors(path, descriptors)?;
    build_image(path, &description, memories, started)
}

fn refuse(socket: &Path, reason: impl Into<String>) -> Error {
    Error::Share { socket: socket.to_owned(), reason: reason.into() }
}

/// Sends the request and receives all descriptors. Fails at the first message that arrives after
/// `limit`, or if a message takes longer than twice [`PATIENCE`]. A server that refuses the client
/// after waiting for [`PATIENCE`] therefore still answers in time.
fn receive(path: &Path, options: &AttachOptions, limit: Duration) -> Result<Vec<OwnedFd>> {
    let failed = |what: &'static str| move |errno: Errno| refuse(path, format!("cannot {what}: {}", errno::describe(errno)));
    let name = options.name.as_deref().unwrap_or_default();
    let request = encode_request(name);
    if let Some(excess @ 1..) = request.len().checked_sub(REQUEST_LIMIT_BYTES) {
        let (bytes, limit) = (name.len(), name.len() - excess);
        return Err(refuse(path, format!("the image's name is {bytes} bytes long, more than the limit of {limit}")));
    }
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(failed("create a socket"))?;
    for timeout in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(&socket, timeout, Some(2 * PATIENCE)).map_err(failed("set a timeout"))?;
    }
    connect_to(&socket, path).map_err(|errno| refuse(path, explain_connect_error(errno)))?;
    let server = user_of(&socket).map_err(failed("identify the server"))?;
    let users = Users::of_this_process();
    if !(users.is_root(server) || users.is_own(server) || options.trusted_users.contains(&server)) {
        return Err(refuse(path, explain_distrust(users, server)));
    }
    // A server that refuses before the request arrives has already closed the connection. Its
    // answer can still be received.
    match send(&socket, &request, SendFlags::NOSIGNAL) {
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => {}
        Err(errno) => return Err(failed("send the request")(errno)),
    }
    let deadline = Instant::now() + limit;
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    loop {
        let (message, mut here) = match receive_message(&socket) {
            Err(Errno::AGAIN) => return Err(refuse(path, format!("the server did not answer within {:?}", 2 * PATIENCE))),
            received => received.map_err(failed("receive"))?,
        };
        if message.is_empty() {
            return Err(refuse(path, "the server closed the connection"));
        }
        let Some(reply) = Reply::parse(&message) else {
            return Err(refuse(path, "the server speaks another version of the protocol, or is not dmaload"));
        };
        if reply.status != Status::Ok {
            return Err(refuse(path, explain_refusal(reply, name, &parse_names(&message))));
        }
        if Instant::now() > deadline {
            return Err(refuse(path, format!("the server did not send the whole image within {limit:?}")));
        }
        if here.len() != reply.here as usize || here.is_empty() || descriptors.len() + here.len() > reply.all as usize {
            return Err(refuse(
                path,
                "descriptors were lost: the limit on open files (ulimit -n) was reached, or the server sent a different number than it announced",
            ));
        }
        descriptors.append(&mut here);
        // The server sends the next message only after this confirmation.
        match send(&socket, &[0], SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => {}
            Err(errno) => return Err(failed("confirm receipt")(errno)),
        }
        if descriptors.len() == reply.all as usize {
            return Ok(descriptors);
        }
    }
}

/// Explains why connecting failed, and what to do about it.
fn explain_connect_error(errno: Errno) -> String {
    let hint = match errno {
        Errno::NOENT => "; check the path, and whether the server has finished loading: its socket appears with the image",
        Errno::CONNREFUSED => "; the server that created this socket has exited",
        Errno::ACCESS => "; the server must allow this user (ServerOptions::allow_user)",
        Errno::PROTOTYPE => "; the socket belongs to another program",
        Errno::AGAIN => "; the server does not accept connections: its backlog is full",
        _ => "",
    };
    format!("cannot connect: {}{hint}", errno::describe(errno))
}

/// Explains why a server is not trusted.
fn explain_distrust(users: Users, server: u32) -> String {
    let reason = if users.is_ambiguous(server) {
        "an id that all unmapped users share in this user namespace"
    } else {
        "who could modify the shared memory"
    };
    format!("the server runs as user {server}, {reason}: trust it explicitly (AttachOptions::trust_user({server}))")
}

/// Explains a server's refusal. The names come from the server, so they are escaped.
fn explain_refusal(reply: Reply, name: &str, names: &[String]) -> String {
    let list = || {
        let mut list = names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
        let more = (reply.all as usize).saturating_sub(names.len());
        if more > 0 {
            list.push_str(&format!(" and {more} more"));
        }
        list
    };
    match reply.status {
        Status::Ok => unreachable!("`Ok` is not a refusal"),
        Status::Malformed => "the server does not understand the request: it is another version of dmaload".to_owned(),
        Status::NoSuchImage if reply.all == 0 => "the server no longer shares any image".to_owned(),
        Status::NoSuchImage => format!("the server does not share an image {name:?}, but {}", list()),
        Status::Several => format!("the server shares several images: choose one of {}", list()),
        Status::NotAllowed => {
            let user = reply.all;
            format!("this user may not attach: the server must allow user {user} (ServerOptions::allow_user({user}))")
        }
        Status::NotYet => format!("the server still has no image after {PATIENCE:?}: try again when it has finished loading"),
        Status::Busy => {
            format!(
                "the server is busy: other clients of this user have not received their descriptors for {PATIENCE:?}, or the server has reached its limit on connections or open files (ulimit -n)"
            )
        }
    }
}

fn receive_message(socket: &OwnedFd) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
    let mut message = vec![0; REPLY_BYTES + NAMES_LIMIT_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_IN_A_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut was_reset = false;
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            // The server closed the connection without reading everything. Its last answer can be
            // received after this error.
            Err(Errno::CONNRESET) if !was_reset => was_reset = true,
            received => break received?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    message.truncate(received.bytes);
    Ok((message, descriptors))
}

/// Parses the description, which is in the first descriptor, and checks that the other descriptors
/// are allocations of the kind and number that it promises.
fn parse_descriptors(path: &Path, descriptors: Vec<OwnedFd>) -> Result<(Description, Vec<Memory>)> {
    /// Maximum length of a description. A million tensors take about 200 MB.
    const DESCRIPTION_LIMIT_BYTES: usize = 256 << 20;
    let mut descriptors = descriptors.into_iter();
    let wrong = |what: String| refuse(path, what);
    let description = descriptors.next().ok_or_else(|| wrong("the server sent no descriptors".to_owned()))?;
    let description = Memfd::from_sealed(description)
        .map_err(|error| wrong(format!("the image's description is not a sealed memfd: {}", error.errno.describe())))?;
    if description.bytes() > DESCRIPTION_LIMIT_BYTES {
        return Err(wrong(format!(
            "the image's description is {} bytes long, more than the limit of {DESCRIPTION_LIMIT_BYTES}",
            description.bytes()
        )));
    }
    let mut json = vec![0; description.bytes()];
    let mut at = 0;
    while at < json.len() {
        match rustix::io::pread(&description, json.get_mut(at..).unwrap_or_default(), at as u64) {
            Ok(0) | Err(_) => return Err(wrong("cannot read the image's description".to_owned())),
            Ok(bytes) => at += bytes,
        }
    }
    let description = Description::parse(&json).map_err(wrong)?;
    let memories = descriptors.map(|fd| {
        let (taken, expected) = if description.dma_bufs {
            (DmaBuf::from_fd(fd).map(Memory::DmaBuf), "a dma-buf")
        } else {
            (Memfd::from_sealed(fd).map(Memory::Memfd), "a sealed memfd")
        };
        taken.map_err(|error| wrong(format!("an allocation is not {expected}: {}", error.errno.describe())))
    });
    let memories = memories.collect::<Result<Vec<_>>>()?;
    if memories.len() != description.memories {
        return Err(wrong(format!(
            "allocations received: {}, but the image's description lists {}",
            memories.len(),
            description.memories
        )));
    }
    Ok((description, memories))
}

/// Plans where to map each allocation. Returns the allocations' offsets and the total length;
/// `None` if a segment reaches past its allocation, a span would have a gap, or the total length
/// overflows.
fn plan_mapping(segments: &[SegmentPlace], lengths: &[usize]) -> Option<(Vec<usize>, usize)> {
    let (mut places, mut end) = (Vec::new(), 0_usize);
    for (number, &bytes) in lengths.iter().enumerate() {
        let first = segments.partition_point(|segment| segment.memory < number);
        let own = segments.get(first..)?.iter().take_while(|segment| segment.memory == number);
        for segment in own {
            usize::try_from(segment.memory_offset + segment.memory_bytes).ok().filter(|&end| end <= bytes)?;
        }
        let (before, here) = (first.checked_sub(1).and_then(|before| segments.get(before)), segments.get(first)?);
        let continues = before.filter(|before| before.span == here.span);
        if let Some(before) = continues {
            // The preceding segment must fill its allocation to the last byte, or the span would
            // have a gap.
            let whole = before.memory_offset + (before.file_range.end - before.file_range.start);
            (*lengths.get(before.memory)? as u64 == whole).then_some(())?;
        } else {
            end = end.checked_next_multiple_of(dmabuf::HUGE_PAGE_BYTES)?;
        }
        places.push(end);
        end = end.checked_add(bytes)?;
    }
    Some((places, end))
}

fn build_image(path: &Path, description: &Description, memories: Vec<Memory>, started: Instant) -> Result<Attached> {
    let wrong = |what: String| refuse(path, what);
    let length = |memory: &Memory| memory.bytes().expect("memory received as a descriptor should have a length");
    let lengths: Vec<usize> = memories.iter().map(length).collect();
    let (places, all) = plan_mapping(&description.segments, &lengths)
        .ok_or_else(|| wrong("the image's segments don't fit their memory".to_owned()))?;
    let mut backings = Vec::new();
    if !memories.is_empty() {
        let reaper = Reaper::start().map_err(|error| wrong(format!("cannot start a thread: {error}")))?;
        let range = AddressRange::reserve(all).map_err(|error| wrong(format!("cannot {error}")))?;
        for ((memory, &at), &bytes) in memories.into_iter().zip(&places).zip(&lengths) {
            let mapping = range.map(&memory, at, bytes).map_err(|error| wrong(format!("cannot {error}")))?;
            backings.push(Arc::new(Backing::new(mapping, memory, reaper.clone())));
        }
    }
    let heap: Arc<str> = if description.dma_bufs { "shared dma-buf" } else { "shared memfd" }.into();
    let to_usize = |bytes: u64| usize::try_from(bytes).expect("segments should lie within their allocations");
    let mut segments = Vec::new();
    for (index, planned) in description.segments.iter().enumerate() {
        let file = description.files.get(planned.file).expect("a description is refused if a segment's file is missing");
        let backing =
            backings.get(planned.memory).expect("the number of allocations was checked, and segments refer only to these");
        let place = Placement {
            index,
            file_index: planned.file,
            span: planned.span,
            tensors: file.tensors.clone(),
            path: Arc::clone(&file.path),
            file_bytes: file.bytes,
            part: file.part.clone(),
            file_range: planned.file_range.clone(),
            memory_offset: to_usize(planned.memory_offset),
            memory_bytes: to_usize(planned.memory_bytes),
        };
        // SAFETY: `plan_mapping` has checked that the segment lies within its allocation, which is
        // mapped as a whole. The bytes are initialized: those that the server did not write are
        // zero. This process never writes to them, and submits no reads into them. A memfd cannot
        // shrink, and only a process that mapped it before it was sealed can still write to it:
        // `Memfd::from_sealed` has checked its seals, and `receive` has checked that the server's
        // user is trusted. A dma-buf is marked as handed out below, so views of it are never
        // created.
        let segment = unsafe { Segment::new(place, Arc::clone(&heap), Arc::clone(backing)) };
        if description.dma_bufs {
            segment.hand_out_dma_buf()?;
        }
        segments.push(segment);
    }
    let route = description
        .route
        .parse()
        .map_err(|_| wrong(format!("the image's description contains an unknown route, {:?}", description.route)))?;
    let report = make_report(path, description, route, &segments, backings.len(), &heap, started.elapsed());
    let files = description.files.iter().enumerate().map(|(number, file)| LoadFile {
        path: Arc::clone(&file.path),
        bytes: file.bytes,
        part: file.part.clone(),
        tensors: file.tensors.clone(),
        is_known: true,
        index: None,
        has_segments: description.segments.iter().any(|segment| segment.file == number),
    });
    let image = Image::new(files.collect(), segments, report);
    Ok(Attached { image, process: description.process, dma_bufs: description.dma_bufs })
}

/// Creates the report for an attached image. It shows that this process read, copied and allocated
/// nothing.
pub(super) fn make_report(
    path: &Path,
    description: &Description,
    route: Route,
    segments: &[Segment],
    memories: usize,
    heap: &str,
    total: Duration,
) -> Report {
    let bytes = segments.iter().map(|segment| segment.len() as u64).sum();
    let path_of = |path: &Arc<PathBuf>| path.as_ref().clone();
    let files = description.files.iter().map(|file| FileReport { path: path_of(&file.path), bytes: file.bytes, route });
    Report {
        measured: None,
        bytes,
        wanted_bytes: bytes,
        copied_bytes: 0,
        cached_bytes: 0,
        segments: segments.len(),
        memories,
        total,
        allocating: Duration::ZERO,
        reading: Duration::ZERO,
        copying: Duration::ZERO,
        from_cache: Duration::ZERO,
        first_segment: None,
        pages: description.pages,
        pages_refused: None,
        reused_bytes: 0,
        heap: heap.to_owned(),
        notes: vec![format!(
            "attached to {}: process {} loaded the image with the route {route}",
            printable::path(path),
            description.process
        )],
        layout: Layout::Segmented,
        route,
        fallbacks: Vec::new(),
        verified: None,
        trace: Vec::new(),
        files: files.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SocketAddrUnix, accept, bind, listen, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    #[test]
    fn overlong_image_name_is_refused_with_the_limit() {
        let options = AttachOptions::default().name("n".repeat(497));
        let error = receive(Path::new("unused"), &options, Duration::ZERO).unwrap_err().to_string();
        assert!(error.ends_with("the image's name is 497 bytes long, more than the limit of 496"), "{error}");
    }

    /// The server sends one descriptor at a time, each within the socket's timeout.
    #[test]
    fn slow_server_is_abandoned_at_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 1).unwrap();
        let server = std::thread::spawn(move || {
            let client = accept(&listener).unwrap();
            let reply = Reply { status: Status::Ok, all: 1000, here: 1 }.to_bytes();
            let mut sent = 0;
            while sent < 1000 {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let own = [listener.as_fd()];
                assert!(control.push(SendAncillaryMessage::ScmRights(&own)));
                if sendmsg(&client, &[IoSlice::new(&reply)], &mut control, SendFlags::NOSIGNAL).is_err() {
                    break;
                }
                sent += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            sent
        });
        let error = receive(&path, &AttachOptions::default(), Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().ends_with("the server did not send the whole image within 200ms"), "{error}");
        assert!(server.join().unwrap() < 100);
    }
}
