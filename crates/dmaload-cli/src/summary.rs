//! The report of a load: a summary for people, and JSON for programs.

use std::time::Duration;

use dmabuf::{HUGE_PAGE_BYTES, printable};
use dmaload::verify::Digest;
use dmaload::{Errno, Fallback, Image, Measured, Report, Segment};
use dmaload_bench::usage;
use dmaload_text::{Pairs, bytes, duration, rate};
use serde_json::{Value, json};

/// Resources that the process has used by the end of a load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Used {
    /// CPU time during the load.
    cpu: Duration,
    peak_resident_bytes: u64,
}

impl Used {
    /// Returns the current values, with the CPU time since `cpu_before`.
    pub(crate) fn since(cpu_before: Duration) -> Self {
        let cpu = usage::cpu_time().saturating_sub(cpu_before);
        Used { cpu, peak_resident_bytes: usage::peak_resident_bytes().unwrap_or(0) }
    }
}

fn memory(report: &Report) -> String {
    let allocations = counted(report.memories, "allocation");
    let shared = if report.memories < report.segments { format!(" in {allocations}") } else { String::new() };
    format!("{}, {} ({}{shared})", report.heap, report.layout, counted(report.segments, "segment"))
}

/// Returns whether this process read the bytes. The bytes of an attached image were read by
/// another process.
fn were_read(report: &Report) -> bool {
    report.bytes == 0 || !report.reading.is_zero() || !report.from_cache.is_zero()
}

/// Formats a summary for people.
pub(crate) fn summary(image: &Image, digests: &[Option<Digest>], used: Used) -> String {
    summary_with(image, digests, used, &[])
}

/// Like [`summary`], but adds notes from the command itself to those in the report.
pub(crate) fn summary_with(image: &Image, digests: &[Option<Digest>], used: Used, notes: &[String]) -> String {
    let report = image.report();
    let in_time = format!("{} in {}", bytes(report.bytes), duration(report.total));
    let mut pairs = Pairs::new();
    pairs = if were_read(report) {
        pairs.with("loaded", format!("{in_time}, {}", rate(report.bytes, report.total)))
    } else {
        pairs.with("attached", in_time)
    };
    pairs = pairs.with("route", report.route).with("memory", memory(report)).with("pages", pages(report));
    if were_read(report) {
        let (cpu, resident) = (duration(used.cpu), bytes(used.peak_resident_bytes));
        pairs = pairs.with("time", times(report)).with("CPU", format!("{cpu} for the whole process, {resident} peak memory"));
    }
    if report.wanted_bytes != report.bytes {
        let along = report.bytes.saturating_sub(report.wanted_bytes);
        pairs = pairs.with(
            "wanted",
            format!("{} of the loaded bytes; the other {} were read with them", bytes(report.wanted_bytes), bytes(along)),
        );
    }
    if report.cached_bytes > 0 {
        pairs = pairs.with("cached", cached(report));
    }
    if report.copied_bytes > 0 {
        pairs = pairs.with("copied", format!("{}, to align tensors", bytes(report.copied_bytes)));
    }
    let tensors = image.tensors().count();
    if tensors > 0 {
        pairs = pairs.with("tensors", tensors);
    }
    pairs = pairs.with_some("measured", report.measured.map(|measured| format_measured(&measured)));
    pairs = pairs.with_some("verified", report.verified.as_ref());
    for note in report.notes.iter().chain(notes) {
        pairs = pairs.with("note", note);
    }
    for fallback in &report.fallbacks {
        pairs = pairs.with("fallback", describe_fallback(report, fallback));
    }
    for (file, digest) in report.files.iter().zip(digests) {
        let line = digest.as_ref().map(|digest| format!("{}  {}", digest.hex(), printable::path(&file.path)));
        pairs = pairs.with_some(digest.as_ref().map(|digest| digest.algorithm().to_string()).unwrap_or_default(), line);
    }
    pairs.to_string()
}

fn format_measured(measured: &Measured) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "only three digits are shown")]
    let rate = |bytes: f64| rate(bytes as u64, Duration::from_secs(1));
    let (staged, direct) = (rate(measured.staged_bytes_per_second), rate(measured.direct_bytes_per_second));
    let buffered = measured.buffered_bytes_per_second.map(|bytes| format!(", buffered {}", rate(bytes)));
    format!("staged {staged}, direct {direct}{}: {} for the rest", buffered.unwrap_or_default(), measured.chosen)
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn pages(report: &Report) -> String {
    let (seen, huge) = (report.pages.seen_bytes, report.pages.huge_bytes);
    let sizes = match (seen, huge) {
        (0, _) => return "of unknown size (this kernel does not report it)".to_owned(),
        (_, 0) => format!("{}, all of them", bytes(report.page_size_bytes() as u64)),
        (seen, huge) if seen - huge < HUGE_PAGE_BYTES as u64 => "2 MiB".to_owned(),
        (seen, huge) => format!("2 MiB for {} of {}", bytes(huge), bytes(seen)),
    };
    match report.pages_refused {
        Some(errno) => format!("{sizes}; further 2 MiB pages were refused: {}", errno.describe()),
        None => sizes,
    }
}

