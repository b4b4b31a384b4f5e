//! The facts that doctor collects, as plain data.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use dmabuf::{Limit, Pages, Udmabuf};
use dmaload::heap::HeapChoice;
use dmaload::{Errno, Error, Format, probe};

use super::cause::{self, Cause};
use super::mounts::{self, Mount};
use super::system::{self, HugePages, Memlock, Modules, Status};
use super::trial::Trial;
use crate::errors;

/// Everything that doctor shows, or derives its verdict and advice from.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) kernel: String,
    pub(crate) io_uring: probe::IoUring,
    /// What refuses the setup of io_uring or, if the setup works, the registration of a buffer
    /// table. `None` if neither is refused.
    pub(crate) cause: Option<Cause>,
    pub(crate) memlock: Memlock,
    pub(crate) memory: Option<probe::MemoryAvailable>,
    pub(crate) huge_pages: HugePages,
    pub(crate) path: Option<PathFacts>,
    pub(crate) trial: Trial,
    pub(crate) dma_buf: DmaBuf,
    /// The file size limit in bytes, which also applies to memfds.
    pub(crate) file_size_limit: Option<u64>,
    /// The number of bytes of address space that the process can still use, if a limit is set.
    pub(crate) address_room: Option<u64>,
    /// Whether udmabufs get only small pages because of a bug in this kernel.
    pub(crate) udmabuf_bug: bool,
    pub(crate) modules: Modules,
}

/// The facts about the path that the user named.
#[derive(Debug, Clone)]
pub(crate) struct PathFacts {
    pub(crate) path: PathBuf,
    pub(crate) mount: Option<Mount>,
    /// The results of probing the file; `None` for a folder.
    pub(crate) file: Option<probe::File>,
    /// The number of bytes that a load would read from all files in the model or, if the files'
    /// headers show that the load would fail, the reason.
    pub(crate) load: Result<u64, String>,
}

/// The heap that `--dma-buf` would choose.
#[derive(Debug, Clone)]
pub(crate) struct DmaBuf {
    pub(crate) heap: Option<String>,
    /// Why this heap was chosen, or what is missing.
    pub(crate) reason: String,
}

impl Facts {
    /// Collects the facts about this machine, and about the path if one is given.
    ///
    /// # Errors
    /// If a path is given and can't be opened or probed.
    pub(crate) fn gather(path: Option<&Path>) -> Result<Self> {
        let path = path.map(PathFacts::gather).transpose()?;
        let status = Status::read();
        // Probed before the trial loads: the memory of a ring that was just closed still counts
        // towards the locked memory limit.
        let io_uring = probe::io_uring();
        let refused = [io_uring.setup, io_uring.buffer_table].into_iter().find_map(Result::err);
        let file = path.as_ref().filter(|path| path.file.is_some()).map(|path| path.path.as_path());
        let trial = Trial::run(path.as_ref().map(PathFacts::folder), file);
        Ok(Facts {
            kernel: system::kernel(),
            io_uring,
            cause: refused.map(|errno| cause::find(errno, &status.circumstances())),
            memlock: status.memlock(),
            memory: probe::memory_available(),
            huge_pages: status.huge_pages(),
            dma_buf: DmaBuf::gather(),
            file_size_limit: Limit::FileSize.current(),
            address_room: status.address_room(),
            udmabuf_bug: Udmabuf::huge_pages_show_wrong_bytes(),
            modules: Modules::read(),
            path,
            trial,
        })
    }
}

impl PathFacts {
    fn gather(path: &Path) -> Result<Self> {
        let failed = |operation| {
            move |error: std::io::Error| Error::File {
                path: path.to_owned(),
                operation,
                errno: Errno::from_io_error(&error).unwrap_or(Errno::EIO),
            }
        };
        let metadata = fs::metadata(path).map_err(failed("open"))?;
        let file = if metadata.is_dir() {
            // Files in a folder can't be opened without search permission on the folder.
            rustix::fs::access(path, rustix::fs::Access::EXEC_OK).map_err(|errno| failed("enter")(errno.into()))?;
            None
        } else {
            Some(probe::file(path)?)
        };
        let load = match dmaload::inspect_model_blocking(path, Format::Auto) {
            Ok(files) => Ok(files.iter().map(|inspected| inspected.file_bytes).sum()),
            Err(error) => Err(match errors::hint(&error) {
                Some(hint) => format!("{error}; {hint}"),
                None => error.to_string(),
            }),
        };
        // In some C libraries, realpath(3) requires procfs.
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let device = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
        let mountinfo = fs::read("/proc/self/mountinfo").unwrap_or_default();
        let mount = mounts::find(&String::from_utf8_lossy(&mountinfo), &real, device);
        Ok(PathFacts { path: path.to_owned(), mount, file, load })
    }

    /// Returns the path if it is a folder, or otherwise the folder that contains the file.
    fn folder(&self) -> &Path {
        match (&self.file, self.path.parent()) {
            (None, _) => &self.path,
            (Some(_), Some(folder)) if folder != Path::new("") => folder,
            _ => Path::new("."),
        }
    }
}

impl DmaBuf {
    fn gather() -> Self {
        match HeapChoice::DmaBuf.open(Pages::Auto) {
            Ok((heap, reason)) => DmaBuf { heap: Some(heap.name().into_owned()), reason: reason.unwrap_or_default() },
            Err(error) => DmaBuf { heap: None, reason: error.to_string() },
        }
    }
}

#[cfg(test)]
impl Facts {
    /// The facts about a machine on which nothing can be improved.
    pub(crate) fn best() -> Self {
        use super::trial::{HeapTrial, Loaded};
        let heap = |name: &str| HeapTrial {
            name: name.to_owned(),
            outcome: Ok(Loaded {
                route: dmaload::Route::UringFixedDirect,
                page_bytes: Some(2 << 20),
                pages_refused: None,
                steps: Vec::new(),
            }),
            device: None,
            limit_bytes: None,
            limit_parts: None,
        };
        Facts {
            kernel: "Linux".to_owned(),
            io_uring: probe::IoUring {
                setup: Ok(()),
                deferred_task_run: Ok(()),
                buffer_table: Ok(()),
                file_table: Ok(()),
                register: Ok(()),
                registrable_bytes: 16 << 20,
            },
            cause: None,
            memlock: Memlock { soft_bytes: Some(8 << 20), hard_bytes: Some(8 << 20), cap_ipc_lock: true },
            memory: Some(probe::MemoryAvailable { bytes: 1 << 40, limit: "MemAvailable".to_owned() }),
            huge_pages: HugePages { shmem_enabled: Some("never".to_owned()), ..HugePages::default() },
            path: None,
            trial: Trial {
                folder: Ok("/tmp".into()),
                bytes: 4 << 20,
                elsewhere: None,
                file: None,
                heaps: vec![heap("memfd"), heap("udmabuf")],
            },
            dma_buf: DmaBuf { heap: Some("udmabuf".to_owned()), reason: "udmabuf".to_owned() },
            file_size_limit: None,
            address_room: None,
            udmabuf_bug: false,
            modules: Modules::default(),
        }
    }
}
