//! A server's state, shared with the thread that serves its clients.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dmabuf::{Errno, Memfd};

use super::connection::SlowCloser;
use super::description::describe;
use super::limits::ClientLimits;
use super::listener::Listener;
use super::peer::Users;
use super::protocol::{DESCRIPTORS_LIMIT, Reply, Status, parse_request, with_names};
use crate::error::{Error, Result};
use crate::load::image::Image;
use crate::memory::segment::Segment;
use crate::support::errno;

/// Options of a server.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Ids of users, besides the server's own, that may attach. The socket then accepts
    /// connections from all users, and the kernel is asked who each one is.
    ///
    /// In a user namespace that does not map every user, all unmapped users appear as the overflow
    /// id (usually 65534, `nobody`). A client with that id is refused, even if the server has it
    /// as well, unless the id is in this list: that allows *every* unmapped user.
    pub allowed_users: Vec<u32>,
    /// Whether to share dma-bufs, for clients with devices. **Whoever has a dma-buf can write to
    /// it.** Default: only memfds, sealed against writing.
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

#[derive(Debug)]
pub(super) struct ServerShared {
    pub(super) socket: PathBuf,
    pub(super) listener: Listener,
    /// `None` if the kernel refuses descriptors.
    pub(super) closer: Option<Arc<SlowCloser>>,
    pub(super) options: ServerOptions,
    pub(super) users: Users,
    pub(super) wake: OwnedFd,
    pub(super) images: Mutex<Images>,
    pub(super) served: AtomicU64,
    pub(super) refused: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct Images {
    pub(super) by_name: HashMap<String, (Image, Arc<Published>)>,
    /// Whether any image has been published so far.
    pub(super) any_yet: bool,
    pub(super) closed: bool,
}

/// What clients receive.
#[derive(Debug)]
pub(super) struct Published {
    /// The description, followed by the memories.
    pub(super) descriptors: Vec<OwnedFd>,
}

impl ServerShared {
    pub(super) fn images(&self) -> MutexGuard<'_, Images> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the thread to handle a change.
    pub(super) fn wake(&self) {
        // It fails only if the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Collects an image's descriptors.
    pub(super) fn prepare(&self, image: &Image) -> Result<Published> {
        let no_room = |errno: Errno| refuse(&self.socket, format!("cannot duplicate a descriptor: {}", errno.describe()));
        let json = describe(image, self.options.dma_bufs);
        let description = Memfd::create("dmaload-description", json.len()).map_err(|error| no_room(error.errno))?;
        let mut rest = json.as_bytes();
        let mut at = 0;
        while !rest.is_empty() {
            let written = rustix::io::pwrite(&description, rest, at).map_err(|errno| no_room(errno::from_rustix(errno)))?;
            rest = rest.get(written..).unwrap_or_default();
            at += written as u64;
        }
        description.seal_against_writes().map_err(|error| no_room(error.errno))?;
        if image.report().memories >= DESCRIPTORS_LIMIT {
            return Err(refuse(&self.socket, format!("{} segments are too many to share", image.report().memories)));
        }
        if !self.options.dma_bufs {
            // Seals the memory that clients will read against writing by any other means.
            image.segments().iter().try_for_each(Segment::prevent_hand_out)?;
        }
        let own = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned().map_err(|error| no_room(Errno::from_io_error(&error).unwrap_or(Errno::EMFILE)))
        };
        let mut descriptors = vec![own(description.as_fd())?];
        for (index, segment) in image.segments().iter().enumerate() {
            let before = index.checked_sub(1).and_then(|before| image.segments().get(before));
            if before.is_some_and(|before| segment.shares_memory_with(before)) {
                continue;
            }
            descriptors.push(if self.options.dma_bufs {
                segment.hand_out_owned_dma_buf()?
            } else {
                own(segment.hand_out_memfd()?)?
            });
        }
        Ok(Published { descriptors })
    }

    /// The requested image, or the answer that refuses it.
    pub(super) fn find_image(&self, request: &[u8]) -> Result<Arc<Published>, (Status, Vec<u8>)> {
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

    pub(super) fn is_allowed(&self, user: u32) -> bool {
        self.users.is_own(user) || self.options.allowed_users.contains(&user)
    }

    pub(super) fn limits(&self) -> ClientLimits {
        let descriptors = dmabuf::Limit::OpenFiles.current().unwrap_or(1 << 20);
        // Plus one for the server's own user.
        ClientLimits::new(usize::try_from(descriptors).unwrap_or(1 << 20), self.options.allowed_users.len() + 1)
    }
}

pub(super) fn refuse(socket: &Path, reason: impl Into<String>) -> Error {
    Error::Share { socket: socket.to_owned(), reason: reason.into() }
}

pub(super) fn count(len: usize) -> u32 {
    u32::try_from(len).expect("an image has fewer than 65536 descriptors, and a server fewer images than memory has bytes")
}
