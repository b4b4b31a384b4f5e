//! A server's end of a connection, which ends without waiting for what its client has sent along.
//!
//! A message can carry descriptors, of any kind, whoever sends it. A server wants none: they are
//! closed when the message is received or its connection ends, by the thread that does so. The last
//! close of a socket with `SO_LINGER` (`socket(7)`) takes as long as whoever made it likes, and
//! that of a file can wait for its file system. So:
//!
//! - Since Linux 6.16 a socket can refuse them (`SO_PASSRIGHTS`, `unix(7)`): sending fails.
//! - Before, a message is looked at (`MSG_PEEK`) before it is received. A connection with one that
//!   carries descriptors is left to a thread that does nothing else ([`Undertaker`]).
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, Shutdown, recv, recvmsg, shutdown};

/// `SO_PASSRIGHTS` of `include/uapi/asm-generic/socket.h`, which the libc crate does not have yet.
/// Architectures with numbers of their own (Alpha, MIPS, PA-RISC, SPARC) are told that the option is unknown.
const SO_PASSRIGHTS: libc::c_int = 83;
/// Threads that may hang in closing what clients have sent. Beyond them connections wait.
const UNDERTAKERS: usize = 16;

/// Has a listening socket, and all connections to it, refuse descriptors. Whether it does.
pub(super) fn refuse_descriptors(listener: BorrowedFd<'_>) -> bool {
    let no: libc::c_int = 0;
    let length = libc::socklen_t::try_from(size_of_val(&no)).expect("four bytes");
    // SAFETY: the option's value is read, for so many bytes, while `no` is alive.
    let result = unsafe {
        libc::setsockopt(listener.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, std::ptr::from_ref(&no).cast(), length)
    };
    result == 0
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    /// Only `None` inside `drop`.
    socket: Option<OwnedFd>,
    /// `None` where the kernel refuses descriptors.
    undertaker: Option<Arc<Undertaker>>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, undertaker: Option<Arc<Undertaker>>) -> Self {
        Connection { socket: Some(socket), undertaker }
    }

    /// Receives a message, without waiting for one, and says how long it is. Of one that is longer
    /// than the buffer the rest is lost.
    ///
    /// # Errors
    /// `EBADMSG` when it carries descriptors; it stays where it is. Otherwise the kernel's.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        if self.undertaker.is_some() && carries_descriptors(self.as_fd())? {
            return Err(Errno::BADMSG);
        }
        recv(self, buffer, RecvFlags::DONTWAIT).map(|(received, _)| received)
    }

    /// Whether closing it would close descriptors of the client's.
    fn is_encumbered(&self) -> bool {
        // Nothing comes any more, so that what is looked at is all there is. What the client has not
        // received yet it still receives.
        let _ = shutdown(self, Shutdown::Both);
        loop {
            match carries_descriptors(self.as_fd()) {
                Ok(true) => return true,
                Ok(false) => {}
                Err(_) => return false,
            }
            // At the end of what was sent there are no bytes.
            if !matches!(recv(self, &mut [0; 1][..], RecvFlags::DONTWAIT), Ok((1.., _))) {
                return false;
            }
        }
    }
}

/// Whether the next message does; an error where there is none.
fn carries_descriptors(socket: BorrowedFd<'_>) -> Result<bool, Errno> {
    // Without room for them, the kernel says that some were cut off. They are not closed: the
    // message has them still.
    let mut nowhere = RecvAncillaryBuffer::default();
    recvmsg(socket, &mut [], &mut nowhere, RecvFlags::PEEK | RecvFlags::DONTWAIT)
        .map(|message| message.flags.contains(ReturnFlags::CTRUNC))
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().expect("the socket is taken out by the drop alone").as_fd()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(undertaker) = self.undertaker.take() else { return };
        if self.is_encumbered() {
            let socket = self.socket.take().expect("the socket is taken out by the drop alone");
            undertaker.bury(socket);
        }
    }
}

/// Threads that close connections which may take long to close.
#[derive(Debug, Default)]
pub(super) struct Undertaker {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    sockets: VecDeque<OwnedFd>,
    threads: usize,
    /// Of them, those that wait for a socket.
    idle: usize,
    closed: bool,
}

impl Undertaker {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bury(self: Arc<Self>, socket: OwnedFd) {
        let mut queue = self.queue();
        queue.sockets.push_back(socket);
        self.changed.notify_one();
        if queue.idle >= queue.sockets.len() || queue.threads == UNDERTAKERS {
            return;
        }
        queue.threads += 1;
        drop(queue);
        let undertaker = Arc::clone(&self);
        let body = move || undertaker.run();
        // They are not joined: that would be to wait for the clients.
        if thread::Builder::new().name("dmaload-close".to_owned()).spawn(body).is_err() {
            // It waits for a thread that another connection starts, or for the end of the process.
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

    /// No connection comes any more: threads end when they have closed what there is.
    pub(super) fn close(&self) {
        self.queue().closed = true;
        self.changed.notify_all();
    }
}
