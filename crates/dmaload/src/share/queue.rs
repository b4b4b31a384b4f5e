//! Queries the kernel about messages sent over a Unix socket.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, ioctl};

/// `SIOCOUTQ`, from `linux/sockios.h`; the same number as `TIOCOUTQ`.
#[allow(clippy::cast_possible_truncation, reason = "ioctl numbers have 32 bits")]
const SIOCOUTQ: Opcode = libc::TIOCOUTQ as Opcode;

/// Whether a message sent through `socket` is still in the peer's receive queue. The message
/// leaves the queue, with its descriptors, when it is received or the peer closes its socket;
/// shutting down one direction of the connection does not remove it.
pub(super) fn is_unreceived(socket: impl AsFd) -> Result<bool, Errno> {
    // SAFETY: `SIOCOUTQ` writes one `int`.
    let query = unsafe { Getter::<SIOCOUTQ, c_int>::new() };
    // SAFETY: as above; the ioctl changes no state.
    let bytes = unsafe { ioctl(socket, query) }?;
    Ok(bytes > 0)
}
