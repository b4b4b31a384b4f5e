//! Errors in the words of this command line: with their causes, their hints, and the files that they are about.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;

use dmaload::dmabuf::printable;

/// An error with its causes, outermost first, in the words of this command line. Errors that have told their cause already don't
/// tell it again.
pub(crate) fn told(error: &anyhow::Error) -> String {
    let told = error.chain().map(ToString::to_string).fold(String::new(), |told, next| match told {
        told if told.is_empty() => next,
        told if told.contains(&next) => told,
        told => format!("{told}: {next}"),
    });
    in_flags(told)
}

/// What the library's errors call its functions, and what they are called here.
const FUNCTIONS: [(&str, &str); 4] = [
    ("ServerOptions::allow_user", "--allow-user"),
    ("AttachOptions::trust_user", "--trust-user"),
    ("UdmabufHeap::open_despite_bug", "--despite-udmabuf-bug"),
    ("pages: a dma-heap", "--pages: a dma-heap"),
];

/// The same text with flags in the place of functions: `f(7)` is `--f 7`, and `f` is `--f`.
fn in_flags(text: String) -> String {
    FUNCTIONS.iter().fold(text, |text, (function, flag)| {
        let mut parts = text.split(function);
        let mut told = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let argument = part.strip_prefix('(').and_then(|part| part.split_once(')'));
            match argument.filter(|(argument, _)| argument.bytes().all(|byte| byte.is_ascii_digit())) {
                Some((argument, rest)) => told.push_str(&format!("{flag} {argument}{rest}")),
                None => told.push_str(&format!("{flag}{part}")),
            }
        }
        told
    })
}

/// What a person can do about an error of the engine, in the words of this command line.
pub(crate) fn hint(error: &dmaload::Error) -> Option<String> {
    use dmaload::Error;
    let hint = match error {
        // No command can do what the library says of these: each of them holds or streams as it does.
        Error::OutOfMemory { .. } => "free memory, or raise the limit".to_owned(),
        Error::OverLimit { .. } => "raise --memory-limit; `dmaload cat` needs room for some segments only".to_owned(),
        Error::TooManyPieces { .. } => "use a larger --segment-size, or load a part of it (--range, --tensors)".to_owned(),
        Error::NoDmaBuf { .. } => {
            "`dmaload doctor` tells what each heap needs; without a dma-buf, --heap memfd gives memory that other processes can map"
                .to_owned()
        }
        _ => error.hint()?,
    };
    Some(IN_FLAGS.iter().fold(hint, |hint, (library, command)| hint.replace(library, command)))
}

/// What the library's hints call its options, and what they are called here.
const IN_FLAGS: [(&str, &str); 10] = [
    ("(allow_missing)", "(--allow-missing)"),
    ("(the format raw)", "(--format raw)"),
    ("(the format safetensors)", "(--format safetensors)"),
    ("(the format gguf)", "(--format gguf)"),
    ("the format auto does so", "--format auto does so"),
    ("the heap anon", "--heap anon"),
    ("let pages have any size", "load with --pages auto"),
    ("load in smaller segments", "load with a smaller --segment-size"),
    ("make a new one", "make a new one (dmaload manifest)"),
    ("attach to it", "attach to it (dmaload attach)"),
];

/// A message whose lines are its own, and nothing else in it reaches the terminal as a command. Names were escaped
/// where they were put into it; this holds for all that could be forgotten.
pub(crate) fn lines(message: &str) -> impl fmt::Display {
    fmt::from_fn(move |f| {
        for (number, line) in message.split('\n').enumerate() {
            let before = if number == 0 { "" } else { "\n" };
            write!(f, "{before}{}", printable::text(line))?;
        }
        Ok(())
    })
}

/// Says which files were being loaded, where an error of the engine speaks of none: of memory, for example.
pub(crate) fn about(error: dmaload::Error, paths: &[PathBuf]) -> anyhow::Error {
    use dmaload::Error;
    let names_no_file = matches!(
        error,
        Error::Memory { .. }
            | Error::OutOfMemory { .. }
            | Error::NoDescriptor { .. }
            | Error::NoDmaBuf { .. }
            | Error::Device(_)
            | Error::Ring { .. }
    );
    match paths {
        [first, others @ ..] if names_no_file => {
            let others = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
            anyhow::Error::new(error).context(format!("{}{others}", printable::path(&first)))
        }
        _ => error.into(),
    }
}

/// Whether an error says that whoever read our output has closed it, as `head` does: then leave quietly, with
/// success. Looks through the whole chain of causes.
#[must_use]
pub(crate) fn is_closed_pipe(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            return true;
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("reading failed: {0}")]
        struct Outer(#[source] io::Error);
        let error = anyhow::Error::new(Outer(io::Error::other("torn"))).context("a.bin");
        assert_eq!(told(&error), "a.bin: reading failed: torn");
    }

    #[test]
    fn functions_of_the_library_are_told_as_flags() {
        for (text, expected) in [
            ("allow it (ServerOptions::allow_user(1234)), or", "allow it (--allow-user 1234), or"),
            ("allow it (ServerOptions::allow_user)", "allow it (--allow-user)"),
            ("AttachOptions::trust_user(7) or AttachOptions::trust_user(8", "--trust-user 7 or --trust-user(8"),
            ("use UdmabufHeap::open_despite_bug only if", "use --despite-udmabuf-bug only if"),
        ] {
            assert_eq!(in_flags(text.to_owned()), expected);
        }
    }

    #[test]
    fn an_error_of_memory_names_the_files_and_is_still_found() {
        let error = dmaload::Error::NoDescriptor { heap: "memfd".to_owned(), wanted: "dma-buf" };
        let error = about(error, &["a".into(), "b".into(), "c".into()]);
        assert_eq!(told(&error), "a and 2 more: heap memfd gives no dma-buf");
        assert!(error.downcast_ref::<dmaload::Error>().is_some());
    }

    #[test]
    fn a_closed_pipe_is_found_below_other_errors() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        assert!(is_closed_pipe(&Outer(io::ErrorKind::BrokenPipe.into())));
        assert!(!is_closed_pipe(&Outer(io::ErrorKind::NotFound.into())));
    }
}
