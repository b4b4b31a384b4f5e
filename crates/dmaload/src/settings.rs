//! What a loader and a load can be told.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::loader::LoaderBuilder;
use crate::observe::{Observer, ObserverOption, Verify, VerifyOption};
use crate::pace::{self, FIRST, Pace, most_allocators, most_copiers};
use crate::plan::select::{Select, Shard};
use crate::plan::{BATCH_BYTES, Layout};
use crate::ring::StagingBudget;
use crate::route::Route;
use crate::support::convert::to_usize;
use crate::support::foreign::Foreign;

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
        [Format::Auto, Format::Safetensors, Format::Gguf, Format::Raw]
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| format!("no such format: {name:?}; the formats are auto, safetensors, gguf, raw"))
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
        [Cache::Bypass, Cache::Auto]
            .into_iter()
            .find(|cache| cache.name() == name)
            .ok_or_else(|| format!("no such choice: {name:?}; the choices are bypass, auto"))
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

impl std::str::FromStr for Prefer {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "speed" => Ok(Prefer::Speed),
            "cpu" => Ok(Prefer::Cpu),
            _ => Err(format!("no such preference: {name:?}; there are speed and cpu")),
        }
    }
}

/// Which loads go first where several are under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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

/// What can be chosen for each load; the loader's builder sets what holds for those that choose nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    pub(crate) layout: Layout,
    /// `None` leaves the choice to us.
    pub(crate) segment_bytes: Option<u64>,
    pub(crate) packed: bool,
    pub(crate) chunk_bytes: u64,
    /// `None` leaves the choice to us.
    pub(crate) route: Option<Route>,
    pub(crate) prefer: Prefer,
    pub(crate) strict: bool,
    pub(crate) format: Format,
    pub(crate) trace: bool,
    /// `None`: [`Cache::Auto`], except of a strict load.
    pub(crate) cache: Option<Cache>,
    pub(crate) verify: Option<VerifyOption>,
    pub(crate) observer: Option<ObserverOption>,
    pub(crate) select: Select,
    pub(crate) importer: ImporterLimits,
    pub(crate) priority: Priority,
    pub(crate) allow_missing: bool,
    pub(crate) as_one_file: bool,
}

/// What an importer of segments can map: a driver, an NPU, a codec. See [`LoadOptions::importer`]. All of it is unlimited by
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

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            layout: Layout::Segmented,
            segment_bytes: None,
            packed: true,
            chunk_bytes: 2 << 20,
            route: None,
            prefer: Prefer::Speed,
            strict: false,
            format: Format::Auto,
            trace: false,
            cache: None,
            verify: None,
            observer: None,
            select: Select::default(),
            importer: ImporterLimits::default(),
            priority: Priority::Normal,
            allow_missing: false,
            as_one_file: false,
        }
    }
}

impl LoadOptions {
    /// Reads these tensors only: by their names, or by patterns (`model.layers.{0..3}.*`: `*` is any text, `?` any character,
    /// `{a,b}` one of several, `{0..3}` one of these numbers). They come in the order of the patterns, and in file order where one
    /// pattern means several. A pattern that no file has a tensor for is an error. Default: everything.
    ///
    /// What lies between two tensors is read along where that is little, and so are the blocks at their ends: the report says how
    /// much was wanted ([`crate::Report::wanted_bytes`]) and how much was read. What is read of a file can't be verified or
    /// observed: that takes all of it.
    #[must_use]
    pub fn tensors<T: Into<String>>(mut self, patterns: impl IntoIterator<Item = T>) -> Self {
        self.select.tensors = Some(patterns.into_iter().map(Into::into).collect());
        self.select.by_name = false;
        self
    }

