//! What the command writes to standard output: text, or one JSON object.
//!
//! All of it goes through [`stdout`], so that a full disk behind a redirection says "standard output", and all
//! JSON through [`json`]. The lint `clippy::disallowed_methods` forbids the way around them.

use std::io::{self, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use dmabuf::printable;
use dmaload_text::Named;
use serde_json::Value;

/// Standard output could not be written to.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {}", Named(.0))]
struct OutputError(io::Error);

/// Standard output, whose errors say that it was it.
#[derive(Debug)]
pub(crate) struct Stdout(StdoutLock<'static>);

/// Locks standard output. Where it was closed when the program was started, writing to it fails.
#[allow(clippy::disallowed_methods, reason = "the one place")]
pub(crate) fn stdout() -> Stdout {
    Stdout(io::stdout().lock())
}

/// Keeps the kind: a closed pipe is told by it.
fn named(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), OutputError(error))
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if crate::sys::stdout_was_closed() {
            return Err(named(rustix::io::Errno::BADF.into()));
        }
        match self.0.write(bytes) {
            // `write_all` tries these again, and knows them by their kind.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            written => written.map_err(named),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(named)
    }
}

/// Whether the one object has been written.
static OBJECT_WRITTEN: AtomicBool = AtomicBool::new(false);

/// Writes the one object of a run with `--json`.
///
/// # Errors
/// Standard output's.
pub(crate) fn write_json(object: &Value) -> io::Result<()> {
    OBJECT_WRITTEN.store(true, Ordering::Relaxed);
    let mut stdout = stdout();
    writeln!(stdout, "{}", json(object))?;
    stdout.flush()
}

/// Writes the object of an error, unless an object has been written: there is only one.
pub(crate) fn write_json_error(object: &Value) -> io::Result<()> {
    if OBJECT_WRITTEN.load(Ordering::Relaxed) { Ok(()) } else { write_json(object) }
}

/// A value as JSON, for programs and for terminals: what a terminal would act on is escaped.
///
/// JSON itself asks for that below U+0020 only. All of it can stand in strings only, where an escape means the same.
pub(crate) fn json(value: &Value) -> String {
    escaped(format!("{value:#}"))
}

/// The same for what is JSON already.
pub(crate) fn escaped(text: String) -> String {
    let is_shown = |c: char| c == '\n' || !printable::is_hidden(c);
    if text.chars().all(is_shown) {
        return text;
    }
    let mut escaped = String::with_capacity(text.len() + 64);
    for c in text.chars() {
        if is_shown(c) {
            escaped.push(c);
        } else {
            let mut units = [0; 2];
            escaped.extend(c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    escaped
}

/// The width of the terminal that standard output is, or `None` when it is a file or a pipe.
#[must_use]
pub(crate) fn terminal_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    // Serial consoles and some CI runners have a terminal of no size.
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hidden_characters_are_escaped_and_mean_the_same() {
        let all: String = (0..0x3000).chain(0xe0000..0xe0080).filter_map(char::from_u32).collect();
        let value = json!({ "name": all, all.clone(): [all] });
        let text = json(&value);
        assert!(!text.contains(|c| c != '\n' && printable::is_hidden(c)));
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }

    #[test]
    fn an_error_says_that_it_was_standard_output_and_keeps_its_kind() {
        for (errno, kind) in [(28, io::ErrorKind::StorageFull), (32, io::ErrorKind::BrokenPipe)] {
            let error = named(io::Error::from_raw_os_error(errno));
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().starts_with("cannot write to standard output: E"), "{error}");
        }
    }
}
