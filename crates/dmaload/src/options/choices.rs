//! The choices that a load has, one type for each.

use crate::support::names;

/// How a file is spread over segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// Segments of the configured size, each with its own memory: the first is usable while the rest is read.
    #[default]
    Segmented,
    /// One segment for the whole file. Still filled piece by piece while the rest is being populated.
    Single,
    /// As segmented, but cut between tensors: each is in one segment, a larger one where it must be, unless it is more than the
    /// importer, the heap or the memory limit allows. Two segments that
    /// are next to each other in a file both have the block that one tensor ends and the next one begins in. A file without
    /// tensors is segmented.
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

/// What a path's bytes are taken for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// safetensors or GGUF where the file looks like it, else raw bytes. A folder is taken for a model of several files.
    #[default]
    Auto,
    /// safetensors, or an error.
    Safetensors,
    /// GGUF, or an error.
    Gguf,
    /// Bytes; no header is looked for.
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

/// What is made of what the page cache has of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cache {
    /// Nothing: all is read from storage, by the route that was asked for.
    Bypass,
    /// Chunks that are wholly in the page cache are copied from there, and the rest is read from storage. Asking what is cached
    /// fills the cache with next to nothing (at most 1 % of a file).
    ///
    /// Only on file systems on which every change of such bytes shows in the file's time of modification: ext4, xfs, btrfs, and
    /// those that can't be written to (erofs, iso9660). Never from FUSE, overlayfs, network file systems, whose cache may be
    /// stale, and tmpfs.
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

/// What matters when a way to read is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefer {
    /// The time that a load takes.
    #[default]
    Speed,
    /// The processor's time: direct reads, which copy nothing, without measuring.
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

/// Which loads go first where several are under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Priority {
    /// When no other load has anything to do.
    Low,
    /// In turn with others.
    #[default]
    Normal,
    /// Before others.
    High,
}

impl Priority {
    /// All, the first first.
    pub(crate) const DOWN: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];
}

/// One rank's part of a model; see [`crate::LoadOptions::shard`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which part, from 0 on.
    pub rank: u32,
    /// Into how many parts.
    pub world_size: u32,
    /// The dimension that each tensor is cut along, outermost first; `None` cuts the bytes of each file.
    pub dim: Option<usize>,
}

/// What an importer of segments can map: a driver, an NPU, a codec. See [`crate::LoadOptions::importer`]. All of it is unlimited by
/// default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImporterLimits {
    /// The largest dma-buf that it takes.
    pub max_segment_bytes: u64,
    /// The most dma-bufs that it takes for a model. Small files and small spans of tensors share some.
    pub max_segments: usize,
    /// What a tensor's place in its dma-buf must be a multiple of: a power of two, up to 1 GiB. Takes [`Layout::Tensors`]. A direct read
    /// puts bytes where they are in the file, modulo its blocks of 4 KiB, say: a tensor that is not as well aligned in its file is
    /// read beside its place and copied there, which [`crate::Report::copied_bytes`] counts. Beyond the blocks every tensor has a
    /// dma-buf of its own.
    pub alignment_bytes: u64,
    /// Whether tensors may be copied for that. Otherwise a load that would have to fails with [`crate::Error::Unaligned`].
    pub may_copy: bool,
}

impl Default for ImporterLimits {
    fn default() -> Self {
        ImporterLimits { max_segment_bytes: u64::MAX, max_segments: usize::MAX, alignment_bytes: 1, may_copy: true }
    }
}
