//! What the kernel knows of messages that were sent over a Unix socket.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, ioctl};

/// `SIOCOUTQ`, from `linux/sockios.h`; the same number as `TIOCOUTQ`.
#[allow(clippy::cast_possible_truncation, reason = "operations have 32 bits")]
const SIOCOUTQ: Opcode = libc::TIOCOUTQ as Opcode;

/// Whether a message that was sent here is still in the other side's queue. It leaves that when
/// it is received, with its descriptors, or when the other side ends; closing one direction of
/// the connection changes nothing.
pub(super) fn is_unreceived(socket: impl AsFd) -> Result<bool, Errno> {
    // SAFETY: `SIOCOUTQ` writes one `int`.
    let query = unsafe { Getter::<SIOCOUTQ, c_int>::new() };
    // SAFETY: as above; it changes nothing.
    let bytes = unsafe { ioctl(socket, query) }?;
    Ok(bytes > 0)
}
