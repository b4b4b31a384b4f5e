use super::*;
use crate::model::ForeignFile;

/// Programs have user interfaces of their own: the library's texts name its functions, and no flags of the command.
#[test]
fn texts_name_no_flags_of_the_command() {
    fn look(folder: &std::path::Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            // Simulated worlds and benches print commands for those who work on this crate.
            if path.is_dir() && !path.ends_with("ring/sim") {
                look(&path, found);
            }
            if path.is_dir() || path.ends_with("tests.rs") || path.ends_with("instructions.rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let is_flag =
                |at: usize| text[..at].ends_with([' ', '(', '`', '"']) && text[at + 2..].starts_with(char::is_alphabetic);
            let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]"));
            for line in lines.filter(|line| !line.trim_start().starts_with("//")) {
                let start = line.as_ptr().addr() - text.as_ptr().addr();
                let has_flag = line.match_indices("--").any(|(at, _)| is_flag(start + at));
                if has_flag || line.contains("`dmaload ") {
                    found.push(format!("{}: {line}", printable::path(&path)));
                }
            }
        }
    }
    let mut found = Vec::new();
    for folder in ["src", "../dmabuf/src"] {
        look(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut found);
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// A title for the terminal's window, line breaks, text from right to left, C1's control sequences, bytes that are not UTF-8.
fn hostile() -> (PathBuf, String) {
    use std::os::unix::ffi::OsStringExt;
    let text = "\u{1b}]0;x\u{7}\n\r\u{202e}\u{2066}\u{9b}2J\u{feff}\u{ad}\u{200b}\u{2028}\u{e0041}".to_owned();
    let path = std::ffi::OsString::from_vec([text.as_bytes(), b"\xff\x9b"].concat());
    (path.into(), text)
}

/// One of each kind that has a text or a path of somebody else's.
fn errors() -> Vec<Error> {
    let (path, text) = hostile();
    let p = || path.clone();
    let t = || text.clone();
    let (route, errno, attempt) = (Route::Buffered, Errno::IO, Attempt::Read);
    let refusal = dmabuf::Error::new("create a memfd", 1, Errno::PERM);
    let foreign = |kind| Error::Model { path: p(), fault: ModelError::Foreign { kind, file_bytes: 1 } };
    let model = |fault| Error::Model { path: p(), fault };
    let limit = SizeLimit::new(1, t(), 1);
    vec![
        Error::Config(t()),
        Error::File { path: p(), operation: "open", errno },
        Error::NotAFile { path: p(), kind: "a FIFO" },
        Error::NotAFile { path: p(), kind: "a block device" },
        Error::NoLength { path: p() },
        Error::Longer { path: p(), stated_bytes: 1 },
        Error::Read { path: p(), offset: 0, bytes: 1, route, errno },
        Error::Rejected { path: p(), offset: 0, bytes: 1, reason: t() },
        Error::Corrupt { path: p(), offset: 0, bytes: 1, expected: t(), found: t(), tensors: vec![t(); 40] },
        Error::WrongLength { path: p(), bytes: 1, expected_bytes: 2 },
        Error::NotInManifest { path: p() },
        Error::Ended { path: p(), offset: 1, planned_bytes: 2, route },
        Error::Changed { path: p(), change: "it grew" },
        Error::Refused { path: p(), offset: 0, route, attempt, errno: Errno::INVAL },
        Error::Memory { heap: t(), refusal, loaded_bytes: 1, planned_bytes: 2 },
        Error::Panicked { code: t(), message: t() },
        Error::OutOfMemory { heap: t(), wanted_bytes: 2, available_bytes: 1, limit: t() },
        Error::TooLarge { path: p(), heap: t(), wanted_bytes: 2, limit },
        Error::NoDmaBuf { tried: vec![t(), t()] },
        Error::Straddles { tensor: t(), segments: 2 },
        Error::Selection { path: p(), reason: t() },
        Error::NoModel { path: p(), reason: t() },
        Error::Incomplete { path: p(), reason: t(), loadable: 1 },
        Error::DuplicateTensor { tensor: t(), first: p(), second: p() },
        Error::AmbiguousTensor { tensor: t(), paths: vec![p(); 9] },
        Error::NotSelected { tensor: t(), path: p() },
        Error::NotLoaded { path: p(), range: 0..1 },
        Error::Apart { tensor: t(), rows: 2 },
        Error::Unaligned { tensor: t(), offset: 1, alignment_bytes: 2, why: "copying is refused" },
        Error::NoSuchTensor(t()),
        Error::NoDescriptor { heap: t(), wanted: "dma-buf" },
        Error::Share { socket: p(), reason: t() },
        foreign(ForeignFile::LfsPointer { bytes: Some(5) }),
        foreign(ForeignFile::Text { start: t() }),
        foreign(ForeignFile::Json { start: t() }),
        foreign(ForeignFile::Gguf),
        foreign(ForeignFile::Safetensors),
        foreign(ForeignFile::Zeros),
        model(ModelError::DuplicateTensor { tensor: t() }),
        model(ModelError::UnknownDType { tensor: t(), found: t() }),
        model(ModelError::BadNumber { tensor: t(), key: "shape", found: t() }),
        model(ModelError::NotJson { offset: 1, reason: t() }),
        model(ModelError::WrongType { tensor: t(), key: None, offset: 1, reason: t() }),
        model(ModelError::MetadataNotString { key: t(), offset: 1, reason: t() }),
        model(ModelError::MetadataNotObject { offset: 1, reason: t() }),
        model(ModelError::Gguf { offset: 1, reason: t() }),
        model(ModelError::GgufType { offset: 1, tensor: t(), found: 99 }),
        model(ModelError::GgufVersion { found: 9 }),
        model(ModelError::Index { offset: 1, reason: t() }),
        model(ModelError::IndexLeavesFolder { name: t() }),
        model(ModelError::IndexDisagrees { tensor: t() }),
    ]
}

#[test]
fn no_text_of_others_reaches_a_terminal_unescaped() {
    for error in errors() {
        for text in std::iter::once(error.to_string()).chain(error.hint()) {
            assert!(!text.contains(printable::is_hidden), "{error:?}: {text:?}");
        }
    }
}

#[test]
fn hints_speak_of_the_librarys_options() {
    let flag = |text: &str| text.split([' ', '(', '`']).any(|word| word.starts_with("--"));
    for error in errors() {
        let hint = error.hint().unwrap_or_default();
        assert!(!flag(&hint) && !hint.contains("`dmaload"), "{hint}");
    }
}

#[test]
fn refused_memory_says_which_limit_it_is() {
    let told_of = |heap: &str, step, bytes, errno| {
        let refusal = dmabuf::Error::new(step, bytes, errno);
        let error = Error::Memory { heap: heap.to_owned(), refusal, loaded_bytes: 0, planned_bytes: 0 };
        error.hint().unwrap_or_default()
    };
    let told = |heap: &str, step, errno| told_of(heap, step, 1, errno);
    let no_limit = told_of("memfd", "reserve addresses", 200 << 40, Errno::NOMEM);
    assert!(no_limit.contains("no process") && !no_limit.contains("ulimit"), "{no_limit}");
    for step in ["reserve addresses", "map memory", "move a mapping", "allocate a staging buffer"] {
        assert!(told("memfd", step, Errno::NOMEM).contains("ulimit -v"), "{step}");
    }
    for step in ["populate memory", "put 2 MiB pages under memory", "allocate a dma-buf"] {
        let hint = told("memfd", step, Errno::NOMEM);
        assert!(hint.contains("memory.max") && !hint.contains("ulimit -v"), "{step}: {hint}");
    }
    for errno in [Errno::PERM, Errno::ACCESS, Errno::NOSYS] {
        assert!(told("memfd", "create a memfd", errno).contains("anon"));
        assert!(!told("system", "allocate a dma-buf", errno).contains("anon"));
    }
    let files = told("memfd", "create a memfd", Errno::MFILE);
    assert!(files.contains("ulimit -n") && !files.contains("layout"), "{files}");
}
