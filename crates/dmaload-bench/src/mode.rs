//! The modes: ways of loading that the bench compares.

use std::fmt;
use std::str::FromStr;

/// A way of loading. The names of `normal`, `normal_io`, `direct_io` and `direct_io_check` are
/// those of the modes in `examples/c/dmabuf-heap-file-read.c`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Allocates memory, maps the file and copies it, without huge pages. This is the baseline:
    /// see [`baseline`](crate::baseline).
    Normal,
    /// Allocates a memfd, and fills it with `read(2)` through the page cache.
    NormalIo,
    /// The engine, with the program's options.
    DirectIo,
    /// The engine, followed by a comparison of every byte with the file, outside the measured
    /// time.
    DirectIoCheck,
    /// The device limit: direct reads into memory that is already allocated.
    Limit,
    /// Maps the file, and touches every page.
    Mmap,
    /// `tokio::fs::read`.
    TokioFs,
    /// The engine, restricted to the `pread-direct` route.
    PreadDirect,
    /// Allocates all memory, and only then reads the files.
    NoOverlap,
    /// The engine, loading into the pooled memory of an earlier load that was dropped.
    Reuse,
    /// Like `reuse`, but while another load of the same files is held, as in a service that swaps
    /// models.
    Swap,
    /// The engine, with a separate load for each file, all at once.
    AtOnce,
    /// The engine, verifying each chunk against a manifest as it arrives.
    Verify,
    /// Another program.
    Peer(&'static Peer),
}

/// A program to compare with. It must follow the protocol of the bench's own child processes: it
/// receives the paths as arguments, reads `prepare` and answers `{"ready": true}`, then reads
/// `go`, loads the files, and answers with `seconds`, `cpu_seconds` and `page_bytes`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// The name under which the program appears as a mode.
    pub name: String,
    /// A shell command, to which the paths are appended.
    pub command: String,
}

impl Mode {
    /// Every mode except peers, in display order.
    pub const ALL: [Mode; 13] = [
        Mode::Normal,
        Mode::NormalIo,
        Mode::DirectIo,
        Mode::DirectIoCheck,
        Mode::Limit,
        Mode::Mmap,
        Mode::TokioFs,
        Mode::PreadDirect,
        Mode::NoOverlap,
        Mode::Reuse,
        Mode::Swap,
        Mode::AtOnce,
        Mode::Verify,
    ];

    /// Returns the name that is used on the command line and in every output.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Normal => "normal",
            Mode::NormalIo => "normal_io",
            Mode::DirectIo => "direct_io",
            Mode::DirectIoCheck => "direct_io_check",
            Mode::Limit => "limit",
            Mode::Mmap => "mmap",
            Mode::TokioFs => "tokio-fs",
            Mode::PreadDirect => "pread-direct",
            Mode::NoOverlap => "no-overlap",
            Mode::Reuse => "reuse",
            Mode::Swap => "swap",
            Mode::AtOnce => "at-once",
            Mode::Verify => "verify",
            Mode::Peer(peer) => &peer.name,
        }
    }

    /// Parses `NAME=COMMAND`.
    ///
    /// # Errors
    /// If the name or the command is missing, or the name already belongs to a mode.
    pub fn peer(text: &str) -> Result<Self, String> {
        let (name, command) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=COMMAND"))?;
        if name.is_empty() || command.trim().is_empty() || name.parse::<Mode>().is_ok() {
            return Err(format!("{text:?}: a unique name and a command are required"));
        }
        // Peers are leaked: there are only a few, and they are needed until the program exits.
        Ok(Mode::Peer(Box::leak(Box::new(Peer { name: name.to_owned(), command: command.to_owned() }))))
    }

    /// Returns the modes to measure: the requested ones or, if there are none, all except `reuse`,
    /// `swap`, `at-once` and `verify`. Always includes `normal` and `limit`, because the others
    /// are compared with them.
    pub fn chosen(requested: &[Mode]) -> Vec<Mode> {
        let special = |mode: &Mode| matches!(mode, Mode::Reuse | Mode::Swap | Mode::AtOnce | Mode::Verify);
        let compared_with = |mode: &Mode| matches!(mode, Mode::Normal | Mode::Limit);
        let wanted = |mode: &Mode| (requested.is_empty() && !special(mode)) || requested.contains(mode) || compared_with(mode);
        Mode::ALL.into_iter().filter(wanted).collect()
    }

    /// Returns the order of the modes in a round. The order is rotated by one mode from round to
    /// round, so that each round begins with a different mode.
    pub fn rotated(modes: &[Mode], round: usize) -> Vec<Mode> {
        let mut modes = modes.to_vec();
        let by = round % modes.len().max(1);
        modes.rotate_left(by);
        modes
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Mode::ALL.into_iter().find(|mode| mode.name() == name).ok_or_else(|| {
            let all = Mode::ALL.map(Mode::name).join(", ");
            format!("unknown mode {name:?}: the modes are {all}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_error_for_an_unknown_name_lists_all() {
        for mode in Mode::ALL {
            assert_eq!(mode.name().parse(), Ok(mode));
        }
        let error = "fast".parse::<Mode>().unwrap_err();
        assert!(error.contains("\"fast\"") && error.contains("direct_io_check, limit"), "{error}");
    }

    #[test]
    fn baselines_are_always_chosen_and_no_mode_twice() {
        use Mode::{DirectIo, Limit, Normal};
        assert_eq!(Mode::chosen(&[]), Mode::ALL[..9]);
        assert_eq!(Mode::chosen(&[DirectIo, DirectIo, Limit]), [Normal, DirectIo, Limit]);
    }

    #[test]
    fn peer_needs_a_unique_name_and_a_command() {
        let Ok(Mode::Peer(peer)) = Mode::peer("fio=fio --x=1 \"$@\"") else { panic!("a valid peer must parse") };
        assert_eq!((&*peer.name, &*peer.command), ("fio", "fio --x=1 \"$@\""));
        for wrong in ["fio", "=fio", "fio=", "limit=fio"] {
            assert!(Mode::peer(wrong).unwrap_err().contains(wrong));
        }
    }

    #[test]
    fn each_round_begins_with_a_different_mode() {
        let modes = Mode::chosen(&[Mode::DirectIo]);
        let first: Vec<Mode> = (0..4).map(|round| Mode::rotated(&modes, round)[0]).collect();
        assert_eq!(first, [Mode::Normal, Mode::DirectIo, Mode::Limit, Mode::Normal]);
        assert_eq!(Mode::rotated(&[], 3), []);
    }
}
