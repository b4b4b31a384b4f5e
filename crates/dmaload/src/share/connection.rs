//! A server's end of a connection. Descriptors sent by the client can never make closing it block.
//!
//! A message from any sender can carry descriptors of any kind. A server does not use them, so
//! they are closed on the thread that receives the message or closes the connection. The last
//! close of a socket with `SO_LINGER` (`socket(7)`) takes as long as its creator chose, and the
//! last close of a file can wait for its file system. Therefore:
//!
//! - Since Linux 6.16, a socket can refuse descriptors (`SO_PASSRIGHTS`, `unix(7)`): sending them
//!   fails.
//! - On older kernels, a message is peeked at (`MSG_PEEK`) before it is received, and one that
//!   carries descriptors is left in the queue. A connection with messages in its queue is handed
//!   to a thread that only closes connections ([`SlowCloser`]).
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, Shutdown, recv, recvmsg, shutdown, sockopt};

/// `SO_PASSRIGHTS` from `include/uapi/asm-generic/socket.h`. The libc crate does not define this
/// constant yet. Its value differs only on PA-RISC and SPARC.
const SO_PASSRIGHTS: libc::c_int = 83;
/// Maximum number of threads that close connections with descriptors from clients. Further
/// connections wait in a queue.
const CLOSERS_MAX: usize = 16;

/// Makes a listening socket, and all later connections to it, refuse descriptors. Returns whether
/// the kernel supports that.
pub(super) fn refuse_descriptors(listener: BorrowedFd<'_>) -> bool {
    let no: libc::c_int = 0;
    let length = libc::socklen_t::try_from(size_of_val(&no)).expect("the size of an int fits into socklen_t");
    // SAFETY: the kernel reads the option's value, of the given length, while `no` is alive.
    let result = unsafe {
        libc::setsockopt(listener.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, std::ptr::from_ref(&no).cast(), length)
    };
    result == 0
}

/// A connection to a client; see the module documentation.
#[derive(Debug)]
pub(super) struct Connection {
    /// `None` only inside `drop`.
    socket: Option<OwnedFd>,
    /// `None` if the kernel refuses descriptors from clients.
    closer: Option<Arc<SlowCloser>>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, closer: Option<Arc<SlowCloser>>) -> Self {
        Connection { socket: Some(socket), closer }
    }

    /// Receives a message without blocking and returns the number of bytes received. If the
    /// message is longer than the buffer, the rest of it is lost.
    ///
    /// # Errors
    /// `EBADMSG` if the message carries descriptors; the message then stays in the queue.
    /// Otherwise, the kernel's error.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        if self.closer.is_some() && carries_descriptors(self.as_fd())? {
            return Err(Errno::BADMSG);
        }
        recv(self, buffer, RecvFlags::DONTWAIT).map(|(received, _)| received)
    }

    /// Whether closing the connection might close descriptors that the client sent. Assumes so if
    /// any message is left in the queue: a later message can carry descriptors even if the first
    /// one does not. Reading all messages first would not help, because an empty message looks
    /// like the end of file.
    fn may_hold_descriptors(&self) -> bool {
        // With this option, the kernel sets MSG_CTRUNC for every message, because there is no
        // space for its credentials, but not at the end of file (`__scm_recv_common` in
        // include/net/scm.h).
        if sockopt::set_socket_passcred(self, true).is_err() {
            return true;
        }
        // Nothing arrives after the shutdown. The client can still receive messages that were
        // already sent.
        let _ = shutdown(self, Shutdown::Both);
        // A pending connection error (ECONNRESET) is returned before any messages, so it
        // does not mean that the queue is empty.
        carries_descriptors(self.as_fd()).unwrap_or(true)
    }
}

/// Whether the next message carries descriptors; an error if there is no message.
fn carries_descriptors(socket: BorrowedFd<'_>) -> Result<bool, Errno> {
    // There is no buffer space for descriptors, so the kernel reports them as truncated. Because
    // this only peeks at the message, the message keeps its descriptors.
    let mut nowhere = RecvAncillaryBuffer::default();
    recvmsg(socket, &mut [], &mut nowhere, RecvFlags::PEEK | RecvFlags::DONTWAIT)
        .map(|message| message.flags.contains(ReturnFlags::CTRUNC))
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().expect("only `drop` takes the socket").as_fd()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(closer) = self.closer.take() else { return };
        if self.may_hold_descriptors() {
            let socket = self.socket.take().expect("only `drop` takes the socket");
            closer.close_later(socket);
        }
    }
}

/// Threads that close connections whose close can block.
#[derive(Debug, Default)]
pub(super) struct SlowCloser {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    sockets: VecDeque<OwnedFd>,
    threads: usize,
    /// Number of threads that are waiting for a socket.
    idle: usize,
    closed: bool,
}

impl SlowCloser {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_later(self: Arc<Self>, socket: OwnedFd) {
        let mut queue = self.queue();
        queue.sockets.push_back(socket);
        self.changed.notify_one();
        if queue.idle >= queue.sockets.len() || queue.threads == CLOSERS_MAX {
            return;
        }
        queue.threads += 1;
        drop(queue);
        let closer = Arc::clone(&self);
        let body = move || closer.run();
        // The thread is never joined, because that would mean waiting for clients.
        if thread::Builder::new().name("dmaload-close".to_owned()).spawn(body).is_err() {
            // The socket stays queued until a running thread, or one started for a later
            // connection, closes it.
            self.queue().threads -= 1;
        }
    }

    fn run(&self) {
        let mut queue = self.queue();
        loop {
            if let Some(socket) = queue.sockets.pop_front() {
                drop(queue);
                drop(socket);
                queue = self.queue();
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }

    /// Lets the threads exit once they have closed all queued connections.
    pub(super) fn close(&self) {
        self.queue().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::mem::MaybeUninit;

    use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
    use rustix::net::{sendmsg, socketpair};

    use super::*;

    /// An empty message looks like the end of file to `recv`.
    #[test]
    fn descriptors_behind_other_messages_are_noticed() {
        for before in [None, Some(&b"not a request"[..]), Some(b"")] {
            for sends in [false, true] {
                let (client, server) =
                    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
                let descriptors = [client.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                if let Some(message) = before {
                    let mut nothing = SendAncillaryBuffer::default();
                    sendmsg(&client, &[IoSlice::new(message)], &mut nothing, SendFlags::NOSIGNAL).unwrap();
                }
                if sends {
                    let mut control = SendAncillaryBuffer::new(&mut space);
                    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
                    sendmsg(&client, &[IoSlice::new(b"")], &mut control, SendFlags::NOSIGNAL).unwrap();
                }
                let connection = Connection::new(server, None);
                let expected = sends || before.is_some();
                assert_eq!(connection.may_hold_descriptors(), expected, "{before:?}, then descriptors: {sends}");
            }
        }
    }
}
