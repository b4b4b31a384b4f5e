//! Resources used by this process.

use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Returns the user and system CPU time that this process has used, across all threads.
#[must_use]
pub fn cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap_or_default()
}

/// Returns the peak resident memory, including shared memory (`VmHWM`), or `None` without `/proc`.
#[must_use]
pub fn peak_resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_has_used_cpu_and_memory() {
        assert!(cpu_time() > Duration::ZERO);
        assert!(peak_resident_bytes().unwrap() > 1 << 20);
    }
}
