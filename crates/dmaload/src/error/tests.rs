use super::*;
use crate::model::ForeignFile;

/// The library is also used without the `dmaload` command, so its messages name functions, never
/// command-line flags.
#[test]
fn texts_name_no_flags_of_the_command() {
    fn find_flags(folder: &std::path::Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            // The simulator and the benchmarks print commands for developers of this crate.
            if path.is_dir() && !path.ends_with("ring/sim") {
                find_flags(&path, found);
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
        find_flags(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut found);
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// A terminal title sequence, line breaks, right-to-left text, C1 control sequences, and bytes
/// that are not UTF-8.
fn hostile() -> (PathBuf, String) {
    use std::os::unix::ffi::OsStringExt;
    let text = "\u{1b}]0;x\u{7}\n\r\u{202e}\u{2066}\u{9b}2J\u{feff}\u{ad}\u{200b}\u{2028}\u{e0041}".to_owned();
    let path = std::ffi::OsString::from_vec([text.as_bytes(), b"\xff\x9b"].concat());
    (path.into(), text)
}

/// Creates a `DeviceError` by failing to open a device, which is the only way to create one.
fn device_error() -> Error {
    dmabuf::DmaHeap::open("no/name").expect_err("a heap name with a slash is invalid").into()
}

/// Returns at least one error of each variant, with hostile strings and paths.
fn errors() -> Vec<Error> {
    let (path, text) = hostile();
    let p = || path.clone();
    let t = || text.clone();
    let (route, errno, attempt) = (Route::Buffered, Errno::EIO, Attempt::Read);
    let refusal = HeapError::new("create a memfd", 1, Errno::EPERM);
    let foreign = |kind| Error::Model { path: p(), fault: ModelError::Foreign { kind, file_bytes: 1 } };
    let model = |fault| Error::Model { path: p(), fault };
    let limit = SizeLimit::new(1, t(), 1);
    vec![
        Error::Config(t()),
        Error::Start { operation: "start a thread", errno: Errno::EAGAIN },
        Error::File { path: p(), operation: "open", errno },
        Error::NotAFile { path: p(), kind: "a FIFO" },
        Error::NotAFile { path: p(), kind: "a block device" },
        Error::NoLength { path: p() },
        Error::Longer { path: p(), stated_bytes: 1 },
        Error::Read { path: p(), offset: 4096, bytes: 1, route, errno },
        Error::Rejected { path: p(), offset: 4097, bytes: 1, reason: t() },
        Error::Corrupt { path: p(), offset: 4098, bytes: 1, expected: t(), found: t(), tensors: vec![t(); 40] },
        Error::WrongLength { path: p(), bytes: 1, expected_bytes: 2 },
        Error::NotInManifest { path: p() },
        Error::Ended { path: p(), offset: 1, planned_bytes: 2, route },
        Error::Changed { path: p(), change: "it grew" },
        Error::Refused { path: p(), offset: 4099, route, attempt, errno: Errno::EINVAL },
        Error::Memory { heap: t(), refusal, loaded_bytes: 1, planned_bytes: 2 },
        Error::Panicked { code: t(), message: t() },
        Error::OutOfMemory { heap: t(), wanted_bytes: 2, available_bytes: 1, limit: t() },
        Error::OverLimit { wanted_bytes: 2, limit_bytes: 1, why: "a segment" },
        Error::HeldUp { held_bytes: 3, wanted_bytes: 2, limit_bytes: 4 },
        Error::TooManyPieces { bytes: 9, segment_bytes: 1, pieces: 9, most_pieces: 8 },
        device_error(),
        Error::TooLarge { path: p(), heap: t(), wanted_bytes: 2, limit },
        Error::NoDmaBuf { tried: vec![t(), t()] },
        Error::HandedOut { segment: 3 },
        Error::Viewed { segment: 3, views: 2 },
        Error::Straddles { tensor: t(), segments: 2 },
        Error::Selection { path: p(), reason: t() },
        Error::NoModel { path: p(), reason: t() },
        Error::Incomplete { path: p(), reason: t(), loadable: 1 },
        Error::DuplicateTensor { tensor: t(), first: p(), second: p() },
        Error::AmbiguousTensor { tensor: t(), paths: vec![p(); 9] },
        Error::NotSelected { tensor: t(), path: p() },
        Error::NotLoaded { path: p(), range: 7..9 },
        Error::NotContiguous { tensor: t(), rows: 2 },
        Error::Unaligned { tensor: t(), offset: 1, alignment_bytes: 2, why: "copying is not allowed" },
        Error::Importer { segments: 2, segment_bytes: 2, max_segments: 1, max_segment_bytes: 1 },
        Error::NoSuchTensor(t()),
        Error::NoDescriptor { heap: t(), wanted: "dma-buf" },
        Error::Share { socket: p(), reason: t() },
        Error::ShutDown,
        Error::Ring { errno: Errno::EBADF },
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
fn untrusted_text_is_always_escaped() {
    for error in errors() {
        for text in std::iter::once(error.to_string()).chain(error.hint()) {
            assert!(!text.contains(printable::is_hidden), "{error:?}: {text:?}");
        }
    }
}

#[test]
fn hints_name_the_librarys_options() {
    let flag = |text: &str| text.split([' ', '(', '`']).any(|word| word.starts_with("--"));
    for error in errors() {
        let hint = error.hint().unwrap_or_default();
        assert!(!flag(&hint) && !hint.contains("`dmaload"), "{hint}");
    }
}

#[test]
fn refused_memory_names_the_limit() {
    let hint_for_bytes = |heap: &str, step, bytes, errno| {
        let refusal = HeapError::new(step, bytes, errno);
        let error = Error::Memory { heap: heap.to_owned(), refusal, loaded_bytes: 0, planned_bytes: 0 };
        error.hint().unwrap_or_default()
    };
    let hint_for = |heap: &str, step, errno| hint_for_bytes(heap, step, 1, errno);
    let no_limit = hint_for_bytes("memfd", "reserve addresses", 200 << 40, Errno::ENOMEM);
    assert!(no_limit.contains("no process") && !no_limit.contains("ulimit"), "{no_limit}");
    for step in ["reserve addresses", "map memory", "move a mapping", "allocate a staging buffer"] {
        assert!(hint_for("memfd", step, Errno::ENOMEM).contains("ulimit -v"), "{step}");
    }
    for step in ["populate memory", "use 2 MiB pages for memory", "allocate a dma-buf"] {
        let hint = hint_for("memfd", step, Errno::ENOMEM);
        assert!(hint.contains("memory.max") && !hint.contains("ulimit -v"), "{step}: {hint}");
    }
    for errno in [Errno::EPERM, Errno::EACCES, Errno::ENOSYS] {
        assert!(hint_for("memfd", "create a memfd", errno).contains("anon"));
        assert!(!hint_for("system", "allocate a dma-buf", errno).contains("anon"));
    }
    let files = hint_for("memfd", "create a memfd", Errno::EMFILE);
    assert!(files.contains("ulimit -n") && !files.contains("layout"), "{files}");
}

/// The values that an error's accessors return.
#[derive(Debug, PartialEq)]
struct Answers {
    kind: ErrorKind,
    errno: Option<Errno>,
    has_path: bool,
    offset: Option<u64>,
    has_source: bool,
}

/// Returns the number of an error's variant, and what its accessors should return if the error
/// comes from [`errors`]. When a variant is added to [`Error`], this function does not compile
/// until it handles the variant, and the test below fails until [`errors`] contains it.
fn expected(error: &Error) -> (usize, Answers) {
    let without_path = |kind| Answers { kind, errno: None, has_path: false, offset: None, has_source: false };
    let on_file = |kind| Answers { has_path: true, ..without_path(kind) };
    let at = |kind, offset| Answers { offset: Some(offset), ..on_file(kind) };
    match error {
        Error::Config(_) => (0, without_path(ErrorKind::Config)),
        Error::Start { .. } => (1, Answers { errno: Some(Errno::EAGAIN), ..without_path(ErrorKind::Io) }),
        Error::File { .. } => (2, Answers { errno: Some(Errno::EIO), ..on_file(ErrorKind::Io) }),
        Error::NotAFile { .. } => (3, on_file(ErrorKind::InvalidInput)),
        Error::NoLength { .. } => (4, on_file(ErrorKind::InvalidInput)),
        Error::Longer { .. } => (5, on_file(ErrorKind::InvalidInput)),
        Error::Read { .. } => (6, Answers { errno: Some(Errno::EIO), ..at(ErrorKind::Io, 4096) }),
        Error::Rejected { .. } => (7, at(ErrorKind::Corrupt, 4097)),
        Error::Corrupt { .. } => (8, at(ErrorKind::Corrupt, 4098)),
        Error::WrongLength { .. } => (9, on_file(ErrorKind::Corrupt)),
        Error::NotInManifest { .. } => (10, on_file(ErrorKind::NotFound)),
        Error::Ended { .. } => (11, at(ErrorKind::Changed, 1)),
        Error::Changed { .. } => (12, on_file(ErrorKind::Changed)),
        Error::Refused { .. } => (13, Answers { errno: Some(Errno::EINVAL), ..at(ErrorKind::Unsupported, 4099) }),
        Error::Memory { .. } => {
            (14, Answers { errno: Some(Errno::EPERM), has_source: true, ..without_path(ErrorKind::PermissionDenied) })
        }
        Error::Panicked { .. } => (15, without_path(ErrorKind::Panicked)),
        Error::OutOfMemory { .. } => (16, without_path(ErrorKind::OutOfMemory)),
        Error::OverLimit { .. } => (17, without_path(ErrorKind::OverLimit)),
        Error::HeldUp { .. } => (18, without_path(ErrorKind::OverLimit)),
        Error::TooManyPieces { .. } => (19, without_path(ErrorKind::TooLarge)),
        Error::Model { .. } => (20, Answers { has_source: true, ..on_file(ErrorKind::InvalidModel) }),
        Error::Device(_) => (21, Answers { errno: Some(Errno::EINVAL), has_source: true, ..on_file(ErrorKind::Device) }),
        Error::TooLarge { .. } => (22, on_file(ErrorKind::TooLarge)),
        Error::NoDmaBuf { .. } => (23, without_path(ErrorKind::Device)),
        Error::HandedOut { .. } => (24, without_path(ErrorKind::InUse)),
        Error::Viewed { .. } => (25, without_path(ErrorKind::InUse)),
        Error::Straddles { .. } => (26, without_path(ErrorKind::Placement)),
        Error::Selection { .. } => (27, on_file(ErrorKind::InvalidInput)),
        Error::NoModel { .. } => (28, on_file(ErrorKind::NotFound)),
        Error::Incomplete { .. } => (29, on_file(ErrorKind::Incomplete)),
        Error::DuplicateTensor { .. } => (30, on_file(ErrorKind::Ambiguous)),
        Error::AmbiguousTensor { .. } => (31, on_file(ErrorKind::Ambiguous)),
        Error::NotSelected { .. } => (32, on_file(ErrorKind::NotLoaded)),
        Error::NotLoaded { .. } => (33, at(ErrorKind::NotLoaded, 7)),
        Error::NotContiguous { .. } => (34, without_path(ErrorKind::Placement)),
        Error::Unaligned { .. } => (35, Answers { offset: Some(1), ..without_path(ErrorKind::Placement) }),
        Error::Importer { .. } => (36, without_path(ErrorKind::Placement)),
        Error::NoSuchTensor(_) => (37, without_path(ErrorKind::NotFound)),
        Error::NoDescriptor { .. } => (38, without_path(ErrorKind::Unsupported)),
        Error::Share { .. } => (39, on_file(ErrorKind::Share)),
        Error::ShutDown => (40, without_path(ErrorKind::ShutDown)),
        Error::Ring { .. } => (41, Answers { errno: Some(Errno::EBADF), ..without_path(ErrorKind::Io) }),
    }
}
const VARIANTS: usize = 42;

#[test]
fn every_variant_has_kind_errno_path_and_offset() {
    let mut seen = [false; VARIANTS];
    for error in errors() {
        let (number, expected) = expected(&error);
        seen[number] = true;
        let answers = Answers {
            kind: error.kind(),
            errno: error.errno(),
            has_path: error.path().is_some(),
            offset: error.offset(),
            has_source: std::error::Error::source(&error).is_some(),
        };
        assert_eq!(answers, expected, "{error:?}");
    }
    let missing: Vec<_> = (0..VARIANTS).filter(|&number| !seen[number]).collect();
    assert!(missing.is_empty(), "`errors` lacks the variants with the numbers {missing:?}");
}

#[test]
fn path_is_part_of_the_text() {
    let (hostile, _) = hostile();
    for error in errors() {
        match (&error, error.path()) {
            (Error::Device(device), path) => assert_eq!(path, Some(device.path.as_path())),
            (_, Some(path)) => {
                assert_eq!(path, hostile);
                assert!(error.to_string().contains(&printable::path(path).to_string()), "{error}");
            }
            (_, None) => {}
        }
    }
}

#[test]
fn source_is_the_inner_error_and_part_of_the_text() {
    use std::error::Error as _;
    let mut sources = 0;
    for error in errors() {
        let Some(source) = error.source() else { continue };
        sources += 1;
        let is_inner = match &error {
            Error::Model { fault, .. } => source.downcast_ref() == Some(fault),
            Error::Memory { refusal, .. } => source.downcast_ref() == Some(refusal),
            Error::Device(device) => source.downcast_ref() == Some(device),
            _ => false,
        };
        assert!(is_inner, "{error:?}: {source:?}");
        assert!(error.to_string().contains(&printable::shown(source).to_string()), "{error}");
    }
    assert!(sources >= 3, "{sources}");
}

#[test]
fn errno_decides_the_kind_where_it_matters() {
    let file = |errno| Error::File { path: "m".into(), operation: "open", errno }.kind();
    let memory = |errno| {
        let refusal = HeapError::new("map memory", 1, errno);
        Error::Memory { heap: "vendor".to_owned(), refusal, loaded_bytes: 0, planned_bytes: 0 }.kind()
    };
    for (errno, of_file, of_memory) in [
        (Errno::ENOENT, ErrorKind::NotFound, ErrorKind::Io),
        (Errno::ENOTDIR, ErrorKind::NotFound, ErrorKind::Io),
        (Errno::ESTALE, ErrorKind::Changed, ErrorKind::Io),
        (Errno::EACCES, ErrorKind::PermissionDenied, ErrorKind::PermissionDenied),
        (Errno::EPERM, ErrorKind::PermissionDenied, ErrorKind::PermissionDenied),
        (Errno::ENOMEM, ErrorKind::OutOfMemory, ErrorKind::OutOfMemory),
        (Errno::ENOSYS, ErrorKind::Unsupported, ErrorKind::Unsupported),
        (Errno::EOPNOTSUPP, ErrorKind::Unsupported, ErrorKind::Unsupported),
        (Errno::EMFILE, ErrorKind::Io, ErrorKind::Io),
        (Errno::EIO, ErrorKind::Io, ErrorKind::Io),
    ] {
        assert_eq!((file(errno), memory(errno)), (of_file, of_memory), "{errno:?}");
    }
    let read = |errno| Error::Read { path: "m".into(), offset: 0, bytes: 1, route: Route::PreadDirect, errno }.kind();
    let kinds = [Errno::ESTALE, Errno::ENOMEM, Errno::EIO].map(read);
    assert_eq!(kinds, [ErrorKind::Changed, ErrorKind::OutOfMemory, ErrorKind::Io]);
}
