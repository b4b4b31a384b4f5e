//! The server side, which publishes images. One thread serves all clients: see [`super::clients`].

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::Mode;
use rustix::io::Errno;

use super::clients::serve;
use super::connection::refuse_descriptors;
use super::listener::{Listener, new_socket};
use super::peer::Users;
use super::published::{ServerOptions, ServerShared, refuse};
use super::queue::is_unreceived;
use crate::error::Result;
use crate::load::image::Image;
use crate::support::errno;

/// Shares images with other processes; see [the module](super). Dropping the server stops sharing;
/// clients keep the images that they have received.
pub struct Server {
    shared: Arc<ServerShared>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Listens at a path, which can be longer than a socket address. Replaces an existing socket
    /// that refuses connections, but no other file. Only the server's user may connect, unless
    /// others are allowed.
    ///
    /// Binding is safe in a folder that another user owns: see `share/listener.rs`. While a server
    /// is being created, checked or dropped, the socket's folder also contains a folder named
    /// `.NAME.dmaload`, where `NAME` is the last component of the path. `NAME` can therefore be
    /// at most 246 bytes long.
    ///
    /// Clients that connect before the first image is published wait for it, for at most
    /// [`super::PATIENCE`].
    ///
    /// # Errors
    /// [`crate::Error::Share`], for instance if another process is listening at this path.
    pub fn bind(socket: impl AsRef<Path>, options: ServerOptions) -> Result<Self> {
        Server::bind_with(socket.as_ref(), options, refuse_descriptors)
    }

