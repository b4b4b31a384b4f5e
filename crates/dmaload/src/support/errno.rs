//! Conversions between [`io::Errno`], which the engine uses for system calls, and [`Errno`], which
//! errors and reports contain.

use dmabuf::Errno;
use rustix::io;

/// Converts a system call's errno to its public form.
pub(crate) fn from_rustix(errno: io::Errno) -> Errno {
    Errno::from_raw_os_error(errno.raw_os_error())
}

/// Converts an errno from its public form to that of a system call. A number that the kernel does
/// not use becomes EIO.
pub(crate) fn to_rustix(errno: Errno) -> io::Errno {
    io::Errno::from_io_error(&errno.into()).unwrap_or(io::Errno::IO)
}

/// Formats an errno's name and description: `EINVAL (Invalid argument)`.
pub(crate) fn describe(errno: io::Errno) -> String {
    from_rustix(errno).describe()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_keep_the_number() {
        for errno in [io::Errno::NOENT, io::Errno::IO, io::Errno::from_raw_os_error(4000)] {
            assert_eq!(from_rustix(errno).raw_os_error(), errno.raw_os_error());
            assert_eq!(to_rustix(from_rustix(errno)), errno);
        }
    }

    #[test]
    fn numbers_the_kernel_does_not_use_become_eio() {
        for number in [i32::MIN, -5, 0, 4096, i32::MAX] {
            assert_eq!(to_rustix(Errno::from_raw_os_error(number)), io::Errno::IO, "{number}");
        }
    }
}