fn times(report: &Report) -> String {
    let first = report.first_segment.map(|first| format!("; first segment after {}", duration(first))).unwrap_or_default();
    let (allocating, reading) = (duration(report.allocating), duration(report.reading));
    let copying = if report.copying.is_zero() { String::new() } else { format!(", copying {}", duration(report.copying)) };
    format!("allocating {allocating}, reading {reading}{copying}, {:.0} % overlapped{first}", report.overlap() * 100.0)
}

/// Formats the number of bytes copied from the page cache and the rate of these copies, and the
/// rate of the reads from storage.
fn cached(report: &Report) -> String {
    let stored_bytes = report.bytes.saturating_sub(report.cached_bytes);
    let rest = report
        .storage_bytes_per_second()
        .map(|_| format!("; the rest from storage at {}", rate(stored_bytes, report.reading)))
        .unwrap_or_default();
    let from = rate(report.cached_bytes, report.from_cache);
    format!("{} copied from the page cache at {from}{rest}", bytes(report.cached_bytes))
}

fn describe_fallback(report: &Report, fallback: &Fallback) -> String {
    let file = fallback.file_index.and_then(|index| report.files.get(index));
    let file = file.map(|file| format!("{}: ", printable::path(&file.path))).unwrap_or_default();
    format!("{file}{} -> {}: {} ({})", fallback.from, fallback.to, fallback.reason(), fallback.errno.describe())
}

/// Converts the report to JSON.
pub(crate) fn to_json(image: &Image, digests: &[Option<Digest>], used: Used) -> Value {
    to_json_with(image, digests, used, &[])
}

/// Like [`to_json`], but adds notes from the command itself to those in the report.
pub(crate) fn to_json_with(image: &Image, digests: &[Option<Digest>], used: Used, notes: &[String]) -> Value {
    let report = image.report();
    let files = report.files.iter().zip(digests).map(|(file, digest)| {
        json!({
            "path": file.path.to_string_lossy(),
            "bytes": file.bytes,
            "route": file.route.name(),
            "digest": digest.as_ref().map(|digest| json!({ "algorithm": digest.algorithm().name(), "hex": digest.hex() })),
        })
    });
    json!({
        "bytes": report.bytes,
        "wanted_bytes": report.wanted_bytes,
        "copied_bytes": report.copied_bytes,
        "cached_bytes": report.cached_bytes,
        "seconds": report.total.as_secs_f64(),
        "throughput_bytes_per_second": were_read(report).then(|| report.throughput_bytes_per_second()),
        "allocate_seconds": report.allocating.as_secs_f64(),
        "read_seconds": report.reading.as_secs_f64(),
        "copy_seconds": report.copying.as_secs_f64(),
        "cache_seconds": report.from_cache.as_secs_f64(),
        "storage_bytes_per_second": report.storage_bytes_per_second(),
        "cache_bytes_per_second": report.cache_bytes_per_second(),
        "overlap": report.overlap(),
        "first_segment_seconds": report.first_segment.map(|first| first.as_secs_f64()),
        "cpu_seconds": used.cpu.as_secs_f64(),
        "peak_resident_bytes": used.peak_resident_bytes,
        "page_size_bytes": report.page_size_bytes(),
        "huge_page_bytes": report.pages.huge_bytes,
        "pages_refused": report.pages_refused.map(Errno::describe),
        "heap": report.heap,
        "notes": report.notes.iter().chain(notes).collect::<Vec<_>>(),
        "layout": report.layout.name(),
        "memories": report.memories,
        "route": report.route.name(),
        "fallbacks": report.fallbacks.iter().map(|fallback| json!({
            "from": fallback.from.name(),
            "to": fallback.to.name(),
            "reason": fallback.reason(),
            "errno": fallback.errno.name().map_or_else(|| fallback.errno.raw_os_error().to_string(), str::to_owned),
            "file": fallback.file_index,
        })).collect::<Vec<_>>(),
        "measured": report.measured.map(|measured| serde_json::json!({
            "direct_bytes_per_second": measured.direct_bytes_per_second,
            "staged_bytes_per_second": measured.staged_bytes_per_second,
            "buffered_bytes_per_second": measured.buffered_bytes_per_second,
            "chosen": measured.chosen.to_string(),
        })),
        "verified": report.verified,
        "segments": image.segments().iter().map(segment_to_json).collect::<Vec<_>>(),
        "tensors": image.tensors().count(),
        "files": files.collect::<Vec<_>>(),
    })
}

fn segment_to_json(segment: &Segment) -> Value {
    json!({
        "index": segment.index(),
        "file": segment.file_index(),
        "memory_offset": segment.memory_offset(),
        "file_offset": segment.file_range().start,
        "bytes": segment.len(),
        "dma_buf": segment.has_dma_buf(),
    })
}
