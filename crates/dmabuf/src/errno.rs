//! Errors of the kernel by name: `EINVAL` tells more than `22`.

use rustix::io::Errno;

macro_rules! names {
    ($($rustix:ident $posix:literal),* $(,)?) => {
        /// The symbolic name of an errno, as the man pages write it; `None` for one that this table does not have.
        pub fn name(errno: Errno) -> Option<&'static str> {
            match errno {
                $(Errno::$rustix => Some($posix),)*
                _ => None,
            }
        }
    };
}

names! {
    ACCESS "EACCES", AGAIN "EAGAIN", BADF "EBADF", BADFD "EBADFD", BUSY "EBUSY", CANCELED "ECANCELED",
    CONNREFUSED "ECONNREFUSED", CONNRESET "ECONNRESET", DEADLK "EDEADLK", EXIST "EEXIST", FAULT "EFAULT",
    FBIG "EFBIG", HOSTDOWN "EHOSTDOWN", HOSTUNREACH "EHOSTUNREACH", ILSEQ "EILSEQ", INTR "EINTR",
    INVAL "EINVAL", IO "EIO", ISDIR "EISDIR", LOOP "ELOOP", MEDIUMTYPE "EMEDIUMTYPE", MFILE "EMFILE",
    NAMETOOLONG "ENAMETOOLONG", NFILE "ENFILE", NODATA "ENODATA", NODEV "ENODEV", NOENT "ENOENT",
    NOMEDIUM "ENOMEDIUM", NOMEM "ENOMEM", NOSPC "ENOSPC", NOSYS "ENOSYS", NOTCONN "ENOTCONN",
    NOTDIR "ENOTDIR", NOTTY "ENOTTY", NXIO "ENXIO", OPNOTSUPP "EOPNOTSUPP", OVERFLOW "EOVERFLOW",
    PERM "EPERM", PIPE "EPIPE", RANGE "ERANGE", REMOTEIO "EREMOTEIO", ROFS "EROFS", SHUTDOWN "ESHUTDOWN",
    SPIPE "ESPIPE", SRCH "ESRCH", STALE "ESTALE", TIME "ETIME", TIMEDOUT "ETIMEDOUT", TXTBSY "ETXTBSY",
    UCLEAN "EUCLEAN", XDEV "EXDEV",
}

/// `EINVAL (Invalid argument)`; an errno without a name in the table is written by its number.
pub fn describe(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    match name(errno) {
        Some(name) => format!("{name} ({text})"),
        None => format!("errno {} ({text})", errno.raw_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_is_told_by_name_and_in_words() {
        assert_eq!(describe(Errno::INVAL), "EINVAL (Invalid argument)");
        assert_eq!(describe(Errno::NODATA), "ENODATA (No data available)");
    }

    #[test]
    fn an_unknown_errno_keeps_its_number() {
        assert!(describe(Errno::from_raw_os_error(4000)).starts_with("errno 4000 "));
    }
}
