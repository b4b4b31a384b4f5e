//! The options of one load.

use std::ops::Range;
use std::sync::Arc;

use super::choices::{Cache, Format, ImporterLimits, Layout, Prefer, Priority, Shard};
use super::observer::{Observer, ObserverOption, Verify, VerifyOption};
use crate::route::Route;
use crate::support::foreign::Foreign;

/// How to do one load: which bytes to read, how to divide them into segments, by which route to
/// read them, and how to verify them.
///
/// Set for one load by [`LoadRequest::options`](crate::LoadRequest::options), and for all loads
/// without their own options by
/// [`LoaderBuilder::load_options`](crate::LoaderBuilder::load_options).
///
/// ```
/// use dmaload::{Layout, LoadOptions};
///
/// let options = LoadOptions::new().layout(Layout::Single).strict(true);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    pub(crate) layout: Layout,
    /// `None`: the loader chooses.
    pub(crate) segment_bytes: Option<u64>,
    pub(crate) packed: bool,
    pub(crate) chunk_bytes: u64,
    /// `None`: the loader chooses.
    pub(crate) route: Option<Route>,
    pub(crate) prefer: Prefer,
    pub(crate) strict: bool,
    pub(crate) format: Format,
    pub(crate) trace: bool,
    /// `None`: [`Cache::Auto`], or [`Cache::Bypass`] for a strict load.
    pub(crate) cache: Option<Cache>,
    pub(crate) verify: Option<VerifyOption>,
    pub(crate) observer: Option<ObserverOption>,
    pub(crate) select: Select,
    pub(crate) importer: ImporterLimits,
    pub(crate) priority: Priority,
    pub(crate) allow_missing: bool,
    pub(crate) as_one_file: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            layout: Layout::Segmented,
            segment_bytes: None,
            packed: true,
            chunk_bytes: LoadOptions::CHUNK_BYTES,
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
    /// The default of [`Self::segment_bytes`]: 64 MiB, unless a limit requires another size.
    pub const SEGMENT_BYTES: u64 = 64 << 20;
    /// The default of [`Self::chunk_bytes`]: 2 MiB.
    pub const CHUNK_BYTES: u64 = 2 << 20;

    /// Returns the defaults: everything is read, into segments of [`Self::SEGMENT_BYTES`], by the
    /// fastest route. If the kernel refuses a route, the load steps down to a lower one and
    /// reports that.
    pub fn new() -> Self {
        LoadOptions::default()
    }

    /// Reads only these tensors, given by name or pattern (`model.layers.{0..3}.*`: `*` matches
    /// any text, `?` any character, `{a,b}` either alternative, `{0..3}` a number from 0 to 3).
    /// The tensors arrive in the order of the patterns, and in file order where one pattern
    /// matches several. A pattern that matches no tensor in any file is an error. Default:
    /// everything.
    ///
    /// Small gaps between tensors are read too, and so is the rest of the blocks in which tensors
    /// begin and end. The report says how much was wanted ([`crate::Report::wanted_bytes`]) and
    /// how much was read. A load of selected tensors can't be verified or observed, because both
    /// need all bytes of each file.
    #[must_use]
    pub fn tensors<T: Into<String>>(mut self, patterns: impl IntoIterator<Item = T>) -> Self {
        self.select.tensors = Some(patterns.into_iter().map(Into::into).collect());
        self.select.by_name = false;
        self
    }

    /// Like [`Self::tensors`], but takes literal names, which may contain pattern characters:
    /// `layers[0].w`, `a*b`.
    #[must_use]
    pub fn tensor_names<T: Into<String>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self = self.tensors(names);
        self.select.by_name = true;
        self
    }

    /// Loads what exists of models with missing or empty files, rather than failing with
    /// [`crate::Error::Incomplete`]. The report notes what is missing. Default: false.
    #[must_use]
    pub fn allow_missing(mut self, allow: bool) -> Self {
        self.allow_missing = allow;
        self
    }

    /// Treats a path to a file as just that file, even if it belongs to a larger model: a part of
    /// a split GGUF model loads without the others, and an index loads as raw bytes. Default:
    /// false.
    #[must_use]
    pub fn as_one_file(mut self, alone: bool) -> Self {
        self.as_one_file = alone;
        self
    }

    /// Reads only this byte range of each file, extended to whole blocks, without looking for a
    /// header. Can't be combined with [`Self::tensors`] or [`Self::shard`]. Default: everything.
    #[must_use]
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.select.range = Some(range);
        self
    }

    /// Reads only one rank's share: of each tensor (of those selected by [`Self::tensors`], if
    /// set), or of each file's bytes. If the length of a dimension does not divide evenly, the
    /// shares differ by at most one element of that dimension. A tensor without the dimension
    /// belongs to every rank. Files are cut at block boundaries. Default: everything.
    ///
    /// Along dimension 0, a share is contiguous and behaves like a whole tensor. Along other
    /// dimensions, its rows are scattered in the file: see [`crate::Tensor::to_vec`].
    #[must_use]
    pub fn shard(mut self, shard: Shard) -> Self {
        self.select.shard = Some(shard);
        self
    }

    /// Which loads of a loader go first: memory is allocated for loads of higher priority before
    /// it is allocated for others. Default: [`Priority::Normal`].
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// What the importer of the segments can map. Default: no limits.
    #[must_use]
    pub fn importer(mut self, limits: ImporterLimits) -> Self {
        self.importer = limits;
        self
    }

    /// How files are divided into segments. Default: [`Layout::Segmented`].
    #[must_use]
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// The size of a segment: a multiple of 2 MiB, at most 1 GiB, and at most the loader's window.
    /// Smaller segments are usable earlier. Larger ones need fewer descriptors, since each
    /// allocation has its own.
    ///
    /// Default: [`Self::SEGMENT_BYTES`], 64 MiB. The default is less if the heap or the importer
    /// accepts only smaller segments, if memory is limited, and on dma-heaps, which allocate all
    /// of a segment at once: there it is at most an eighth of the window. For a load that keeps
    /// all its segments (one that is awaited as an image), it is more if too few descriptors are
    /// available. A size that was set is never changed. With [`Layout::Single`], this size does
    /// not determine the size of segments, but must still be valid.
    #[must_use]
    pub fn segment_bytes(mut self, bytes: u64) -> Self {
        self.segment_bytes = Some(bytes);
        self
    }

    /// Whether consecutive small files share memory: files of up to a quarter of a segment, each
    /// at a multiple of at least the page size. A thousand of them then need only a few
    /// allocations and descriptors, and can have huge pages. The dma-buf or memfd of such a file
    /// contains all files that share it. Has no effect with [`Layout::Single`], or if the
    /// [importer](Self::importer) requires an alignment of more than a page. Default: true.
    #[must_use]
    pub fn packed(mut self, packed: bool) -> Self {
        self.packed = packed;
        self
    }

    /// The segment size if the heap and the loader's settings allow segments of up to
    /// `limit_bytes`; `None` stands for no limit.
    pub(crate) fn segment_bytes_within(&self, limit_bytes: Option<u64>) -> u64 {
        let own = Some(self.importer.max_segment_bytes).filter(|&most| most < u64::MAX);
        let limit_bytes = limit_bytes.into_iter().chain(own).min();
        // Below the size of a huge page, any whole number of pages would do. Whole MiB suffice:
        // the limit of udmabuf is stated in MiB.
        let step = |limit: u64| if limit < SEGMENT_STEP_BYTES { MIB } else { SEGMENT_STEP_BYTES };
        let fits = |limit: u64| (limit / step(limit) * step(limit)).max(MIB);
        self.segment_bytes.unwrap_or_else(|| {
            limit_bytes.map_or(LoadOptions::SEGMENT_BYTES, |limit| fits(limit).min(LoadOptions::SEGMENT_BYTES))
        })
    }

    /// The size of one read: a multiple of 64 KiB, at most 1 GiB. At most
    /// [`queue_depth`](crate::LoaderBuilder::queue_depth) reads are in flight. Smaller reads cost
    /// more system calls. With larger reads, more is read again after a failed read. Default:
    /// [`Self::CHUNK_BYTES`], 2 MiB.
    #[must_use]
    pub fn chunk_bytes(mut self, bytes: u64) -> Self {
        self.chunk_bytes = bytes;
        self
    }

    /// The route to start at. Default: the fastest of direct reads by the best route, staged reads
    /// ([`Route::Bounce`]), and, on some network file systems, reads by [`Route::UringBuffered`].
    /// For files in memory (tmpfs, DAX), whose direct reads are copies, the default is
    /// [`Route::PreadDirect`].
    ///
    /// Which way is fastest depends on the machine, so a load of 512 MiB or more measures each way
    /// on some of its bytes and continues with the fastest one. Later loads of the loader from the
    /// same file system use that result and measure again from time to time
    /// ([`crate::Report::measured`]). Until something has been measured, smaller loads use staged
    /// reads if the file system is local and the memory is on small pages, and otherwise direct
    /// reads. A load from several file systems, or on a heap that populates memory when it
    /// allocates it (such as a dma-heap), measures nothing.
    #[must_use]
    pub fn route(mut self, route: Route) -> Self {
        self.route = Some(route);
        self
    }

    /// What to optimize for if no route is set. Default: [`Prefer::Speed`].
    #[must_use]
    pub fn prefer(mut self, prefer: Prefer) -> Self {
        self.prefer = prefer;
        self
    }

    /// Fails rather than step down from the starting route. Default: false.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Records a timeline for [`crate::Report::trace`]: a [`crate::TraceEvent`] for each
    /// allocation, read, copy and other step. Default: false.
    #[must_use]
    pub fn trace(mut self, trace: bool) -> Self {
        self.trace = trace;
        self
    }

    /// Whether bytes that are already in the page cache are copied from there. Default:
    /// [`Cache::Auto`], or [`Cache::Bypass`] for a [strict](Self::strict) load.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = Some(cache);
        self
    }

    /// Whether chunks are copied from the page cache.
    pub(crate) fn takes_cached(&self) -> bool {
        match self.cache {
            Some(cache) => cache == Cache::Auto,
            None => !self.strict,
        }
    }

    /// Sets the expected contents of the files: a manifest, or the checksum of a single file
    /// (module and feature `verify`). A load of files with other contents fails with
    /// [`crate::Error::Corrupt`], [`crate::Error::WrongLength`] or
    /// [`crate::Error::NotInManifest`]. With a manifest, no segment is handed over unverified.
    /// With a single checksum, all segments of the file but the last are handed over before the
    /// result is known. Default: no verification.
    ///
    /// The verifier sees the same bytes as the load's [observer](Self::observer), and sees them
    /// first. Because checksums cover whole files, neither can be combined with [`Self::tensors`],
    /// [`Self::range`], [`Self::shard`], [`Layout::Tensors`] or a model inside another file.
    #[must_use]
    pub fn verify(mut self, expected: impl Verify) -> Self {
        self.verify = Some(VerifyOption(Foreign::new(Arc::new(expected))));
        self
    }

    /// Sets an observer, which sees every byte before its segment is handed over, for example to
    /// compute a checksum. Requires that whole files are read, as [`Self::verify`] does. Default:
    /// none.
    ///
    /// On a heap that the CPU reads uncached, every read then goes into staging, where the CPU
    /// reads the bytes quickly. The load takes the route [`Route::Bounce`] or a lower one, which a
    /// strict load must request.
    #[must_use]
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observer = Some(ObserverOption::new(Arc::new(observer)));
        self
    }

    /// How to interpret the files' bytes. Default: [`Format::Auto`].
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }
}

