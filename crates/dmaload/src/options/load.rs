//! What can be chosen for one load.

use std::ops::Range;
use std::sync::Arc;

use super::choices::{Cache, Format, ImporterLimits, Layout, Prefer, Priority, Shard};
use super::observer::{Observer, ObserverOption, Verify, VerifyOption};
use crate::route::Route;
use crate::support::foreign::Foreign;

/// How one load is done: which bytes, into which memory, by which route, and how they are verified.
///
/// Given to one load by [`LoadRequest::options`](crate::LoadRequest::options), and to all loads of a
/// loader that are given none by [`LoaderBuilder::load_options`](crate::LoaderBuilder::load_options).
///
/// ```
/// use dmaload::{Layout, LoadOptions};
///
/// let options = LoadOptions::new().layout(Layout::Single).strict(true);
/// ```
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
    /// The default of [`Self::segment_bytes`], where nothing asks for less: 64 MiB.
    pub const SEGMENT_BYTES: u64 = 64 << 20;
    /// The default of [`Self::chunk_bytes`]: 2 MiB.
    pub const CHUNK_BYTES: u64 = 2 << 20;

    /// The defaults: everything is read, into segments of [`Self::SEGMENT_BYTES`], by the route that turns
    /// out to be the fastest. What the kernel refuses is replaced by the next best, and the report says so.
    pub fn new() -> Self {
        LoadOptions::default()
    }

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

    /// The size of a segment: a multiple of 2 MiB, at most 1 GiB, and at most the loader's window. Smaller
    /// ones are usable earlier, and each has a descriptor of its own; larger ones need fewer.
    ///
    /// Default: [`Self::SEGMENT_BYTES`], 64 MiB, or what the heap takes where that is less (a size that was
    /// asked for is never made smaller); on dma-heaps, whose memory comes at once, an eighth of the window.
    /// Larger where there are too few descriptors for that, and smaller under a limit of memory. With
    /// [`Layout::Single`] it bounds nothing but the check against the window.
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
        self.segment_bytes.unwrap_or_else(|| {
            limit_bytes.map_or(LoadOptions::SEGMENT_BYTES, |limit| fits(limit).min(LoadOptions::SEGMENT_BYTES))
        })
    }

    /// The size of one read: a multiple of 64 KiB, at most 1 GiB. At most
    /// [`queue_depth`](crate::LoaderBuilder::queue_depth) of them are in flight. Smaller ones cost more
    /// system calls; on larger ones a short read or a bad block repeats more. Default:
    /// [`Self::CHUNK_BYTES`], 2 MiB.
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

/// One registered buffer holds at most this much before Linux 7.
pub(crate) const LARGEST_SEGMENT_BYTES: u64 = 1 << 30;

pub(crate) const MIB: u64 = 1 << 20;

/// What a load is told to read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Select {
    pub(crate) tensors: Option<Vec<String>>,
    /// Whether these are names, and not patterns.
    pub(crate) by_name: bool,
    pub(crate) range: Option<Range<u64>>,
    pub(crate) shard: Option<Shard>,
}

impl Select {
    /// Whether anything but whole files is read.
    pub(crate) fn is_partial(&self) -> bool {
        *self != Select::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_load_takes_from_cache_only_if_asked_to() {
        let takes = |options: LoadOptions| options.takes_cached();
        let options = LoadOptions::default;
        assert!(takes(options()) && !takes(options().strict(true)));
        assert!(takes(options().strict(true).cache(Cache::Auto)));
        assert!(!takes(options().cache(Cache::Bypass)));
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
