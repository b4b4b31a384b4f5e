//! Converts the keyword arguments of `dmaload.load` to the library's options.

use std::fs::File;
use std::path::PathBuf;

use dmaload::heap::HeapChoice;
use dmaload::{LoadOptions, Loader, Shard};
use dmaload_cli::Against;
use pyo3::prelude::*;

use crate::errors::Failure;
use crate::process::{Process, build};

/// The maximum number of open loads for a loader with a memory limit. Such a loader runs a single
/// load, so this number affects only the size of segments: the library divides the memory limit by
/// it. The largest segment is thus a quarter of the limit, but at least 2 MiB.
const MEMORY_PARTS: usize = 4;

/// The keyword arguments of `dmaload.load`, converted to Rust types.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Keywords {
    tensors: Option<Vec<String>>,
    shard: Option<(u32, u32, Option<usize>)>,
    memory_limit: Option<u64>,
    verify: Option<String>,
    format: Option<String>,
    heap: String,
    route: String,
    cache: Option<String>,
    allow_missing: bool,
}

impl Keywords {
    /// Returns the loader and the load's options.
    ///
    /// # Errors
    /// Fails if an option is invalid, a manifest cannot be read, or no loader can be started.
    pub(crate) fn resolve(self) -> Result<(Loader, LoadOptions), Failure> {
        let mut options = LoadOptions::new().allow_missing(self.allow_missing);
        if let Some(tensors) = self.tensors {
            options = options.tensors(tensors);
        }
        if let Some((rank, world_size, dim)) = self.shard {
            options = options.shard(Shard { rank, world_size, dim });
        }
        if let Some(format) = self.format {
            options = options.format(format.parse().map_err(Failure::config)?);
        }
        if self.route != "auto" {
            options = options.route(self.route.parse().map_err(Failure::config)?);
        }
        if let Some(cache) = self.cache {
            options = options.cache(cache.parse().map_err(Failure::config)?);
        }
        if let Some(against) = self.verify {
            options = verified(options, &against)?;
        }
        let heap: HeapChoice = self.heap.parse().map_err(Failure::config)?;
        let loader = match self.memory_limit {
            None => Process::current().loader(&heap)?,
            // The limit applies to this load only, so the load gets its own loader.
            Some(bytes) => build(Loader::builder().memory_limit_bytes(bytes).max_open_loads(MEMORY_PARTS), &heap)?,
        };
        Ok((loader, options))
    }
}

/// Adds a manifest or a checksum, in the syntax of the command's `--verify`.
fn verified(options: LoadOptions, text: &str) -> Result<LoadOptions, Failure> {
    let against: Against = text.parse().map_err(Failure::config)?;
    against.apply_to(options).map_err(|error| {
        // The error from `apply_to` contains the errno only as a name in its message. Open the
        // manifest again to get the number.
        let errno = match &against {
            Against::Manifest(path) => File::open(path).err().and_then(|error| error.raw_os_error()),
            Against::Digest(_) => None,
        };
        match errno {
            Some(errno) if errno == rustix::io::Errno::NOENT.raw_os_error() => {
                Failure::new("NotFoundError", format!("{error:#}")).about(errno, PathBuf::from(text))
            }
            Some(errno) => Failure::new("IoError", format!("{error:#}")).about(errno, PathBuf::from(text)),
            None => Failure::config(format!("{error:#}")),
        }
    })
}
