//! Measures how long activities were running. Overlapping intervals are counted only once.

use std::time::Duration;

/// The total time during which at least one of several activities was running.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct BusyTime {
    running: usize,
    since: Duration,
    total: Duration,
}

impl BusyTime {
    pub(crate) fn begin(&mut self, now: Duration) {
        if self.running == 0 {
            self.since = now;
        }
        self.running += 1;
    }

    pub(crate) fn end(&mut self, now: Duration) {
        self.running = self.running.saturating_sub(1);
        if self.running == 0 {
            self.total += now.saturating_sub(self.since);
        }
    }

    /// Ends all running activities.
    pub(crate) fn stop(&mut self, now: Duration) {
        if self.running > 0 {
            self.running = 1;
            self.end(now);
        }
    }

    pub(crate) fn total(&self) -> Duration {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_intervals_count_once_and_gaps_never() {
        let at = Duration::from_secs;
        let mut busy = BusyTime::default();
        busy.begin(at(1));
        busy.begin(at(2));
        busy.end(at(4));
        busy.end(at(5));
        busy.begin(at(8));
        busy.end(at(9));
        assert_eq!(busy.total(), at(5));
        busy.stop(at(10));
        assert_eq!(busy.total(), at(5));
        busy.begin(at(11));
        busy.begin(at(12));
        busy.stop(at(13));
        assert_eq!(busy.total(), at(7));
    }
}
