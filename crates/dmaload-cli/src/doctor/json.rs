//! Formats the facts as one JSON object.

use dmaload::probe::IoUring;
use dmaload::{Errno, Way};
use serde_json::{Value, json};

use super::advice;
use super::facts::{Facts, PathFacts};
use super::trial::HeapTrial;
use super::verdict;

pub(crate) fn object(facts: &Facts) -> Value {
    let memfd = facts.trial.heap("memfd").and_then(|heap| heap.outcome.as_ref().ok());
    let load = verdict::load(facts);
    let expected = load.as_ref().ok();
    let dma_buf = verdict::load_dma_buf(facts);
    json!({
        "kernel": facts.kernel,
        "io_uring": {
            "available": facts.io_uring.setup.is_ok(),
            "errno": facts.io_uring.setup.err().map(name),
            "cause": facts.cause.as_ref().map(super::cause::Cause::name),
            "cause_text": facts.cause.as_ref().map(ToString::to_string),
            "features": features(&facts.io_uring),
        },
        "memlock": {
            "soft_bytes": facts.memlock.soft_bytes,
            "hard_bytes": facts.memlock.hard_bytes,
            "cap_ipc_lock": facts.memlock.cap_ipc_lock,
            "registrable_bytes": facts.io_uring.registrable_bytes,
        },
        "memory": facts.memory.as_ref().map(|memory| json!({ "available_bytes": memory.bytes, "limit": memory.limit })),
        "huge_pages": {
            "shmem_enabled": facts.huge_pages.shmem_enabled,
            "enabled": facts.huge_pages.enabled,
            "denied_to_process": facts.huge_pages.denied_to_process,
            "obtained_bytes": memfd.and_then(|loaded| loaded.page_bytes),
            "refused": memfd.and_then(|loaded| loaded.pages_refused).map(name),
        },
        "trial": {
            "folder": facts.trial.folder.as_ref().ok().map(|folder| folder.to_string_lossy()),
            "error": facts.trial.folder.as_ref().err(),
            "not_beside_path": facts.trial.elsewhere,
        },
        "heaps": facts.trial.heaps.iter().map(heap).collect::<Vec<_>>(),
        "path": facts.path.as_ref().map(|path| self::path(facts, path)),
        "load": {
            "works": verdict::works(&load),
            "heap": "memfd",
            "route": expected.map(|expected| expected.route.name()),
            "page_size_bytes": expected.and_then(|expected| expected.page_bytes),
            "measures": expected.map(|expected| expected.measured.iter().map(Way::to_string).collect::<Vec<_>>()),
            "reason": load.as_ref().err().or(expected.and_then(|expected| expected.because.as_ref())),
        },
        "dma_buf": {
            "works": verdict::works(&dma_buf),
            "heap": facts.dma_buf.heap,
            "route": dma_buf.as_ref().ok().map(|expected| expected.route.name()),
            "page_size_bytes": dma_buf.as_ref().ok().and_then(|expected| expected.page_bytes),
            "reason": dma_buf.as_ref().err().unwrap_or(&facts.dma_buf.reason),
        },
        "advice": advice::ranked(facts).iter().take(advice::SHOWN).map(|advice| json!({
            "change": advice.change,
            "command": advice.command,
            "gain": advice.gain,
        })).collect::<Vec<_>>(),
    })
}

fn name(errno: Errno) -> String {
    errno.name().map_or_else(|| errno.raw_os_error().to_string(), str::to_owned)
}

fn features(found: &IoUring) -> Value {
    let feature = |tried: Result<(), Errno>| json!({ "available": tried.is_ok(), "errno": tried.err().map(name) });
    json!({
        "single_issuer_defer_taskrun": feature(found.deferred_task_run),
        "buffer_table": feature(found.buffer_table),
        "file_table": feature(found.file_table),
        "register_16_mib": feature(found.register),
    })
}

fn heap(heap: &HeapTrial) -> Value {
    let loaded = heap.outcome.as_ref().ok();
    let fallbacks =
        loaded.map(|loaded| loaded.steps.as_slice()).unwrap_or_default().iter().map(
            |step| json!({ "from": step.from.name(), "to": step.to.name(), "reason": step.reason, "errno": name(step.errno) }),
        );
    json!({
        "name": heap.name,
        "usable": loaded.is_some(),
        "error": heap.outcome.as_ref().err(),
        "route": loaded.map(|loaded| loaded.route.name()),
        "page_size_bytes": loaded.and_then(|loaded| loaded.page_bytes),
        "limit_bytes": heap.limit_bytes,
        "limit_parts": heap.limit_parts,
        "fallbacks": fallbacks.collect::<Vec<_>>(),
    })
}

/// Describes the path. For a folder, shows the results of probing the trial file, if that file
/// could be written to this folder.
fn path(facts: &Facts, path: &PathFacts) -> Value {
    let beside = facts.trial.file.as_ref().filter(|_| facts.trial.elsewhere.is_none());
    let file = path.file.as_ref().or(beside);
    json!({
        "path": path.path.to_string_lossy(),
        "kind": if path.file.is_some() { "file" } else { "folder" },
        "bytes": path.file.map(|file| file.bytes),
        "fits_memory": path.file.map(|_| verdict::too_large(facts).is_none()),
        "file_system": path.mount.as_ref().map(|mount| &mount.file_system),
        "mount_point": path.mount.as_ref().map(|mount| mount.point.to_string_lossy()),
        "alignment_bytes": file.map(|file| file.alignment_bytes),
        "o_direct": file.map(|file| file.direct_refused().is_none()),
        "o_direct_errno": file.and_then(|file| file.direct_refused()).map(name),
        "first_read": file.map(|file| file.first_read.is_ok()),
        "first_read_errno": file.and_then(|file| file.first_read.err()).map(name),
    })
}
