//! The settings of a loader, and the check that the settings and the options of a load are valid.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::options::choices::Layout;
use crate::options::load::{LARGEST_SEGMENT_BYTES, LoadOptions, MIB, SEGMENT_STEP_BYTES};
use crate::plan::BATCH_BYTES;
use crate::plan::select::Selector;
use crate::ring::pace::{self, FIRST, Pace, most_allocators, most_copiers};
use crate::ring::{RingLimits, StagingBudget};
use crate::support::convert::to_usize;

/// Default size of the window: how many bytes may be allocated and not yet filled, across all
/// loads.
pub(crate) const WINDOW_BYTES: u64 = 128 << 20;
/// Default maximum number of reads in flight, across all loads. At this depth, all loads from one
/// file system together can have 33 reads in flight, and a single load can have 32. With chunks of
/// the default size, 32 reads are 64 MiB.
pub(crate) const QUEUE_DEPTH: usize = 44;
/// Default initial size of staging. Staging that does not fit into the processor's cache is a
/// third slower. Even on a machine with 260 MiB of L3 cache, 32 MiB was slower than 16 MiB.
pub(crate) const STAGING_BYTES: u64 = 16 << 20;
/// The size of a staging slot. It is the size of a huge page and of a default chunk, and several
/// slots fit into a processor's cache.
const STAGING_SLOT_BYTES: u64 = 2 << 20;
const CHUNK_STEP_BYTES: u64 = 64 << 10;

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) window_bytes: u64,
    pub(crate) queue_depth: usize,
    pub(crate) staging_bytes: u64,
    /// Whether the caller chose the staging size; if so, it does not grow.
    pub(crate) staging_is_chosen: bool,
    pub(crate) pool_bytes: u64,
    /// The maximum amount of memory that segments may occupy; `u64::MAX` if there is no limit.
    pub(crate) memory_limit_bytes: u64,
    /// The initial number of allocator threads.
    pub(crate) allocator_threads: usize,
    /// Whether the caller chose the number of allocators; if so, it does not grow.
    pub(crate) allocators_are_chosen: bool,
    /// The number of processors to assume.
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
    /// Returns the default settings for a machine with this many processors.
    pub(crate) fn for_cores(cores: usize) -> Self {
        Settings {
            window_bytes: WINDOW_BYTES,
            queue_depth: QUEUE_DEPTH,
            staging_bytes: STAGING_BYTES,
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

    /// Returns the pace that decides how many threads copy.
    pub(crate) fn copiers(&self) -> Pace {
        Pace::new(FIRST, most_copiers(self.cores))
    }

    /// Returns the pace that decides how many threads allocate.
    pub(crate) fn allocators(&self) -> Pace {
        let first = self.allocator_threads.max(1);
        Pace::new(first, if self.allocators_are_chosen { first } else { most_allocators(self.cores) })
    }

    /// Whether staging grows with the number of copiers.
    pub(crate) fn staging_grows(&self) -> bool {
        !self.staging_is_chosen
    }

    /// Returns the maximum size of a batch, the unit that an allocator populates in one call.
    /// Batches are smaller if more than [`FIRST`] allocators may run at the same time, because the
    /// batches that they are populating take up space in the window, which must also have room for
    /// reads.
    pub(crate) fn batch_bytes(&self) -> u64 {
        if self.allocators().max_threads() > FIRST { BATCH_BYTES * 3 / 8 } else { BATCH_BYTES }
    }

    pub(crate) fn check(&self, load: &LoadOptions) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(text));
        let (segment_bytes, chunk_bytes) = (load.segment_bytes_within(None), load.chunk_bytes);
        if segment_bytes == 0
            || load.segment_bytes.is_some() && segment_bytes % SEGMENT_STEP_BYTES != 0
            || segment_bytes > LARGEST_SEGMENT_BYTES
        {
            return wrong(format!(
                "the segment size must be a multiple of 2 MiB and at most 1 GiB, but is {segment_bytes} bytes"
            ));
        }
        if chunk_bytes == 0 || chunk_bytes % CHUNK_STEP_BYTES != 0 || chunk_bytes > LARGEST_SEGMENT_BYTES {
            return wrong(format!("the chunk size must be a multiple of 64 KiB and at most 1 GiB, but is {chunk_bytes} bytes"));
        }
        let most = load.importer.max_segment_bytes;
        if load.segment_bytes.is_some_and(|bytes| bytes > most) || most < MIB {
            return wrong(format!(
                "max_segment_bytes must be at least 1 MiB and at least the segment size ({segment_bytes} bytes), but is {most} bytes"
            ));
        }
        let alignment = load.importer.alignment_bytes;
        if !alignment.is_power_of_two() || alignment > LARGEST_SEGMENT_BYTES {
            return wrong(format!("the alignment must be a power of two and at most 1 GiB, but is {alignment} bytes"));
        }
        if alignment > 1 && load.layout != Layout::Tensors {
            return wrong(format!("an alignment of {alignment} bytes requires the tensors layout"));
        }
        let partial = load.select.is_partial() || load.layout == Layout::Tensors;
        if partial && (load.verify.is_some() || load.observer.is_some()) {
            return wrong("parts of files can't be verified or observed: checksums cover whole files".to_owned());
        }
        Selector::new(&load.select)?;
        if self.memory_limit_bytes < SEGMENT_STEP_BYTES {
            return wrong(format!(
                "the memory limit must be at least 2 MiB, the smallest segment size, but is {} bytes",
                self.memory_limit_bytes
            ));
        }
        if self.window_bytes < segment_bytes {
            return wrong(format!(
                "the window ({} bytes) is smaller than a segment ({segment_bytes} bytes): nothing could be allocated",
                self.window_bytes
            ));
        }
        if self.queue_depth == 0 || self.queue_depth > 4096 {
            return wrong(format!("the queue depth must be between 1 and 4096, but is {}", self.queue_depth));
        }
        if self.staging_bytes < STAGING_SLOT_BYTES || self.staging_bytes > LARGEST_SEGMENT_BYTES {
            return wrong(format!("staging must be between 2 MiB and 1 GiB, but is {} bytes", self.staging_bytes));
        }
        Ok(())
    }

    /// Returns the largest segment size at which the maximum number of open loads can each hold
    /// one segment within the memory limit. It is never less than [`SEGMENT_STEP_BYTES`]. Returns
    /// `None` if memory is not limited.
    pub(crate) fn share_bytes(&self) -> Option<u64> {
        let share = self.memory_limit_bytes / self.max_open_loads as u64 / SEGMENT_STEP_BYTES * SEGMENT_STEP_BYTES;
        (self.memory_limit_bytes < u64::MAX).then_some(share.max(SEGMENT_STEP_BYTES))
    }

    /// Returns the limits that the ring thread must stay within.
    pub(crate) fn ring_limits(&self) -> RingLimits {
        RingLimits {
            depth: self.queue_depth,
            staging: self.staging(),
            copiers: self.copiers(),
            staging_grows: self.staging_grows(),
        }
    }

    /// Returns the staging budget, counted in slots.
    pub(crate) fn staging(&self) -> StagingBudget {
        StagingBudget { slot_bytes: to_usize(STAGING_SLOT_BYTES), slots: to_usize(self.staging_bytes / STAGING_SLOT_BYTES) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_settings_are_valid() {
        let settings = Settings::default();
        settings.check(&settings.load).unwrap();
    }

    #[test]
    fn invalid_settings_are_refused_with_an_explanation() {
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
}