    fn bind_with(path: &Path, options: ServerOptions, refuse_descriptors: fn(BorrowedFd<'_>) -> bool) -> Result<Self> {
        let failed = |what: &str, errno: Errno| refuse(path, format!("cannot {what}: {}", errno::describe(errno)));
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| failed("create an eventfd", errno))?;
        // Each connection's credentials are checked in any case. The mode only prevents
        // connections that would be refused anyway.
        let mode = Mode::from_raw_mode(if options.allowed_users.is_empty() { 0o600 } else { 0o666 });
        let socket = new_socket().map_err(|errno| failed("create a socket", errno))?;
        // A connection inherits this setting from the listener when the client connects, so the
        // setting must be in place before any client can connect.
        let closer = (!refuse_descriptors(socket.as_fd())).then(Arc::default);
        let listener = Listener::bind(socket, path, mode).map_err(|reason| refuse(path, reason))?;
        // Try the query once. If a system call filter refuses it, `bind` should fail now, rather
        // than every client later.
        is_unreceived(&listener.socket).map_err(|errno| failed("check what clients have received", errno))?;
        let shared = Arc::new(ServerShared {
            socket: path.to_owned(),
            listener,
            closer,
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

    /// Checks that a socket could be placed at this path now, for callers that load for minutes
    /// before they bind.
    ///
    /// # Errors
    /// [`crate::Error::Share`].
    pub fn check(socket: impl AsRef<Path>) -> Result<()> {
        let path = socket.as_ref();
        Listener::check(path).map_err(|reason| refuse(path, reason))
    }

    /// Publishes an image under a name, replacing any other image with that name. Later loads
    /// never reuse the image's memory. Unless dma-bufs are shared, the memory is sealed against
    /// writes, and its dma-bufs can no longer be handed out.
    ///
    /// # Errors
    /// - [`crate::Error::NoDescriptor`] if the memory is not of the kind that this server shares.
    /// - [`crate::Error::Viewed`] if dma-bufs are shared and views of the bytes exist.
    /// - [`crate::Error::HandedOut`] if memfds are shared and a dma-buf of the same memory was
    ///   handed out.
    /// - [`crate::Error::Memory`] if the kernel refuses the seal (before Linux 5.1).
    /// - [`crate::Error::Share`] or [`crate::Error::File`] if descriptors run out, and
    ///   [`crate::Error::Share`] if the image has too many allocations.
    pub fn publish(&self, name: &str, image: Image) -> Result<()> {
        let published = Arc::new(self.shared.prepare(&image)?);
        let before = {
            let mut images = self.shared.images();
            images.any_yet = true;
            images.by_name.insert(name.to_owned(), (image, published))
        };
        // Clients may be waiting for this image.
        self.shared.wake();
        // Drop the replaced image outside the lock, because this can free gigabytes.
        drop(before);
        Ok(())
    }

    /// Stops sharing the image with this name and returns it. Clients that are receiving the image
    /// still get all of it.
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

    /// How many clients have received an image, and how many connections were refused or closed
    /// early.
    pub fn served(&self) -> (u64, u64) {
        (self.shared.served.load(Ordering::Relaxed), self.shared.refused.load(Ordering::Relaxed))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.images().closed = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // The thread never waits for a client, so it exits soon.
            let _ = thread.join();
        }
        if let Some(closer) = &self.shared.closer {
            closer.close();
        }
        // The thread held the only other reference to `shared` and has exited, so dropping
        // `shared` drops the listener, which removes its socket.
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("socket", &self.shared.socket).field("names", &self.names()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, send as send_bytes,
        sendmsg, sockopt,
    };

    use super::*;

    /// Returns the ends of a TCP connection. The last close of the first end blocks until the
    /// second has read everything.
    fn connect_lingering() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        sockopt::set_socket_linger(&sender, Some(Duration::from_secs(600))).unwrap();
        sender.set_nonblocking(true).unwrap();
        // The other end does not read, so the buffers fill up and bytes stay unsent.
        while sender.write(&[0; 1 << 16]).is_ok() {}
        (sender.into(), receiver)
    }

    /// Sends a message with a descriptor and closes this process's copy of the descriptor.
    fn send_with_descriptor(socket: &OwnedFd, message: &[u8], descriptor: OwnedFd) -> Result<(), Errno> {
        let descriptors = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let sent = sendmsg(socket, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL).map(|_| ());
        // If the message was refused or already dropped, this is the last close, which blocks.
        thread::spawn(move || drop(descriptor));
        sent
    }

    #[test]
    fn client_sending_slow_descriptors_does_not_delay_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let connect = || {
            let flags = SocketFlags::CLOEXEC;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
            crate::share::listener::connect_to(&socket, &path).unwrap();
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_secs(10))).unwrap();
            socket
        };
        let refuse_in_time = |listener: BorrowedFd<'_>| {
            assert!(!sockopt::socket_acceptconn(listener).unwrap(), "the socket should not be listening yet");
            refuse_descriptors(listener)
        };
        // Test this kernel's behavior first, then that of kernels before Linux 6.16.
        for refuse in [refuse_in_time, |_: BorrowedFd<'_>| false] {
            let server = Server::bind_with(&path, ServerOptions::default(), refuse).unwrap();
            let is_refused = server.shared.closer.is_none();
            let mut others = Vec::new();
            // This is repeated, because the server's close can block only if it is the last one.
            let before = [None, Some(&b"not a request"[..]), Some(b"")];
            for (before, ends) in before.into_iter().flat_map(|before| [(before, true), (before, false)]).cycle().take(60) {
                let (descriptor, other) = connect_lingering();
                others.push(other);
                let socket = connect();
                if let Some(message) = before {
                    send_bytes(&socket, message, SendFlags::NOSIGNAL).unwrap();
                }
                // Keep the server busy with other clients, so the client's side is closed first.
                let _busy: Vec<_> = (0..16)
                    .map(|_| {
                        let socket = connect();
                        send_bytes(&socket, b"not a request", SendFlags::NOSIGNAL).unwrap();
                        socket
                    })
                    .collect();
                // The server may have closed the connection after the first message.
                let sent = send_with_descriptor(&socket, b"not a request", descriptor);
                assert!(!is_refused || sent == Err(Errno::PERM) || before.is_some(), "{sent:?}");
                assert!(is_refused || before.is_some() || sent.is_ok(), "{sent:?}");
                if !ends {
                    std::mem::forget(socket);
                }
                // The server still answers other clients, though not with an image.
                let socket = connect();
                send_bytes(&socket, b"not a request", SendFlags::NOSIGNAL).unwrap();
                let answer = rustix::net::recv(&socket, &mut [0; 64][..], rustix::net::RecvFlags::empty());
                assert!(matches!(answer, Ok((1.., _))), "refused {is_refused}, {before:?} before, ends {ends}: {answer:?}");
            }
            // Connections that were never accepted don't delay the server's shutdown either.
            let (descriptor, other) = connect_lingering();
            others.push(other);
            let socket = connect();
            let _ = send_with_descriptor(&socket, b"not a request", descriptor);
            let (ended, end) = std::sync::mpsc::channel();
            thread::spawn(move || {
                drop(server);
                ended.send(())
            });
            end.recv_timeout(Duration::from_secs(10))
                .unwrap_or_else(|_| panic!("refused {is_refused}: the server did not shut down"));
        }
    }
}