    /// The same by names as they are, which may have characters of patterns in them: `layers[0].w`, `a*b`.
    #[must_use]
    pub fn tensor_names<T: Into<String>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self = self.tensors(names);
        self.select.by_name = true;
        self
    }

    /// Loads what is there of models of which files are missing, or have no bytes, rather than failing with
    /// [`crate::Error::Incomplete`]; the report notes what is missing. Default: false.
    #[must_use]
    pub fn allow_missing(mut self, allow: bool) -> Self {
        self.allow_missing = allow;
        self
    }

    /// Takes the path of a file for that one file, whatever it is a part of: a part of a split GGUF model comes without the
    /// others, and an index is JSON. Default: false.
    #[must_use]
    pub fn as_one_file(mut self, alone: bool) -> Self {
        self.as_one_file = alone;
        self
    }

    /// Reads this range of each file's bytes only, taken out to whole blocks, and looks for no header. Default: everything.
    #[must_use]
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.select.range = Some(range);
        self
    }

    /// Reads one rank's part only: of each tensor (of those of [`Self::tensors`] where that is set), or of each file's bytes. What
    /// can't be divided evenly is cut so that the parts differ by one; a tensor without the dimension belongs to every rank.
    /// Default: everything.
    ///
    /// Along dimension 0 a part is contiguous, and as good as a tensor of its own. Along others its rows are apart in the file:
    /// see [`crate::Tensor::to_vec`].
    #[must_use]
    pub fn shard(mut self, shard: Shard) -> Self {
        self.select.shard = Some(shard);
        self
    }

    /// Which loads of a loader go first: memory is allocated for theirs before that of others. Default: [`Priority::Normal`].
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// What the importer of the segments can map. Default: anything.
    #[must_use]
    pub fn importer(mut self, limits: ImporterLimits) -> Self {
        self.importer = limits;
        self
    }

    /// How files are spread over segments. Default: [`Layout::Segmented`].
    #[must_use]
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// The size of a segment: a multiple of 2 MiB, at most 1 GiB. Default: 64 MiB, or what the heap takes where that is
    /// less (a size that was asked for is never made smaller); on dma-heaps, whose memory comes at once, an eighth of the window. With [`Layout::Single`] it bounds nothing but the check
    /// against the window.
    #[must_use]
    pub fn segment_bytes(mut self, bytes: u64) -> Self {
        self.segment_bytes = Some(bytes);
        self
    }

    /// Whether small files that follow one another share memory, with [`Layout::Segmented`]: those of up to a quarter of a
    /// segment, each at a multiple of the page size. A thousand of them then cost a few allocations and descriptors, and can
    /// have huge pages. Whoever is given the dma-buf or memfd of one has all that are in it. Default: true.
    #[must_use]
    pub fn packed(mut self, packed: bool) -> Self {
        self.packed = packed;
        self
    }

    /// The size of a segment on a heap that takes segments up to this size.
    pub(crate) fn segment_bytes_within(&self, limit_bytes: Option<u64>) -> u64 {
        let own = Some(self.importer.max_segment_bytes).filter(|&most| most < u64::MAX);
        let limit_bytes = limit_bytes.into_iter().chain(own).min();
        // Below a huge page any whole page will do: a MiB is the unit of the one limit there is.
        let step = |limit: u64| if limit < SEGMENT_STEP_BYTES { MIB } else { SEGMENT_STEP_BYTES };
        let fits = |limit: u64| (limit / step(limit) * step(limit)).max(MIB);
        self.segment_bytes
            .unwrap_or_else(|| limit_bytes.map_or(DEFAULT_SEGMENT_BYTES, |limit| fits(limit).min(DEFAULT_SEGMENT_BYTES)))
    }

    /// The size of one read: a multiple of 64 KiB, at most 1 GiB. Default: 2 MiB.
    #[must_use]
    pub fn chunk_bytes(mut self, bytes: u64) -> Self {
        self.chunk_bytes = bytes;
        self
    }

    /// The route to start at. Default: whichever is faster of direct reads by the best route, and of
    /// staged ones ([`Route::Bounce`]).
    ///
    /// Which that is depends on the machine, so a load of 512 MiB or more tries both on parts of itself, and
    /// goes on with the faster one; later loads of the loader from the same file system take that, and
    /// look again now and then ([`crate::Report::measured`]). Smaller ones, before anything was measured,
    /// take staged reads on small pages and direct ones on large pages.
    #[must_use]
    pub fn route(mut self, route: Route) -> Self {
        self.route = Some(route);
        self
    }

    /// What matters where the route is left open. Default: [`Prefer::Speed`].
    #[must_use]
    pub fn prefer(mut self, prefer: Prefer) -> Self {
        self.prefer = prefer;
        self
    }

    /// Fail rather than take another route than the one to start at. Default: false.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Record what is done when, for [`crate::Report::trace`]: an event of 56 bytes for each read. Default: false.
    #[must_use]
    pub fn trace(mut self, trace: bool) -> Self {
        self.trace = trace;
        self
    }

    /// Whether what the page cache has is copied from there. Default: [`Cache::Auto`]; of a load that is [strict](Self::strict),
    /// [`Cache::Bypass`].
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = Some(cache);
        self
    }

    /// Whether chunks are taken from the page cache.
    pub(crate) fn takes_cached(&self) -> bool {
        match self.cache {
            Some(cache) => cache == Cache::Auto,
            None => !self.strict,
        }
    }

    /// What the files are to be: a manifest, or the checksum of the one file (module and feature `verify`). A load whose
    /// files are something else fails with [`crate::Error::Corrupt`], [`crate::Error::WrongLength`] or
    /// [`crate::Error::NotInManifest`], and shows no segment that was not verified. Default: nothing is known of them.
    ///
    /// Bytes are looked at as by an [observer](Self::observer), before it.
    #[must_use]
    pub fn verify(mut self, expected: impl Verify) -> Self {
        self.verify = Some(VerifyOption(Foreign::new(Arc::new(expected))));
        self
    }

    /// Something that sees every byte before its segment is shown, to compute a checksum or to verify it. Default: none.
    ///
    /// On a heap that the CPU reads without its caches every read then goes into staging, where the bytes are cheap to look at:
    /// the load takes the route [`Route::Bounce`], and a strict load must have asked for it.
    #[must_use]
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = Some(ObserverOption::new(observer));
        self
    }

    /// What the files' bytes are taken for. Default: [`Format::Auto`].
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }
}

