//! Formats the facts for people, on one screen.

use std::fmt;

use dmabuf::printable;
use dmaload::Way;
use dmaload::probe::IoUring;
use dmaload_text::{Pairs, bytes};

use super::advice::{self, Advice};
use super::facts::{Facts, PathFacts};
use super::system::{HugePages, Memlock};
use super::trial::{HeapTrial, Loaded};
use super::verdict::{self, Expected};

const WIDTH: usize = 80;
/// The width of the column of row names and the gap after it, in characters. A longer name, such
/// as that of a dma-heap, shifts all values to the right.
const INDENT: usize = 14;

pub(crate) fn screen(facts: &Facts) -> String {
    let mut rows = WrappedPairs(Pairs::new());
    rows.add("kernel", &facts.kernel);
    rows.add("io_uring", &io_uring(facts));
    rows.add("memlock", &memlock(&facts.memlock, &facts.io_uring));
    let memory = facts.memory.as_ref();
    rows.add(
        "memory",
        &memory.map_or("unknown".to_owned(), |memory| format!("{} available ({})", size(memory.bytes), memory.limit)),
    );
    rows.add("huge pages", &huge_pages(facts));
    if let Some(path) = &facts.path {
        rows.add("path", &describe_path(path));
    }
    rows.add("tried in", &describe_trial(facts));
    for heap in &facts.trial.heaps {
        rows.add(&format!("  {}", heap.name), &heap_line(heap));
    }
    rows.add("load", &verdict_line(verdict::load(facts)));
    rows.add("  --dma-buf", &dma_buf_line(facts));
    let advice = advice::ranked(facts);
    if advice.is_empty() {
        rows.add("would help", "nothing that doctor knows of");
    }
    let shown = advice.iter().take(advice::SHOWN).enumerate();
    format!("{}{}", rows.0, shown.map(|(index, advice)| Numbered(index + 1, advice).to_string()).collect::<String>())
}

/// Formats a number of bytes, and omits decimals that are zeros: `2 MiB`, not `2.00 MiB`. Limits
/// and page sizes are usually round.
fn size(count: u64) -> String {
    bytes(count).replace(".00 ", " ").replace(".0 ", " ")
}

/// A table of names and values that wraps long values.
struct WrappedPairs(Pairs);

impl WrappedPairs {
    fn add(&mut self, what: &str, value: &str) {
        let mut what = format!("{what:INDENT$}", INDENT = INDENT - 2);
        for line in wrapped(value, WIDTH - INDENT) {
            self.0 = std::mem::take(&mut self.0).with(std::mem::take(&mut what), line);
        }
    }
}

/// Breaks text at spaces into lines of at most `width` characters; a longer word gets its own
/// line.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let Some(line) = lines.last_mut() else { continue };
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

/// A numbered piece of advice. Its command is not wrapped, so that it can be copied.
struct Numbered<'a>(usize, &'a Advice);

impl fmt::Display for Numbered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Numbered(number, advice) = self;
        if *number == 1 {
            writeln!(f, "\nwould help most")?;
        }
        for (index, line) in wrapped(&advice.change, WIDTH - 5).iter().enumerate() {
            if index == 0 { writeln!(f, "  {number}. {line}")? } else { writeln!(f, "     {line}")? }
        }
        writeln!(f, "       {}", advice.command)?;
        wrapped(&format!("gains: {}", advice.gain), WIDTH - 5).iter().try_for_each(|line| writeln!(f, "     {line}"))
    }
}

fn io_uring(facts: &Facts) -> String {
    let found = &facts.io_uring;
    let by = facts.cause.as_ref().map(|cause| format!(", by {cause}")).unwrap_or_default();
    if let Err(errno) = found.setup {
        return format!("refused: {}{by}", errno.describe());
    }
    let features = [
        ("SINGLE_ISSUER+DEFER_TASKRUN", found.deferred_task_run),
        ("buffer table", found.buffer_table),
        ("file table", found.file_table),
    ];
    let had: Vec<_> = features.iter().filter(|(_, tried)| tried.is_ok()).map(|(name, _)| *name).collect();
    let refused = features.iter().filter_map(|(name, tried)| Some(format!("; {name} refused: {}", tried.err()?.describe())));
    let by = if found.buffer_table.is_err() { by } else { String::new() };
    let had = if had.is_empty() { String::new() } else { format!(" with {}", had.join(", ")) };
    format!("works{had}{}{by}", refused.collect::<String>())
}

fn memlock(limit: &Memlock, ring: &IoUring) -> String {
    let describe = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), size);
    let capability = if limit.cap_ipc_lock { "but CAP_IPC_LOCK lifts it" } else { "no CAP_IPC_LOCK" };
    let registrable = match (ring.setup, ring.register, ring.registrable_bytes) {
        (Err(_), ..) => String::new(),
        (_, Ok(()), most) => format!("; up to {} could be registered at once", size(most)),
        (_, Err(errno), 0) => format!("; nothing could be registered: {}", errno.describe()),
        (_, Err(errno), most) => format!("; up to {} could be registered at once; for more: {}", size(most), errno.describe()),
    };
    format!("{} (hard limit {}), {capability}{registrable}", describe(limit.soft_bytes), describe(limit.hard_bytes))
}

fn huge_pages(facts: &Facts) -> String {
    let got = match facts.trial.heap("memfd").and_then(|heap| heap.outcome.as_ref().ok()) {
        Some(Loaded { page_bytes: Some(bytes_each), pages_refused, .. }) => {
            let refused = pages_refused.map(|errno| format!(" (larger ones: {})", errno.describe())).unwrap_or_default();
            format!("memfd got {}{refused}", size(*bytes_each))
        }
        Some(_) => "unknown: this kernel does not report it".to_owned(),
        None => "not tried".to_owned(),
    };
    let HugePages { shmem_enabled, enabled, denied_to_process } = &facts.huge_pages;
    let set = |value: &Option<String>| value.clone().unwrap_or_else(|| "missing".to_owned());
    let denied = if *denied_to_process { ", PR_SET_THP_DISABLE" } else { "" };
    format!("{got}; shmem_enabled={}, enabled={}{denied}", set(shmem_enabled), set(enabled))
}

