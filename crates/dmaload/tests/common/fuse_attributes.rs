//! File attributes that the FUSE servers in the tests report.

use std::time::UNIX_EPOCH;

use fuser::{FileAttr, FileType, INodeNo};

/// Returns the attributes of a file with `file_bytes` bytes, or of a folder if `file_bytes` is
/// `None`. All times are the Unix epoch.
pub(crate) fn attributes(inode: INodeNo, file_bytes: Option<u64>) -> FileAttr {
    FileAttr {
        ino: inode,
        size: file_bytes.unwrap_or(0),
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if file_bytes.is_some() { FileType::RegularFile } else { FileType::Directory },
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}
