//! The choices for a load, one type for each.

use crate::support::names;

/// How a file is divided into segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// Segments of the configured size, each with its own memory. The first can be used while the
    /// rest is being read.
    #[default]
    Segmented,
    /// One segment for the whole file, still filled piece by piece while the rest is being
    /// populated.
    Single,
    /// Like `Segmented`, but cut between tensors: each tensor is in one segment, in a larger one
    /// if necessary, unless it exceeds what the importer, the heap or the memory limit allows. Two
    /// segments that are adjacent in a file both contain the block in which one tensor ends and
    /// the next begins. A file without tensors is divided as in `Segmented`.
    Tensors,
}

impl Layout {
    /// The name used on the command line and in reports.
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

/// How to interpret the bytes of a path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// safetensors or GGUF if the file looks like one, otherwise raw bytes. A folder is treated as
    /// a model of several files.
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
    /// The name used on the command line.
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

/// How to treat bytes of a file that are in the page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cache {
    /// Ignore the page cache: read everything from storage, by the requested route.
    Bypass,
    /// Copy chunks that are fully cached from the page cache, and read the rest from storage.
    /// Checking what is cached adds very little to the cache (at most 1 % of a file).
    ///
    /// Only on file systems where every change to cached bytes shows in the file's modification
    /// time: ext4, xfs, btrfs, and read-only ones (erofs, iso9660). Never on FUSE, overlayfs and
    /// network file systems, whose cache may be stale, nor on tmpfs.
    #[default]
    Auto,
}

impl Cache {
    /// The name used on the command line.
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
    /// The duration of the load.
    #[default]
    Speed,
    /// CPU time: direct reads, which copy nothing, without measuring.
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

/// Which loads go first when several are running.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Priority {
    /// Runs only when no other load has anything to do.
    Low,
    /// Takes turns with other loads.
    #[default]
    Normal,
    /// Runs before other loads.
    High,
}

impl Priority {
    /// Every priority, highest first.
    pub(crate) const DOWN: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];
}

/// One rank's part of a model; see [`crate::LoadOptions::shard`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which part, counted from 0.
    pub rank: u32,
    /// Number of parts.
    pub world_size: u32,
    /// The dimension along which each tensor is cut, counted from the outermost; `None` cuts the
    /// bytes of each file.
    pub dim: Option<usize>,
}

/// What an importer of segments (a driver, an NPU, a codec) can map. See
/// [`crate::LoadOptions::importer`]. The default sets no limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImporterLimits {
    /// The largest dma-buf that it accepts.
    pub max_segment_bytes: u64,
    /// The maximum number of dma-bufs for a model. Small files and small spans of tensors share
    /// them.
    pub max_segments: usize,
    /// Alignment of a tensor in its dma-buf: a power of two, at most 1 GiB. Requires
    /// [`Layout::Tensors`]. A direct read preserves a byte's position within a block (4 KiB, for
    /// example), so a tensor that is less aligned in its file is read elsewhere and copied into
    /// place, which [`crate::Report::copied_bytes`] counts. With an alignment larger than a block,
    /// every tensor has its own dma-buf.
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
