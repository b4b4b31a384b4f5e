//! Kernel error numbers and their names.

use std::fmt;
use std::io;

/// A kernel error number.
///
/// The constants are named as in errno(3). [`fmt::Display`] prints the same text as [`io::Error`].
/// [`Errno::describe`] returns that text with the name instead of the number, as in this crate's
/// error messages:
///
/// ```
/// use dmabuf::Errno;
///
/// let errno = Errno::from_raw_os_error(22);
/// assert_eq!(errno, Errno::EINVAL);
/// assert_eq!(errno.name(), Some("EINVAL"));
/// assert_eq!(errno.describe(), "EINVAL (Invalid argument)");
/// assert_eq!(errno.to_string(), "Invalid argument (os error 22)");
/// assert_eq!(std::io::Error::from(errno).kind(), std::io::ErrorKind::InvalidInput);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

macro_rules! constants {
    ($($rustix:ident $posix:ident),* $(,)?) => {
        impl Errno {
            $(
                #[doc = concat!("`", stringify!($posix), "`: see errno(3).")]
                pub const $posix: Errno = Errno(rustix::io::Errno::$rustix.raw_os_error());
            )*

            /// Returns the symbolic name from the man pages, or `None` if this type has no
            /// constant for the error.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Errno::$posix => Some(stringify!($posix)),)*
                    _ => None,
                }
            }
        }
    };
}

constants! {
    ACCESS EACCES, AGAIN EAGAIN, BADF EBADF, BADFD EBADFD, BUSY EBUSY, CANCELED ECANCELED,
    CONNREFUSED ECONNREFUSED, CONNRESET ECONNRESET, DEADLK EDEADLK, EXIST EEXIST, FAULT EFAULT,
    FBIG EFBIG, HOSTDOWN EHOSTDOWN, HOSTUNREACH EHOSTUNREACH, ILSEQ EILSEQ, INTR EINTR,
    INVAL EINVAL, IO EIO, ISDIR EISDIR, LOOP ELOOP, MEDIUMTYPE EMEDIUMTYPE, MFILE EMFILE,
    NAMETOOLONG ENAMETOOLONG, NFILE ENFILE, NODATA ENODATA, NODEV ENODEV, NOENT ENOENT,
    NOMEDIUM ENOMEDIUM, NOMEM ENOMEM, NOSPC ENOSPC, NOSYS ENOSYS, NOTCONN ENOTCONN,
    NOTDIR ENOTDIR, NOTTY ENOTTY, NXIO ENXIO, OPNOTSUPP EOPNOTSUPP, OVERFLOW EOVERFLOW,
    PERM EPERM, PIPE EPIPE, RANGE ERANGE, REMOTEIO EREMOTEIO, ROFS EROFS, SHUTDOWN ESHUTDOWN,
    SPIPE ESPIPE, SRCH ESRCH, STALE ESTALE, TIME ETIME, TIMEDOUT ETIMEDOUT, TXTBSY ETXTBSY,
    UCLEAN EUCLEAN, XDEV EXDEV,
}

impl Errno {
    /// Creates an `Errno` from the number that the kernel returned.
    pub const fn from_raw_os_error(number: i32) -> Self {
        Errno(number)
    }

    /// Returns the error number.
    pub const fn raw_os_error(self) -> i32 {
        self.0
    }

    /// Returns the errno of an I/O error, or `None` if the error did not come from the kernel.
    pub fn from_io_error(error: &io::Error) -> Option<Self> {
        error.raw_os_error().map(Errno)
    }

    /// Returns the name and the description, such as `EINVAL (Invalid argument)`. If the errno has
    /// no name, returns the number and the description, such as `errno 4000 (…)`.
    pub fn describe(self) -> String {
        let text = self.to_string();
        let text = text.split(" (os error").next().unwrap_or_default();
        match self.name() {
            Some(name) => format!("{name} ({text})"),
            None => format!("errno {} ({text})", self.0),
        }
    }

    pub(crate) fn from_rustix(errno: rustix::io::Errno) -> Self {
        Errno(errno.raw_os_error())
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from(*self).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        io::Error::from_raw_os_error(errno.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_is_described_by_name_and_text() {
        assert_eq!(Errno::EINVAL.describe(), "EINVAL (Invalid argument)");
        assert_eq!(Errno::ENODATA.describe(), "ENODATA (No data available)");
        assert_eq!(format!("{:?}", Errno::EIO), "EIO");
    }

    #[test]
    fn unknown_errno_keeps_its_number() {
        let unknown = Errno::from_raw_os_error(4000);
        assert!(unknown.describe().starts_with("errno 4000 "));
        assert_eq!((unknown.name(), unknown.raw_os_error()), (None, 4000));
        assert_eq!(format!("{unknown:?}"), "Errno(4000)");
    }

    #[test]
    fn constants_match_libc() {
        for (errno, number) in [
            (Errno::EPERM, libc::EPERM),
            (Errno::ENOENT, libc::ENOENT),
            (Errno::EIO, libc::EIO),
            (Errno::EAGAIN, libc::EAGAIN),
            (Errno::EOPNOTSUPP, libc::ENOTSUP),
            (Errno::ECANCELED, libc::ECANCELED),
        ] {
            assert_eq!(errno.raw_os_error(), number, "{errno:?}");
        }
    }

    #[test]
    fn io_errors_convert_both_ways() {
        for errno in [Errno::ENOENT, Errno::EIO, Errno::from_raw_os_error(4000)] {
            let error = io::Error::from(errno);
            assert_eq!(Errno::from_io_error(&error), Some(errno));
            assert_eq!(error.to_string(), errno.to_string());
        }
        assert_eq!(Errno::from_io_error(&io::Error::other("torn")), None);
    }
}
