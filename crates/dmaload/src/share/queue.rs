//! Queries the kernel about messages sent over a Unix socket.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, ioctl};

/// `SIOCOUTQ`, from `linux/sockios.h`; the same number as `TIOCOUTQ`.
#[allow(clippy::cast_possible_truncation, reason = "operations have 32 bits")]
const SIOCOUTQ: Opcode = libc::TIOCOUTQ as Opcode;

/// Whether a message sent here is still in the other side's queue. It leaves the queue when it is
/// received, with its descriptors, or when the other side is closed; closing one direction of the
/// connection changes nothing.
pub(super) fn is_unreceived(socket: impl AsFd) -> Result<bool, Errno> {
    // SAFETY: `SIOCOUTQ` writes one `int`.
    let query = unsafe { Getter::<SIOCOUTQ, c_int>::new() };
    // SAFETY: as above; the ioctl changes no state.
    let bytes = unsafe { ioctl(socket, query) }?;
    Ok(bytes > 0)
}
