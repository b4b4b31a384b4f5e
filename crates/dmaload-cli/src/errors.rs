//! Formats errors for the command line: adds causes, hints and file names, and replaces the names
//! of library functions and options with flags.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;

use dmabuf::printable;
use dmaload::ErrorKind;

/// Formats an error with its causes, outermost first, and with flags instead of library functions.
/// Skips causes that are already part of the text.
pub(crate) fn describe(error: &anyhow::Error) -> String {
    let text = error.chain().map(ToString::to_string).fold(String::new(), |text, next| match text {
        text if text.is_empty() => next,
        text if text.contains(&next) || text.contains(&printable::text(&next).to_string()) => text,
        text => format!("{text}: {next}"),
    });
    functions_to_flags(text)
}

/// Functions and options that the library's errors mention, and the corresponding flags.
const FUNCTIONS: [(&str, &str); 5] = [
    ("ServerOptions::allow_user", "--allow-user"),
    ("AttachOptions::trust_user", "--trust-user"),
    ("UdmabufHeap::open_despite_bug", "--despite-udmabuf-bug"),
    ("pages: a dma-heap", "--pages: a dma-heap"),
    ("the tensors layout", "--layout tensors"),
];

/// Replaces functions with flags: `f(7)` becomes `--f 7`, and `f` becomes `--f`.
fn functions_to_flags(text: String) -> String {
    FUNCTIONS.iter().fold(text, |text, (function, flag)| {
        let mut parts = text.split(function);
        let mut replaced = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let argument = part.strip_prefix('(').and_then(|part| part.split_once(')'));
            match argument.filter(|(argument, _)| argument.bytes().all(|byte| byte.is_ascii_digit())) {
                Some((argument, rest)) => replaced.push_str(&format!("{flag} {argument}{rest}")),
                None => replaced.push_str(&format!("{flag}{part}")),
            }
        }
        replaced
    })
}

/// Returns the library's hint for an error, with flags instead of the library's options.
pub(crate) fn hint(error: &dmaload::Error) -> Option<String> {
    let hint = error.hint()?;
    Some(IN_FLAGS.iter().fold(hint, |hint, (library, command)| hint.replace(library, command)))
}

/// Phrases in the library's hints, and what this command says instead. Two entries replace the
/// advice to stream, which no user of this command can follow: each subcommand either keeps all
/// segments or already streams.
const IN_FLAGS: [(&str, &str); 14] = [
    ("(allow_missing)", "(--allow-missing)"),
    ("(format `raw`)", "(--format raw)"),
    ("(format `safetensors`)", "(--format safetensors)"),
    ("(format `gguf`)", "(--format gguf)"),
    ("the `auto` format does this", "--format auto does this"),
    ("the anon heap", "--heap anon"),
    ("allow pages of any size", "load with --pages auto"),
    ("load in smaller segments", "load with a smaller --segment-size"),
    ("create a new one", "create a new one (dmaload manifest)"),
    ("attach to it", "attach to it (dmaload attach)"),
    ("raise the limit, or stream the file and drop its segments as they arrive", "or raise the limit"),
    (
        "raise the limit, or stream the load and drop its segments as they arrive",
        "raise --memory-limit; `dmaload cat` needs room only for a few segments",
    ),
    ("use larger segments, or load only a part", "use a larger --segment-size, or load less of the model (--range, --tensors)"),
    (
        "see what each heap needs; if a dma-buf is not required, the memfd heap allocates",
        "`dmaload doctor` shows what each heap needs; if a dma-buf is not required, --heap memfd allocates",
    ),
];

/// Escapes the control and invisible characters in a message, except line breaks. Names should
/// already have been escaped when they were inserted; this catches any that were not.
pub(crate) fn escape(message: &str) -> impl fmt::Display {
    fmt::from_fn(move |f| {
        for (number, line) in message.split('\n').enumerate() {
            let before = if number == 0 { "" } else { "\n" };
            write!(f, "{before}{}", printable::text(line))?;
        }
        Ok(())
    })
}

/// Adds the name of the first file being loaded, and the number of further files, to a library
/// error that names no file, such as an allocation failure.
pub(crate) fn with_files(error: dmaload::Error, paths: &[PathBuf]) -> anyhow::Error {
    let concerns_machine = matches!(
        error.kind(),
        ErrorKind::OutOfMemory | ErrorKind::PermissionDenied | ErrorKind::Unsupported | ErrorKind::Device | ErrorKind::Io
    );
    // The path in an error about a device is that of the device, not of a file being loaded.
    let names_no_file = error.path().is_none() || error.kind() == ErrorKind::Device;
    match paths {
        [first, others @ ..] if concerns_machine && names_no_file => {
            let others = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
            anyhow::Error::new(error).context(format!("{}{others}", printable::path(&first)))
        }
        _ => error.into(),
    }
}

