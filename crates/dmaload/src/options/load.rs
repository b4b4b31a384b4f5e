//! The options of one load.

use std::ops::Range;
use std::sync::Arc;

use super::choices::{Cache, Format, ImporterLimits, Layout, Prefer, Priority, Shard};
use super::observer::{Observer, ObserverOption, Verify, VerifyOption};
use crate::route::Route;
use crate::support::foreign::Foreign;

/// The options of a load: which bytes to read, how to divide them into segments, which route to
/// read them through, and how to verify them.
///
/// [`LoadRequest::options`](crate::LoadRequest::options) sets them for one load, and
/// [`LoaderBuilder::load_options`](crate::LoaderBuilder::load_options) for all loads that don't
/// set their own.
///
/// ```
/// use dmaload::{Layout, LoadOptions};
///
/// let options = LoadOptions::new().layout(Layout::Single).strict(true);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    pub(crate) layout: Layout,
    /// `None` lets the loader choose.
    pub(crate) segment_bytes: Option<u64>,
    pub(crate) packed: bool,
    pub(crate) chunk_bytes: u64,
    /// `None` lets the loader choose.
    pub(crate) route: Option<Route>,
    pub(crate) prefer: Prefer,
    pub(crate) strict: bool,
    pub(crate) format: Format,
    pub(crate) trace: bool,
    /// `None` means [`Cache::Auto`], or [`Cache::Bypass`] for a strict load.
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
    /// The default for [`Self::segment_bytes`]: 64 MiB, unless a limit requires another size.
    pub const SEGMENT_BYTES: u64 = 64 << 20;
    /// The default for [`Self::chunk_bytes`]: 2 MiB.
    pub const CHUNK_BYTES: u64 = 2 << 20;

    /// Returns the defaults: everything is read, into segments of [`Self::SEGMENT_BYTES`], through
    /// the fastest route. If the kernel refuses a route, the load falls back to a lower one and
    /// reports the fallback.
    pub fn new() -> Self {
        LoadOptions::default()
    }

    /// Reads only these tensors, given by name or by patterns such as `model.layers.{0..3}.*`. In
    /// a pattern, `*` matches any text, `?` any character, `{a,b}` either alternative, and
    /// `{0..3}` a number from 0 to 3. The tensors arrive in the order of the patterns. If one
    /// pattern matches several tensors, these arrive in file order. A pattern that matches no
    /// tensor in any file is an error. Default: everything.
    ///
    /// Small gaps between tensors are read too, and so is the rest of the blocks in which tensors
    /// begin and end. The report says how many bytes were wanted ([`crate::Report::wanted_bytes`])
    /// and how many were read. A load of selected tensors can't be verified or observed, because
    /// verifiers and observers need all bytes of each file.
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

    /// Sets whether to load a model even if some of its files are missing or empty, rather than
    /// fail with [`crate::Error::Incomplete`]. The report notes what is missing. Default: false.
    #[must_use]
    pub fn allow_missing(mut self, allow: bool) -> Self {
        self.allow_missing = allow;
        self
    }

    /// Sets whether to load only the file at the path, even if that file belongs to a larger
    /// model. If so, a part of a split GGUF model is loaded without the others, and an index is
    /// loaded as raw bytes. Default: false.
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

    /// Reads only one rank's share of each tensor (or of the tensors selected by
    /// [`Self::tensors`]), or of each file's bytes. If the length of a dimension does not divide
    /// evenly, the shares differ by at most one element of that dimension. A tensor without the
    /// dimension belongs to every rank. Files are cut at block boundaries. Default: everything.
    ///
    /// A share along dimension 0 is contiguous and behaves like a whole tensor. The rows of a
    /// share along another dimension are scattered in the file: see [`crate::Tensor::to_vec`].
    #[must_use]
    pub fn shard(mut self, shard: Shard) -> Self {
        self.select.shard = Some(shard);
        self
    }

    /// Sets the load's priority. Memory is allocated for loads with a higher priority before it is
    /// allocated for others. Default: [`Priority::Normal`].
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Sets limits on what the importer of the segments can map. Default: no limits.
    #[must_use]
    pub fn importer(mut self, limits: ImporterLimits) -> Self {
        self.importer = limits;
        self
    }

    /// Sets how files are divided into segments. Default: [`Layout::Segmented`].
    #[must_use]
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Sets the size of a segment: a multiple of 2 MiB, at most 1 GiB, and at most the loader's
    /// window. Smaller segments are usable earlier. Larger ones need fewer descriptors, since each
    /// segment has its own descriptor.
    ///
    /// By default, segments have [`Self::SEGMENT_BYTES`] (64 MiB). They are smaller if the heap or
    /// the importer accepts only smaller segments, or if memory is limited. On dma-heaps, which
    /// allocate a whole segment at once, they have at most an eighth of the window. They are
    /// larger if too few descriptors are available for a load that keeps all its segments, such as
    /// one that is awaited as an image. A size that you set is never adjusted. With
    /// [`Layout::Single`], it has no effect, but must still be valid.
    #[must_use]
    pub fn segment_bytes(mut self, bytes: u64) -> Self {
        self.segment_bytes = Some(bytes);
        self
    }

    /// Sets whether consecutive small files share memory. A file is small if it is no larger than
    /// a quarter of a segment. Each file is still aligned to at least a page. This way, a thousand
    /// small files need only a few allocations and descriptors, and can be backed by huge pages.
    /// The dma-buf or memfd of such a file contains all files that share it. Has no effect with
    /// [`Layout::Single`], or if the [importer](Self::importer) requires an alignment of more than
    /// a page. Default: true.
    #[must_use]
    pub fn packed(mut self, packed: bool) -> Self {
        self.packed = packed;
        self
    }

    /// Returns the segment size for a heap and loader settings that allow segments of up to
    /// `limit_bytes`; `None` means no limit.
    pub(crate) fn segment_bytes_within(&self, limit_bytes: Option<u64>) -> u64 {
        let own = Some(self.importer.max_segment_bytes).filter(|&most| most < u64::MAX);
        let limit_bytes = limit_bytes.into_iter().chain(own).min();
        // Below the size of a huge page, any whole number of pages would do. Whole MiB are precise
        // enough, because udmabuf's limit is in MiB, too.
        let step = |limit: u64| if limit < SEGMENT_STEP_BYTES { MIB } else { SEGMENT_STEP_BYTES };
        let fits = |limit: u64| (limit / step(limit) * step(limit)).max(MIB);
        self.segment_bytes.unwrap_or_else(|| {
            limit_bytes.map_or(LoadOptions::SEGMENT_BYTES, |limit| fits(limit).min(LoadOptions::SEGMENT_BYTES))
        })
    }

    /// Sets the size of one read: a multiple of 64 KiB, at most 1 GiB. At most
    /// [`queue_depth`](crate::LoaderBuilder::queue_depth) reads are in flight. Smaller reads cost
    /// more system calls. If a larger read fails, more bytes have to be read again. Default:
    /// [`Self::CHUNK_BYTES`], 2 MiB.
    #[must_use]
    pub fn chunk_bytes(mut self, bytes: u64) -> Self {
        self.chunk_bytes = bytes;
        self
    }

    /// Sets the route to start with. By default, the load chooses the fastest of up to three ways:
    /// direct reads through the best route, staged reads ([`Route::Bounce`]), and, on some network
    /// file systems, buffered reads ([`Route::UringBuffered`]). For files in memory (tmpfs, DAX),
    /// whose direct reads are copies, the default is [`Route::PreadDirect`].
    ///
    /// Which way is fastest depends on the machine, so a load of 512 MiB or more measures each way
    /// on some of its bytes and continues with the fastest one. Later loads by this loader from
    /// the same file system use that result and measure again from time to time
    /// ([`crate::Report::measured`]). Until something has been measured, smaller loads use staged
    /// reads if the file system is local and the memory has small pages, and otherwise direct
    /// reads. A load from several file systems, or on a heap that populates memory when it
    /// allocates it (such as a dma-heap), measures nothing.
    #[must_use]
    pub fn route(mut self, route: Route) -> Self {
        self.route = Some(route);
        self
    }

    /// Sets what to optimize for if no route is set. Default: [`Prefer::Speed`].
    #[must_use]
    pub fn prefer(mut self, prefer: Prefer) -> Self {
        self.prefer = prefer;
        self
    }

    /// Sets whether to fail rather than fall back to a route below the starting one. Default:
    /// false.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Sets whether to record a timeline for [`crate::Report::trace`]: a [`crate::TraceEvent`] for
    /// each allocation, read, copy and other step. Default: false.
    #[must_use]
    pub fn trace(mut self, trace: bool) -> Self {
        self.trace = trace;
        self
    }

    /// Sets whether bytes that are already in the page cache are copied from there. Default:
    /// [`Cache::Auto`], or [`Cache::Bypass`] for a [strict](Self::strict) load.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = Some(cache);
        self
    }

    /// Returns whether cached chunks are copied from the page cache.
    pub(crate) fn takes_cached(&self) -> bool {
        match self.cache {
            Some(cache) => cache == Cache::Auto,
            None => !self.strict,
        }
    }

    /// Sets the expected contents of the files: a manifest, or the checksum of a single file. Both
    /// are in the `verify` module, which requires the feature of the same name. A load of files
    /// with different contents fails with [`crate::Error::Corrupt`], [`crate::Error::WrongLength`]
    /// or [`crate::Error::NotInManifest`]. With a manifest, every segment is verified before it is
    /// delivered to the caller. With a single checksum, all segments of the file except the last
    /// are delivered before the result is known. Default: no verification.
    ///
    /// The verifier sees the same bytes as the load's [observer](Self::observer), and sees them
    /// first. Because checksums cover whole files, neither a verifier nor an observer can be
    /// combined with [`Self::tensors`], [`Self::range`], [`Self::shard`], [`Layout::Tensors`] or a
    /// model inside another file.
    #[must_use]
    pub fn verify(mut self, expected: impl Verify) -> Self {
        self.verify = Some(VerifyOption(Foreign::new(Arc::new(expected))));
        self
    }

    /// Sets an observer, which sees every byte before its segment is delivered to the caller, for
    /// example to compute a checksum. Like [`Self::verify`], this works only if whole files are
    /// read. Default: none.
    ///
    /// On a heap that the CPU reads uncached, every read of a load that has an observer or a
    /// verifier goes into staging, where the CPU can read the bytes quickly. Such a load therefore
    /// starts at [`Route::Bounce`] or a lower route. A strict load fails unless it requests one of
    /// these routes.
    #[must_use]
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observer = Some(ObserverOption::new(Arc::new(observer)));
        self
    }

    /// Sets how to interpret the files' bytes. Default: [`Format::Auto`].
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }
}

/// The unit of segment sizes. It is the size of a huge page, so no two segments share a huge page.
/// Segments are smaller than this only if the heap or the importer requires it.
pub(crate) const SEGMENT_STEP_BYTES: u64 = 2 << 20;

/// The maximum of [`LoadOptions::segment_bytes`]. Before Linux 7, a registered buffer can't be
/// larger.
pub(crate) const LARGEST_SEGMENT_BYTES: u64 = 1 << 30;

pub(crate) const MIB: u64 = 1 << 20;

/// Which parts of its files a load reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Select {
    pub(crate) tensors: Option<Vec<String>>,
    /// Whether `tensors` are literal names rather than patterns.
    pub(crate) by_name: bool,
    pub(crate) range: Option<Range<u64>>,
    pub(crate) shard: Option<Shard>,
}

impl Select {
    /// Returns whether any selection is set, in which case files may be read only in part.
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