/// The unit of segment sizes: a huge page, so two segments never share one. Segments are smaller
/// only if the heap or the importer accepts less.
pub(crate) const SEGMENT_STEP_BYTES: u64 = 2 << 20;

/// The maximum of [`LoadOptions::segment_bytes`]: the size limit of one registered buffer before
/// Linux 7.
pub(crate) const LARGEST_SEGMENT_BYTES: u64 = 1 << 30;

pub(crate) const MIB: u64 = 1 << 20;

/// What a load reads of its files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Select {
    pub(crate) tensors: Option<Vec<String>>,
    /// Whether `tensors` are literal names rather than patterns.
    pub(crate) by_name: bool,
    pub(crate) range: Option<Range<u64>>,
    pub(crate) shard: Option<Shard>,
}

impl Select {
    /// Whether anything less than whole files is read.
    pub(crate) fn is_partial(&self) -> bool {
        *self != Select::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_load_uses_the_cache_only_if_requested() {
        let takes = |options: LoadOptions| options.takes_cached();
        let options = LoadOptions::default;
        assert!(takes(options()) && !takes(options().strict(true)));
        assert!(takes(options().strict(true).cache(Cache::Auto)));
        assert!(!takes(options().cache(Cache::Bypass)));
    }

    #[test]
    fn default_segment_size_adapts_but_an_explicit_one_does_not() {
        let open = LoadOptions::default();
        assert_eq!(open.segment_bytes_within(None), 64 << 20);
        assert_eq!(open.segment_bytes_within(Some(100 << 20)), 64 << 20);
        assert_eq!(open.segment_bytes_within(Some(9 << 20)), 8 << 20);
        assert_eq!(open.segment_bytes_within(Some(1 << 20)), 1 << 20);
        assert_eq!(open.segment_bytes(32 << 20).segment_bytes_within(Some(9 << 20)), 32 << 20);
    }
}