/// Returns whether an error means that the reader of the command's output has closed the pipe, as
/// `head` does. The command then exits quietly and successfully. Checks the whole chain of causes.
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
    fn cause_is_reported_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("reading failed: {0}")]
        struct Outer(#[source] io::Error);
        let error = anyhow::Error::new(Outer(io::Error::other("torn"))).context("a.bin");
        assert_eq!(describe(&error), "a.bin: reading failed: torn");
    }

    #[test]
    fn library_functions_are_shown_as_flags() {
        for (text, expected) in [
            ("allow it (ServerOptions::allow_user(1234)), or", "allow it (--allow-user 1234), or"),
            ("allow it (ServerOptions::allow_user)", "allow it (--allow-user)"),
            ("AttachOptions::trust_user(7) or AttachOptions::trust_user(8", "--trust-user 7 or --trust-user(8"),
            ("use UdmabufHeap::open_despite_bug only if", "use --despite-udmabuf-bug only if"),
        ] {
            assert_eq!(functions_to_flags(text.to_owned()), expected);
        }
    }

    #[test]
    fn memory_error_names_the_files_and_can_be_downcast() {
        let error = dmaload::Error::NoDescriptor { heap: "memfd".to_owned(), wanted: "dma-buf" };
        let error = with_files(error, &["a".into(), "b".into(), "c".into()]);
        assert_eq!(describe(&error), "a and 2 more: heap memfd does not provide a dma-buf");
        assert!(error.downcast_ref::<dmaload::Error>().is_some());
    }

    #[test]
    fn errors_about_memory_heaps_or_the_ring_get_a_file_name() {
        use dmaload::{Errno, Error};
        let describe_with_file = |error| describe(&with_files(error, &["a".into()]));
        let refusal = dmaload::heap::HeapError::new("map memory", 1, Errno::ENOMEM);
        let device = dmaload::heap::DmaHeap::open("no/name").expect_err("a heap's name can't contain a slash");
        for error in [
            Error::Memory { heap: "memfd".to_owned(), refusal, loaded_bytes: 0, planned_bytes: 0 },
            Error::OutOfMemory { heap: "memfd".to_owned(), wanted_bytes: 2, available_bytes: 1, limit: "x".to_owned() },
            Error::NoDmaBuf { tried: vec!["udmabuf: x".to_owned()] },
            Error::Ring { errno: Errno::EIO },
            device,
        ] {
            assert_eq!(describe_with_file(error.clone()), format!("a: {error}"));
        }
        for error in [
            Error::Config("--x".to_owned()),
            Error::File { path: "b".into(), operation: "open", errno: Errno::EIO },
            Error::OverLimit { wanted_bytes: 2, limit_bytes: 1, why: "a segment" },
            Error::TooManyPieces { bytes: 9, segment_bytes: 1, pieces: 9, most_pieces: 8 },
            Error::NoSuchTensor("t".to_owned()),
            Error::ShutDown,
        ] {
            assert_eq!(describe_with_file(error.clone()), error.to_string());
        }
    }

    #[test]
    fn hints_name_the_flags_of_the_command() {
        use dmaload::Error;
        let heap = || "memfd".to_owned();
        for (error, expected) in [
            (
                Error::OutOfMemory { heap: heap(), wanted_bytes: 2, available_bytes: 1, limit: heap() },
                "free memory, or raise the limit",
            ),
            (
                Error::OverLimit { wanted_bytes: 2, limit_bytes: 1, why: "a segment" },
                "raise --memory-limit; `dmaload cat` needs room only for a few segments",
            ),
            (
                Error::TooManyPieces { bytes: 9, segment_bytes: 1, pieces: 9, most_pieces: 8 },
                "use a larger --segment-size, or load less of the model (--range, --tensors)",
            ),
            (
                Error::NoDmaBuf { tried: Vec::new() },
                "`dmaload doctor` shows what each heap needs; if a dma-buf is not required, --heap memfd allocates memory that other \
                 processes can map",
            ),
        ] {
            assert_eq!(hint(&error).as_deref(), Some(expected));
        }
    }

    #[test]
    fn every_replaced_phrase_is_in_a_hint_of_the_library() {
        use dmaload::heap::{HeapError, SizeLimit};
        use dmaload::model::{ForeignFile, ModelError};
        use dmaload::{Errno, Error};
        let model = |fault| Error::Model { path: "a".into(), fault };
        let foreign = |kind| model(ModelError::Foreign { kind, file_bytes: 1 });
        let refused = |operation, errno| {
            let refusal = HeapError::new(operation, 1, errno);
            Error::Memory { heap: "memfd".to_owned(), refusal, loaded_bytes: 0, planned_bytes: 0 }
        };
        let hints: Vec<_> = [
            Error::Incomplete { path: "a".into(), reason: String::new(), loadable: 1 },
            model(ModelError::Empty),
            foreign(ForeignFile::Gguf),
            foreign(ForeignFile::Safetensors),
            refused("create a memfd", Errno::EPERM),
            refused("populate", Errno::EOPNOTSUPP),
            Error::TooLarge {
                path: "a".into(),
                heap: "udmabuf".to_owned(),
                wanted_bytes: 2,
                limit: SizeLimit::new(1, "limit", 1),
            },
            Error::NotInManifest { path: "a".into() },
            Error::NotAFile { path: "a".into(), kind: "a socket" },
            Error::OutOfMemory { heap: "memfd".to_owned(), wanted_bytes: 2, available_bytes: 1, limit: String::new() },
            Error::OverLimit { wanted_bytes: 2, limit_bytes: 1, why: "a segment" },
            Error::TooManyPieces { bytes: 9, segment_bytes: 1, pieces: 9, most_pieces: 8 },
            Error::NoDmaBuf { tried: Vec::new() },
        ]
        .into_iter()
        .map(|error| (error.hint().unwrap_or_default(), hint(&error).unwrap_or_default()))
        .collect();
        for (library, command) in IN_FLAGS {
            let replaced = hints.iter().any(|(original, shown)| original.contains(library) && shown.contains(command));
            assert!(replaced, "no hint of the library contains {library:?}, or it is not replaced: {hints:#?}");
        }
    }

    #[test]
    fn closed_pipe_is_found_below_other_errors() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        assert!(is_closed_pipe(&Outer(io::ErrorKind::BrokenPipe.into())));
        assert!(!is_closed_pipe(&Outer(io::ErrorKind::NotFound.into())));
    }
}
