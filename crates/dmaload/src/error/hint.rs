//! Hints for the user about what to do after an error.

use dmabuf::{DeviceError, Error as HeapError, printable};

use super::{Errno, Error};

impl Error {
    /// Suggests what to do about the error. Returns `None` if the error's message already says so,
    /// or if nothing can be done.
    ///
    /// Hints mention the library's options, and shell commands. A program that has other names for
    /// these options can add its names to the hint.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Start { errno: Errno::EAGAIN | Errno::ENOMEM, .. } => {
                "the limit on processes or on address space has been reached: see ulimit -u and ulimit -v"
            }
            Error::Start { errno: Errno::EMFILE, .. } => OPEN_FILES,
            Error::Start { errno: Errno::ENFILE, .. } => ALL_OPEN_FILES,
            Error::File { errno: Errno::ENOENT, path, .. } if path.as_os_str() == "-" => {
                "standard input can't be loaded, because reads need offsets: save it to a file first"
            }
            Error::NotAFile { kind: "a block device", path } => {
                return Some(format!(
                    "copy it to a file first, because changes to it could not be detected: dd if={} of=COPY bs=1M",
                    printable::shell(path)
                ));
            }
            Error::NoLength { path } | Error::Longer { path, .. } => {
                return Some(format!(
                    "its file system knows the length only after reading (procfs, some FUSE servers): copy it to a disk first: cat {} > COPY",
                    printable::shell(path)
                ));
            }
            Error::File { errno: Errno::ENOENT | Errno::ENOTDIR, path, .. } => {
                if let Ok(target) = std::fs::read_link(path) {
                    let target = printable::path(&target);
                    return Some(format!(
                        "it is a symbolic link to {target}, which does not exist: download that file, or fix the link"
                    ));
                }
                "check the path"
            }
            Error::File { errno: Errno::ELOOP, .. } => {
                "the path follows too many symbolic links, probably in a loop: fix the links"
            }
            Error::File { errno: Errno::EACCES | Errno::EPERM, .. } => "check the permissions of the file and its folders",
            // Opening a socket by its path fails with ENXIO.
            Error::File { errno: Errno::ENXIO, .. } | Error::NotAFile { kind: "a socket", .. } => {
                "a socket is not a file; if a server shares a model there, attach to it"
            }
            Error::NotAFile { kind: "a FIFO", .. } => {
                "a pipe can't be loaded, because reads need offsets: save it to a file first"
            }
            Error::NotAFile { kind: "a character device", .. } => "copy its output to a file first",
            Error::File { errno: Errno::EMFILE, .. } | Error::Memory { refusal: HeapError { errno: Errno::EMFILE, .. }, .. } => {
                OPEN_FILES
            }
            Error::File { errno: Errno::ENFILE, .. } | Error::Memory { refusal: HeapError { errno: Errno::ENFILE, .. }, .. } => {
                ALL_OPEN_FILES
            }
            Error::Read { errno: Errno::EIO | Errno::ENODATA | Errno::EREMOTEIO, .. } => {
                "the storage can't read these bytes: see the kernel log (dmesg), and restore the file from a good copy"
            }
            Error::Corrupt { .. } | Error::WrongLength { .. } => {
                "download the file again from where the manifest or checksum came from; if it verifies on another machine, \
                 suspect this machine's storage or memory"
            }
            Error::NotInManifest { .. } => {
                "a manifest identifies files by the ends of their paths: compare its \"path\" entries, or create a new one"
            }
            Error::Ended { path, .. } => {
                return Some(format!(
                    "if something truncated the file, load it again afterwards; otherwise the length that its file system reports is \
                     wrong (sysfs, some FUSE servers): copy it to a disk first: cat {} > COPY",
                    printable::shell(path)
                ));
            }
            Error::Changed { .. } => "load it again when nothing is writing to it",
            Error::Refused { attempt, errno, .. } => return attempt.hint(*errno).map(str::to_owned),
            Error::Memory { heap, refusal, .. } => return memory_hint(heap, refusal).map(str::to_owned),
            Error::Device(DeviceError { errno: Errno::EACCES | Errno::EPERM, path, .. }) => {
                return Some(format!(
                    "get access to it: sudo setfacl -m u:$USER:rw {0}, or a udev rule; or have a process with access pass you the dma-bufs",
                    printable::path(path)
                ));
            }
            Error::Device(DeviceError { errno: Errno::ENOENT, path, .. }) if path.ends_with("udmabuf") => {
                "load the module (sudo modprobe udmabuf), which needs a kernel with CONFIG_UDMABUF"
            }
            Error::TooLarge { wanted_bytes, limit, .. } => {
                let raise = limit.raise(*wanted_bytes);
                return Some(format!("raise it as root: {}; or load in smaller segments", printable::text(&raise)));
            }
            Error::NoDmaBuf { .. } => {
                "see what each heap needs; if a dma-buf is not required, the memfd heap allocates memory that other processes can map"
            }
            Error::OutOfMemory { .. } => "free memory, raise the limit, or stream the file and drop its segments as they arrive",
            Error::TooManyPieces { .. } => "use larger segments, or load only a part",
            Error::OverLimit { .. } => "raise the limit, or stream the load and drop its segments as they arrive",
            Error::HeldUp { .. } => {
                "raise the limit, or request tensors in the order in which they arrive: file order, or that of LoadOptions::tensors"
            }
            Error::Incomplete { loadable: 0, .. } => "finish the download, or download the model again",
            Error::Incomplete { .. } => "finish the download, or load the files that exist (allow_missing)",
            Error::DuplicateTensor { .. } => "load only the right file, or add an index that says which one to use",
            Error::AmbiguousTensor { .. } => "look it up in one of these files",
            Error::Model { fault, .. } => fault.hint(),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

