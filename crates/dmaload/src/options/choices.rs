//! The types of the values that a load's options accept.

use crate::support::names;

/// How a file is divided into segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// Segments of the configured size. The first segments can be used while the rest of the file
    /// is being read.
    #[default]
    Segmented,
    /// One segment for the whole file, or for each contiguous range of it that is read. Reading
    /// into a segment begins while the rest of its memory is still being populated, except on
    /// heaps that populate memory when they allocate it, such as dma-heaps.
    Single,
    /// Like `Segmented`, but files are cut between tensors. Each tensor is in a single segment,
    /// which is larger than the configured size if necessary. A tensor is split only if it exceeds
    /// what the importer, the heap or the memory limit allows. If one tensor ends and the next
    /// begins within the same block, the segments of both contain that block. A file of raw bytes
    /// is divided as in `Segmented`.
    Tensors,
}

impl Layout {
    /// Returns the name used on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Segmented => "segmented",
            Layout::Single => "single",
            Layout::Tensors => "tensors",
        }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Layout {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        names::parse(name, "layout", &[Layout::Segmented, Layout::Single, Layout::Tensors], Layout::name)
    }
}

/// How to interpret the files at a path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// safetensors or GGUF if the file looks like one of them, otherwise raw bytes. If the path is
    /// a folder, an index, or one part of a split GGUF model, all files of the model are loaded.
    #[default]
    Auto,
    /// safetensors; anything else is an error.
    Safetensors,
    /// GGUF; anything else is an error.
    Gguf,
    /// Raw bytes, without looking for a header.
    Raw,
}

impl Format {
    /// Returns the name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Auto => "auto",
            Format::Safetensors => "safetensors",
            Format::Gguf => "gguf",
            Format::Raw => "raw",
        }
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        names::parse(name, "format", &[Format::Auto, Format::Safetensors, Format::Gguf, Format::Raw], Format::name)
    }
}

/// What to do with bytes of a file that are already in the page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cache {
    /// Do not check what the page cache holds, and read everything through the load's route. The
    /// routes `uring-buffered` and `buffered` themselves go through the page cache.
    Bypass,
    /// If a chunk is fully cached, copy it from the page cache. Read the rest through the load's
    /// route. Checking what is cached adds at most 1 % of a large file to the cache.
    ///
    /// Has an effect only on file systems where every change to cached bytes updates the file's
    /// modification time: ext4, xfs, btrfs, and read-only ones (squashfs, erofs, iso9660). FUSE,
    /// overlayfs and network file systems are excluded because their cache may be stale, and tmpfs
    /// because it does not record every change.
    #[default]
    Auto,
}

impl Cache {
    /// Returns the name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Cache::Bypass => "bypass",
            Cache::Auto => "auto",
        }
    }
}

impl std::fmt::Display for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Cache {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        names::parse(name, "choice", &[Cache::Bypass, Cache::Auto], Cache::name)
    }
}

/// What to optimize for when choosing how to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefer {
    /// Minimize the duration of the load.
    #[default]
    Speed,
    /// Minimize CPU time. Direct reads are used if possible, because they copy nothing unless the
    /// file is in memory (tmpfs, DAX). The load does not measure which way of reading is fastest.
    Cpu,
}

impl Prefer {
    fn name(self) -> &'static str {
        match self {
            Prefer::Speed => "speed",
            Prefer::Cpu => "cpu",
        }
    }
}

impl std::str::FromStr for Prefer {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        names::parse(name, "preference", &[Prefer::Speed, Prefer::Cpu], Prefer::name)
    }
}

/// Which loads get memory first when several are running.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Priority {
    /// Gets memory only when no load with a higher priority can use it.
    Low,
    /// Takes turns with other loads that have this priority.
    #[default]
    Normal,
    /// Gets memory before all loads with a lower priority.
    High,
}

impl Priority {
    /// Every priority, highest first.
    pub(crate) const DOWN: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];
}

/// One rank's share of a model; see [`crate::LoadOptions::shard`].
///
/// ```no_run
/// # async fn example() -> dmaload::Result<()> {
/// use dmaload::{LoadOptions, Loader, Shard};
///
/// // The second quarter of the rows of each tensor.
/// let shard = Shard { rank: 1, world_size: 4, dim: Some(0) };
/// let options = LoadOptions::new().shard(shard);
/// let image = Loader::new()?.load("model-folder").options(options).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// The rank, counted from 0.
    pub rank: u32,
    /// The number of ranks.
    pub world_size: u32,
    /// The dimension along which each tensor is cut. The outermost dimension is 0. If `None`, each
    /// file's bytes are divided among the ranks instead, regardless of where tensors begin and
    /// end.
    pub dim: Option<usize>,
}

/// What an importer of segments (the kernel driver of a GPU, an NPU or a codec) can map; see
/// [`crate::LoadOptions::importer`]. The default sets no limits. A load that would exceed the
/// limits fails with [`crate::Error::Importer`].
///
/// ```
/// use dmaload::{ImporterLimits, Layout, LoadOptions};
///
/// // A device that imports at most 64 dma-bufs of up to 1 GiB, and reads tensors at multiples of
/// // 256 bytes.
/// let limits = ImporterLimits {
///     max_segment_bytes: 1 << 30,
///     max_segments: 64,
///     alignment_bytes: 256,
///     ..ImporterLimits::default()
/// };
/// let options = LoadOptions::new().layout(Layout::Tensors).importer(limits);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImporterLimits {
    /// The size in bytes of the largest dma-buf that the importer accepts: at least 1 MiB, and at
    /// least [`crate::LoadOptions::segment_bytes`], if that is set.
    pub max_segment_bytes: u64,
    /// The maximum number of dma-bufs that a load may use. Small files, and small spans of
    /// tensors, share dma-bufs.
    pub max_segments: usize,
    /// The alignment in bytes of each tensor in its dma-buf: a power of two, at most 1 GiB. An
    /// alignment of more than 1 requires [`Layout::Tensors`].
    ///
    /// A direct read preserves a byte's position within its block, where a block is at least a
    /// page (usually 4 KiB). If a tensor's position in the file is not sufficiently aligned, the
    /// tensor is therefore copied into place after it has been read.
    /// [`crate::Report::copied_bytes`] counts the copied bytes. If the alignment is larger than
    /// such a block, no two tensors share a dma-buf.
    pub alignment_bytes: u64,
    /// Whether tensors may be copied to align them. If not, a load that would need such a copy
    /// fails with [`crate::Error::Unaligned`].
    pub may_copy: bool,
}

impl Default for ImporterLimits {
    fn default() -> Self {
        ImporterLimits { max_segment_bytes: u64::MAX, max_segments: usize::MAX, alignment_bytes: 1, may_copy: true }
    }
}