/// A segment is a whole number of huge pages, so that no 2 MiB extent is shared by two.
pub(crate) const SEGMENT_STEP_BYTES: u64 = 2 << 20;
/// What fits into the caches of today's processors, is a huge page, and is a default chunk.
const STAGING_SLOT_BYTES: u64 = 2 << 20;
/// One registered buffer holds at most this much before Linux 7.
pub(crate) const LARGEST_SEGMENT_BYTES: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const DEFAULT_SEGMENT_BYTES: u64 = 64 << 20;
const CHUNK_STEP_BYTES: u64 = 64 << 10;

/// What holds for a whole loader.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) window_bytes: u64,
    pub(crate) queue_depth: usize,
    pub(crate) staging_bytes: u64,
    /// Somebody has chosen the staging, which does not grow then.
    pub(crate) staging_is_chosen: bool,
    pub(crate) pool_bytes: u64,
    /// `u64::MAX` for no limit.
    pub(crate) memory_limit_bytes: u64,
    /// At the start.
    pub(crate) allocator_threads: usize,
    /// Somebody has chosen them: there are never more.
    pub(crate) allocators_are_chosen: bool,
    /// Processors to count on.
    pub(crate) cores: usize,
    pub(crate) max_open_loads: usize,
    pub(crate) shutdown_timeout: Duration,
    pub(crate) load: LoadOptions,
}

impl Default for Settings {
    fn default() -> Self {
        Settings::for_cores(pace::cores())
    }
}

impl Settings {
    /// The defaults on a machine of so many processors.
    pub(crate) fn for_cores(cores: usize) -> Self {
        Settings {
            window_bytes: LoaderBuilder::WINDOW_BYTES,
            queue_depth: LoaderBuilder::QUEUE_DEPTH,
            staging_bytes: LoaderBuilder::STAGING_BYTES,
            staging_is_chosen: false,
            pool_bytes: 0,
            memory_limit_bytes: u64::MAX,
            allocator_threads: cores.min(FIRST),
            allocators_are_chosen: false,
            cores,
            max_open_loads: 64,
            shutdown_timeout: Duration::from_secs(10),
            load: LoadOptions::default(),
        }
    }

    /// The pace of threads that copy.
    pub(crate) fn copiers(&self) -> Pace {
        Pace::new(FIRST, most_copiers(self.cores))
    }

    /// The pace of threads that allocate.
    pub(crate) fn allocators(&self) -> Pace {
        let first = self.allocator_threads.max(1);
        Pace::new(first, if self.allocators_are_chosen { first } else { most_allocators(self.cores) })
    }

    /// Whether staging grows with the threads that copy.
    pub(crate) fn staging_grows(&self) -> bool {
        !self.staging_is_chosen
    }

    /// How much memory one allocator brings into being at once. Less where more than [`FIRST`] may do that side by side:
    /// what they are at is a part of the window, and has to leave room for reads.
    pub(crate) fn batch_bytes(&self) -> u64 {
        if self.allocators().most() > FIRST { BATCH_BYTES * 3 / 8 } else { BATCH_BYTES }
    }

