//! Makes text from untrusted sources safe to show: names of files and tensors, messages from other
//! processes.
//!
//! A control character would reach a terminal as a command, a line break would forge a log line,
//! and invisible marks that reverse the text direction can make one name look like another. All of
//! these are written as escapes (`\n`, `\u{1b}`, `\u{202e}`), and bytes that are not UTF-8 in
//! hexadecimal (`\xff`).
//!
//! In the dmaload workspace, paths and names are shown through this module, or quoted with `{:?}`,
//! which escapes all of these, too. The lint `clippy::disallowed_methods` forbids
//! [`Path::display`], which escapes nothing.

use std::fmt::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A path or text, displayed with escapes: see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Printable<'a>(&'a [u8]);

/// Displays a path with escapes.
#[must_use]
pub fn path<P: AsRef<Path> + ?Sized>(path: &P) -> Printable<'_> {
    Printable(path.as_ref().as_os_str().as_bytes())
}

/// Displays text with escapes.
#[must_use]
pub fn text<T: AsRef<str> + ?Sized>(text: &T) -> Printable<'_> {
    Printable(text.as_ref().as_bytes())
}

/// Displays a path as one word of a shell command line, for commands that users copy. The path
/// can contain spaces, quotes and semicolons. If it contains hidden characters or is not UTF-8,
/// the word is written as `$'…'`, which bash, ksh and zsh understand.
pub fn shell<P: AsRef<Path> + ?Sized>(path: &P) -> impl fmt::Display {
    fmt::from_fn(move |f| {
        let bytes = path.as_ref().as_os_str().as_bytes();
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+,:@%=".contains(byte);
        if !bytes.is_empty() && bytes.iter().all(is_plain) {
            return write!(f, "{}", self::path(path));
        }
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains(is_hidden) => write!(f, "'{}'", text.replace('\'', "'\\''")),
            _ => {
                f.write_str("$'")?;
                for &byte in bytes {
                    match byte {
                        b'\'' | b'\\' => write!(f, "\\{}", char::from(byte))?,
                        0x20..=0x7e => f.write_char(char::from(byte))?,
                        _ => write!(f, "\\x{byte:02x}")?,
                    }
                }
                f.write_str("'")
            }
        }
    })
}

/// Returns whether a terminal would interpret or hide this character.
#[must_use]
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{AD}' | '\u{61C}' | '\u{180E}'            // soft hyphen, Arabic letter mark, vowel separator
            | '\u{200B}'..='\u{200F}'                     // zero width, direction marks
            | '\u{2028}'..='\u{202E}'                     // line separators, direction embeddings
            | '\u{2060}'..='\u{206F}'                     // joiners, direction isolates
            | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}'       // byte order mark, annotations
            | '\u{E0000}'..='\u{E007F}'                   // tags
        )
}

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            Escaping(f).write_str(chunk.valid())?;
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

/// Displays a value with escapes. Use this for values whose [`fmt::Display`] output may contain
/// untrusted text.
pub fn shown(anything: impl fmt::Display) -> impl fmt::Display {
    fmt::from_fn(move |f| write!(Escaping(f), "{anything}"))
}

struct Escaping<'a, 'f>(&'a mut fmt::Formatter<'f>);

impl Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(is_hidden) {
            match part.char_indices().next_back() {
                Some((at, last)) if is_hidden(last) => {
                    self.0.write_str(part.get(..at).unwrap_or_default())?;
                    write!(self.0, "{}", last.escape_default())?;
                }
                _ => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn control_and_invisible_characters_are_escaped() {
        for (given, expected) in [
            ("model-00001.safetensors", "model-00001.safetensors"),
            ("größe 模型 🦀", "größe 模型 🦀"),
            ("\x1b]0;gone\x07", "\\u{1b}]0;gone\\u{7}"),
            ("a\nb\r\tc\x7f", "a\\nb\\r\\tc\\u{7f}"),
            ("\u{9b}2J\u{85}", "\\u{9b}2J\\u{85}"),
            ("\u{202e}gpj.w\u{2066}\u{61c}\u{feff}\u{ad}", "\\u{202e}gpj.w\\u{2066}\\u{61c}\\u{feff}\\u{ad}"),
            ("\u{2028}\u{200b}\u{e0041}", "\\u{2028}\\u{200b}\\u{e0041}"),
            ("", ""),
        ] {
            assert_eq!(text(given).to_string(), expected);
            assert_eq!(path(given).to_string(), expected);
            assert_eq!(shown(given).to_string(), expected);
        }
        let bytes = OsStr::from_bytes(b"\xff\x1b[2Ja\xe2\x80b\x9b");
        assert_eq!(path(bytes).to_string(), "\\xff\\u{1b}[2Ja\\xe2\\x80b\\x9b");
    }

    #[test]
    fn path_is_quoted_as_one_shell_word() {
        for (given, expected) in [
            ("/dev/sda1", "/dev/sda1"),
            ("a b", "'a b'"),
            ("a;rm -rf ~", "'a;rm -rf ~'"),
            ("it's", "'it'\\''s'"),
            ("$(x)`y`", "'$(x)`y`'"),
            ("a\n'\u{202e}", "$'a\\x0a\\'\\xe2\\x80\\xae'"),
            ("", "''"),
        ] {
            assert_eq!(shell(given).to_string(), expected);
        }
    }

    #[test]
    fn no_hidden_character_remains_after_escaping() {
        let all: String = ('\0'..=char::MAX).collect();
        assert!(!text(&all).to_string().contains(is_hidden));
        assert!(!shown(&all).to_string().contains(is_hidden));
    }
}