const OPEN_FILES: &str = "the limit on open files has been reached: raise it (ulimit -n)";
const ALL_OPEN_FILES: &str = "the machine's limit on open files has been reached: raise it (sysctl fs.file-max)";

/// The usual size of a process's address space on x86-64, in bytes. (On AArch64, it is usually
/// 2^48 bytes.)
const ALL_ADDRESSES: usize = 1 << 47;

/// Suggests what to do about a memory error. The step that failed shows what ran out. ENOMEM from
/// a step that maps memory means that the address space or the number of mappings is exhausted.
/// ENOMEM from any other step means that no memory is free.
fn memory_hint(heap: &str, refusal: &HeapError) -> Option<&'static str> {
    let maps = ["reserve", "map", "move", "allocate a staging"].iter().any(|step| refusal.operation.starts_with(step));
    Some(match refusal.errno {
        Errno::EINVAL if heap == "udmabuf" => "check its size limit: /sys/module/udmabuf/parameters/size_limit_mb",
        Errno::ENOMEM if refusal.operation.starts_with("reserve") && refusal.bytes >= ALL_ADDRESSES => {
            "no process has that much address space: load a part of the file"
        }
        Errno::ENOMEM if maps => "the address space or the number of mappings is exhausted: see ulimit -v and vm.max_map_count",
        Errno::ENOMEM => {
            "no memory is free: check the limit of this process's memory cgroup (memory.max), and the machine's free memory"
        }
        Errno::EPERM | Errno::EACCES | Errno::ENOSYS if refusal.operation.contains("memfd") => {
            "memfds are refused here, for example by a container's seccomp profile: use the anon heap, which does not need them"
        }
        Errno::EFBIG => "the file size limit also applies to memfds: raise it (ulimit -f), or use the anon heap",
        Errno::EOPNOTSUPP => {
            "2 MiB pages are not available: see shmem_enabled (for the anon heap, enabled) in /sys/kernel/mm/transparent_hugepage, or allow pages of any size"
        }
        _ => return None,
    })
}