    pub(crate) fn check(&self, load: &LoadOptions) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(text));
        let (segment_bytes, chunk_bytes) = (load.segment_bytes_within(None), load.chunk_bytes);
        if segment_bytes == 0
            || load.segment_bytes.is_some() && segment_bytes % SEGMENT_STEP_BYTES != 0
            || segment_bytes > LARGEST_SEGMENT_BYTES
        {
            return wrong(format!("the segment size must be a multiple of 2 MiB and at most 1 GiB, not {segment_bytes} bytes"));
        }
        if chunk_bytes == 0 || chunk_bytes % CHUNK_STEP_BYTES != 0 || chunk_bytes > LARGEST_SEGMENT_BYTES {
            return wrong(format!("the chunk size must be a multiple of 64 KiB and at most 1 GiB, not {chunk_bytes} bytes"));
        }
        let most = load.importer.max_segment_bytes;
        if load.segment_bytes.is_some_and(|bytes| bytes > most) || most < MIB {
            return wrong(format!(
                "segments of {segment_bytes} bytes for an importer that takes {most}: it must take a MiB, and all"
            ));
        }
        let alignment = load.importer.alignment_bytes;
        if !alignment.is_power_of_two() || alignment > LARGEST_SEGMENT_BYTES || alignment > 1 && load.layout != Layout::Tensors {
            return wrong(format!(
                "an alignment of {alignment} bytes: a power of two up to 1 GiB, and the layout tensors, are needed"
            ));
        }
        let partial = load.select.is_partial() || load.layout == Layout::Tensors;
        if partial && (load.verify.is_some() || load.observer.is_some()) {
            return wrong("a load of parts of files can't be verified or observed: checksums are of whole files".to_owned());
        }
        load.select.check()?;
        if self.memory_limit_bytes < SEGMENT_STEP_BYTES {
            return wrong(format!("a memory limit of {} bytes holds not even a segment of 2 MiB", self.memory_limit_bytes));
        }
        if self.window_bytes < segment_bytes {
            return wrong(format!(
                "the window ({} bytes) is smaller than a segment ({segment_bytes} bytes): nothing could be allocated",
                self.window_bytes
            ));
        }
        if self.queue_depth == 0 || self.queue_depth > 4096 {
            return wrong(format!("the queue depth must be from 1 to 4096, not {}", self.queue_depth));
        }
        if self.staging_bytes < STAGING_SLOT_BYTES || self.staging_bytes > LARGEST_SEGMENT_BYTES {
            return wrong(format!("staging must have from 2 MiB to 1 GiB, not {} bytes", self.staging_bytes));
        }
        Ok(())
    }

    /// The largest segment that leaves room for as many loads as may be open, where memory is limited.
    pub(crate) fn share_bytes(&self) -> Option<u64> {
        let share = self.memory_limit_bytes / self.max_open_loads as u64 / SEGMENT_STEP_BYTES * SEGMENT_STEP_BYTES;
        (self.memory_limit_bytes < u64::MAX).then_some(share.max(SEGMENT_STEP_BYTES))
    }

    /// The staging budget in slots.
    pub(crate) fn staging(&self) -> StagingBudget {
        StagingBudget { slot_bytes: to_usize(STAGING_SLOT_BYTES), slots: to_usize(self.staging_bytes / STAGING_SLOT_BYTES) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_allowed() {
        let settings = Settings::default();
        settings.check(&settings.load).unwrap();
    }

    #[test]
    fn strict_load_takes_from_cache_only_if_asked_to() {
        let takes = |options: LoadOptions| options.takes_cached();
        let options = LoadOptions::default;
        assert!(takes(options()) && !takes(options().strict(true)));
        assert!(takes(options().strict(true).cache(Cache::Auto)));
        assert!(!takes(options().cache(Cache::Bypass)));
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        let settings = Settings::default();
        let says = |settings: &Settings, load: LoadOptions| settings.check(&load).unwrap_err().to_string();
        let load = LoadOptions::default;
        assert!(says(&settings, load().segment_bytes(3 << 20)).contains("multiple of 2 MiB"));
        assert!(says(&settings, load().segment_bytes(0)).contains("multiple of 2 MiB"));
        assert!(says(&settings, load().segment_bytes(2 << 30)).contains("at most 1 GiB"));
        assert!(says(&settings, load().chunk_bytes(4096)).contains("multiple of 64 KiB"));
        assert!(says(&settings, load().segment_bytes(256 << 20)).contains("smaller than a segment"));
        assert!(says(&Settings { queue_depth: 0, ..settings.clone() }, load()).contains("queue depth"));
        assert!(says(&Settings { staging_bytes: 1 << 20, ..settings }, load()).contains("staging"));
    }

    #[test]
    fn a_size_that_was_left_open_fits_the_heap_and_one_that_was_chosen_stays() {
        let open = LoadOptions::default();
        assert_eq!(open.segment_bytes_within(None), 64 << 20);
        assert_eq!(open.segment_bytes_within(Some(100 << 20)), 64 << 20);
        assert_eq!(open.segment_bytes_within(Some(9 << 20)), 8 << 20);
        assert_eq!(open.segment_bytes_within(Some(1 << 20)), 1 << 20);
        assert_eq!(open.segment_bytes(32 << 20).segment_bytes_within(Some(9 << 20)), 32 << 20);
    }
}