fn describe_path(facts: &PathFacts) -> String {
    let mount = facts.mount.as_ref();
    let mount = mount.map_or("on an unknown file system".to_owned(), |mount| {
        format!("on {}, mounted at {}", mount.file_system, printable::path(&mount.point))
    });
    let what = facts.file.map_or("a folder".to_owned(), |file| size(file.bytes));
    format!("{}: {what}, {mount}", printable::path(&facts.path))
}

fn first_read(file: &dmaload::probe::File) -> String {
    match (file.open_direct, file.first_read) {
        (Ok(()), Ok(_)) => format!("O_DIRECT works, with {} alignment", size(file.alignment_bytes)),
        (Ok(()), Err(errno)) => format!("the first O_DIRECT read fails: {}", errno.describe()),
        (Err(refused), Ok(_)) => format!("O_DIRECT refused: {}; a cached read works", refused.describe()),
        (Err(refused), Err(errno)) => {
            format!("O_DIRECT refused: {}; a cached read fails, too: {}", refused.describe(), errno.describe())
        }
    }
}

fn describe_trial(facts: &Facts) -> String {
    let folder = match &facts.trial.folder {
        Ok(folder) => {
            let loaded = facts.trial.heaps.iter().any(|heap| heap.outcome.is_ok());
            let outcome = if loaded { "written and loaded" } else { "written, but no heap could load them" };
            format!("{}: {} {outcome}", printable::path(&folder), size(facts.trial.bytes))
        }
        Err(reason) => format!("no folder: {reason}"),
    };
    // The file at the path takes precedence over the trial file.
    let file = verdict::path_file(facts).or(facts.trial.file.as_ref());
    let first_read = file.map(|file| format!("; {}", first_read(file))).unwrap_or_default();
    let elsewhere = facts
        .trial
        .elsewhere
        .as_ref()
        .map(|reason| format!("; the folder of the path could not be used: {reason}"))
        .unwrap_or_default();
    format!("{folder}{first_read}{elsewhere}")
}

fn heap_line(heap: &HeapTrial) -> String {
    let mut limits = heap.limit_bytes.map(|most| format!(", at most {} per dma-buf", size(most))).unwrap_or_default();
    limits.push_str(&heap.limit_parts.map(|most| format!(", at most {most} memfds per dma-buf")).unwrap_or_default());
    match &heap.outcome {
        Err(reason) => format!("no: {reason}"),
        Ok(loaded) => {
            let pages = loaded.page_bytes.map(|bytes_each| format!(", {} pages", size(bytes_each))).unwrap_or_default();
            let steps = loaded
                .steps
                .iter()
                .map(|step| format!("; {} was refused while {}: {}", step.from, step.attempt, step.errno.describe()));
            format!("{}{pages}{limits}{}", loaded.route, steps.collect::<String>())
        }
    }
}

fn verdict_line(verdict: Result<Expected, String>) -> String {
    match verdict {
        Ok(Expected { route, page_bytes, because, measured }) => {
            let pages = page_bytes.map(|bytes_each| format!(", {} pages", size(bytes_each))).unwrap_or_default();
            let because = because.map(|because| format!(": {because}")).unwrap_or_default();
            let others: Vec<_> = measured.iter().filter(|&&way| way != Way::Direct).map(Way::to_string).collect();
            let measured = match &*others {
                [] => String::new(),
                others => format!("; also measures {} reads, and continues with the fastest", others.join(" and ")),
            };
            format!("works: memfd by {route}{pages}{because}{measured}")
        }
        Err(reason) if reason.starts_with(verdict::UNKNOWN) => reason,
        Err(reason) => format!("would fail: {reason}"),
    }
}

fn dma_buf_line(facts: &Facts) -> String {
    match verdict::load_dma_buf(facts) {
        Ok(Expected { route, page_bytes, .. }) => {
            let pages = page_bytes.map(|bytes_each| format!(", {} pages", size(bytes_each))).unwrap_or_default();
            format!("works, by {route}{pages}: {}", facts.dma_buf.reason)
        }
        Err(reason) if reason.starts_with(verdict::UNKNOWN) => reason,
        Err(reason) => {
            // The rows above show why each heap failed.
            let reason =
                if facts.dma_buf.heap.is_none() { "no heap on this machine provides dma-bufs".to_owned() } else { reason };
            format!("would fail: {reason}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trial_is_called_loaded_only_if_a_heap_loaded_it() {
        let mut facts = Facts::best();
        assert!(describe_trial(&facts).starts_with("/tmp: 4 MiB written and loaded"));
        facts.trial.heaps[0].outcome = Err("out of memory".to_owned());
        assert!(describe_trial(&facts).starts_with("/tmp: 4 MiB written and loaded"));
        facts.trial.heaps[1].outcome = Err("out of memory".to_owned());
        assert!(describe_trial(&facts).starts_with("/tmp: 4 MiB written, but no heap could load them"));
    }

    #[test]
    fn lines_break_at_spaces_and_long_words_stay_whole() {
        assert_eq!(wrapped("ab cd ef", 5), ["ab cd", "ef"]);
        assert_eq!(wrapped("a /very/long/path b", 4), ["a", "/very/long/path", "b"]);
        assert_eq!(wrapped("", 4), [""]);
    }
}
