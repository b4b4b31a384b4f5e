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
use super::protocol::{DESCRIPTORS_LIMIT, Reply, Status, encode_with_names, parse_request};
use crate::error::{Error, Result};
use crate::load::image::Image;
use crate::memory::segment::Segment;
use crate::support::errno;

/// Options for a [`Server`](super::Server).
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Ids of the users, besides the server's own, who may attach. If this list is not empty, the
    /// socket's mode lets every user connect, and the server refuses those who may not attach.
    ///
    /// In a user namespace that does not map every user, all unmapped users appear as the overflow
    /// id (usually 65534, `nobody`). A client with that id is refused, even if the server has it
    /// as well, unless the id is in this list. Listing it allows *every* unmapped user.
    pub allowed_users: Vec<u32>,
    /// Whether to share dma-bufs, for clients with devices. **Every client can write to a dma-buf
    /// that it receives.** By default, only memfds are shared, sealed against writes.
    pub dma_bufs: bool,
}

impl ServerOptions {
    /// Adds a user to [`Self::allowed_users`].
    #[must_use]
    pub fn allow_user(mut self, user: u32) -> Self {
        self.allowed_users.push(user);
        self
    }

    /// Sets [`Self::dma_bufs`].
    #[must_use]
    pub fn dma_bufs(mut self, shared: bool) -> Self {
        self.dma_bufs = shared;
        self
    }
}

/// Maximum number of allocations in a shared image. One descriptor is needed for the description.
const ALLOCATIONS_LIMIT: usize = DESCRIPTORS_LIMIT - 1;

#[derive(Debug)]
pub(super) struct ServerShared {
    pub(super) socket: PathBuf,
    pub(super) listener: Listener,
    /// `None` if the kernel refuses descriptors from clients.
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

/// An image as clients receive it.
#[derive(Debug)]
pub(super) struct Published {
    /// The description, followed by the allocations.
    pub(super) descriptors: Vec<OwnedFd>,
}

impl ServerShared {
    pub(super) fn images(&self) -> MutexGuard<'_, Images> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the serving thread to handle a change.
    pub(super) fn wake(&self) {
        // The write fails only if the counter is full, and then the thread is already being woken.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Collects an image's descriptors. Unless dma-bufs are shared, permanently prevents writes to
    /// the image's memory.
    pub(super) fn prepare(&self, image: &Image) -> Result<Published> {
        let cannot = |what: &str, errno: Errno| refuse(&self.socket, format!("cannot {what}: {}", errno.describe()));
        let undescribed = |errno| cannot("create the image's description", errno);
        let json = describe(image, self.options.dma_bufs);
        let description = Memfd::create("dmaload-description", json.len()).map_err(|error| undescribed(error.errno))?;
        let mut rest = json.as_bytes();
        let mut at = 0;
        while !rest.is_empty() {
            let written = rustix::io::pwrite(&description, rest, at).map_err(|errno| undescribed(errno::from_rustix(errno)))?;
            rest = rest.get(written..).unwrap_or_default();
            at += written as u64;
        }
        description.seal_against_writes().map_err(|error| undescribed(error.errno))?;
        let allocations = image.report().memories;
        if allocations > ALLOCATIONS_LIMIT {
            let reason = format!(
                "cannot share an image of {allocations} allocations: the limit is {ALLOCATIONS_LIMIT}; load it in larger segments"
            );
            return Err(refuse(&self.socket, reason));
        }
        if !self.options.dma_bufs {
            // If a dma-buf of this memory were handed out, its holders could write to the memory.
            image.segments().iter().try_for_each(Segment::prevent_hand_out)?;
        }
        let own = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map_err(|error| cannot("duplicate a descriptor", Errno::from_io_error(&error).unwrap_or(Errno::EMFILE)))
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

    /// Finds the requested image. The error contains the status and the encoded refusal, which the
    /// caller should send to the client.
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
        Err((status, encode_with_names(Reply { status, all: count(names.len()), here: 0 }, names)))
    }

    pub(super) fn is_allowed(&self, user: u32) -> bool {
        self.users.is_own(user) || self.options.allowed_users.contains(&user)
    }

    pub(super) fn limits(&self) -> ClientLimits {
        let descriptors = dmabuf::Limit::OpenFiles.current().unwrap_or(1 << 20);
        // The server's own user may attach, too.
        ClientLimits::new(usize::try_from(descriptors).unwrap_or(1 << 20), self.options.allowed_users.len() + 1)
    }
}

pub(super) fn refuse(socket: &Path, reason: impl Into<String>) -> Error {
    Error::Share { socket: socket.to_owned(), reason: reason.into() }
}

pub(super) fn count(len: usize) -> u32 {
    u32::try_from(len).expect("an image should have at most 65536 descriptors, and a server fewer than 2^32 images")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::route::Route;
    use crate::share::Server;
    use crate::share::client::make_report;
    use crate::share::description::Description;

    #[test]
    fn image_with_too_many_allocations_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::bind(folder.path().join("socket"), ServerOptions::default()).unwrap();
        let empty = br#"{"process":1,"route":"buffered","dma_bufs":false,"memories":0,"segments":[],"files":[]}"#;
        let description = Description::parse(empty).unwrap();
        let image = |allocations| {
            let report = make_report(Path::new(""), &description, Route::Buffered, &[], allocations, "memfd", Duration::ZERO);
            Image::new(Vec::new(), Vec::new(), report)
        };
        server.publish("largest", image(65_535)).unwrap();
        let error = server.publish("too large", image(65_536)).unwrap_err().to_string();
        let expected = "cannot share an image of 65536 allocations: the limit is 65535; load it in larger segments";
        assert!(error.ends_with(expected), "{error}");
    }
}
