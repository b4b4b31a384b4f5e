//! The command's standard output: text, or one JSON object.
//!
//! Everything except help is printed through [`stdout`], which adds "standard output" to errors
//! such as a full disk. The lint `clippy::disallowed_methods` forbids other access to standard
//! output. Printed JSON must be escaped with [`json`] or [`escape`].

use std::io::{self, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use dmabuf::printable;
use dmaload_text::Named;
use serde_json::Value;

/// A failure to write to standard output.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {}", Named(.0))]
struct OutputError(io::Error);

/// Standard output. Adds "standard output" to errors from writing.
#[derive(Debug)]
pub(crate) struct Stdout(StdoutLock<'static>);

/// Locks standard output. If it was closed when the program started, writing to it fails.
#[allow(clippy::disallowed_methods, reason = "the only use: all other code calls this function")]
pub(crate) fn stdout() -> Stdout {
    Stdout(io::stdout().lock())
}

/// Adds "standard output" to an error. Keeps the error's kind, because
/// [`crate::errors::is_closed_pipe`] recognizes a closed pipe by it.
fn name_error(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), OutputError(error))
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if crate::sys::stdout_was_closed() {
            return Err(name_error(rustix::io::Errno::BADF.into()));
        }
        match self.0.write(bytes) {
            // `write_all` retries interrupted writes, which it recognizes by their kind.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            written => written.map_err(name_error),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(name_error)
    }
}

/// Whether a run with `--json` has begun to write its object.
static OBJECT_WRITTEN: AtomicBool = AtomicBool::new(false);

/// Writes the one object that a run with `--json` prints.
///
/// # Errors
/// If standard output can't be written to.
pub(crate) fn write_json(object: &Value) -> io::Result<()> {
    OBJECT_WRITTEN.store(true, Ordering::Relaxed);
    let mut stdout = stdout();
    writeln!(stdout, "{}", json(object))?;
    stdout.flush()
}

/// Writes the object that describes an error, unless the run has already begun to write its only
/// object.
pub(crate) fn write_json_error(object: &Value) -> io::Result<()> {
    if OBJECT_WRITTEN.load(Ordering::Relaxed) { Ok(()) } else { write_json(object) }
}

/// Formats a value as JSON, for programs and terminals. Escapes all characters that a terminal
/// would interpret or hide.
///
/// JSON itself requires escapes only for characters below U+0020. Line breaks separate the lines
/// of the JSON and are kept. All other characters that need an escape occur only in strings, where
/// the escape is equivalent to the character.
pub(crate) fn json(value: &Value) -> String {
    escape(format!("{value:#}"))
}

/// Escapes the same characters as [`json`] in text that is already JSON.
pub(crate) fn escape(text: String) -> String {
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

/// Returns the width of the terminal in characters; `None` if standard output is not a terminal or
/// does not report a width.
#[must_use]
pub(crate) fn terminal_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    // Serial consoles and some CI runners have a terminal without a size.
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hidden_characters_are_escaped_equivalently() {
        let all: String = (0..0x3000).chain(0xe0000..0xe0080).filter_map(char::from_u32).collect();
        let value = json!({ "name": all, all.clone(): [all] });
        let text = json(&value);
        assert!(!text.contains(|c| c != '\n' && printable::is_hidden(c)));
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }

    #[test]
    fn error_names_standard_output_and_keeps_its_kind() {
        for (errno, kind) in [(28, io::ErrorKind::StorageFull), (32, io::ErrorKind::BrokenPipe)] {
            let error = name_error(io::Error::from_raw_os_error(errno));
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().starts_with("cannot write to standard output: E"), "{error}");
        }
    }
}
