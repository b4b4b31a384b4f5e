use super::*;
use std::fs;

#[test]
fn file_that_is_not_regular_is_reported_by_its_kind() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    for (path, expected) in [(folder.path(), "a directory"), (&fifo, "a FIFO"), (Path::new("/dev/null"), "a character device")] {
        let Err(Error::NotAFile { kind, .. }) = OpenFile::open(path) else { panic!("{path:?}") };
        assert_eq!(kind, expected);
    }
}

/// See [`reopen`] for what goes wrong with a nonblocking descriptor.
#[test]
fn no_descriptor_is_nonblocking() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for bytes in [0, 4097] {
        fs::write(&file, vec![7; bytes]).unwrap();
        let opened = OpenFile::open(file.path()).unwrap();
        for route in Route::ALL {
            let flags = fcntl_getfl(opened.descriptor(route)).unwrap();
            assert!(!flags.contains(OFlags::NONBLOCK), "{route}, {bytes} bytes: {flags:?}");
        }
        let found = open(file.path(), OFlags::PATH, Mode::empty()).unwrap();
        for flags in [OFlags::empty(), OFlags::DIRECT] {
            let reopened = match reopen_by_path(&found, file.path(), flags) {
                // tmpfs does not support O_DIRECT before Linux 6.6.
                Err(Errno::INVAL) if flags == OFlags::DIRECT => continue,
                reopened => reopened.unwrap(),
            };
            let flags = fcntl_getfl(reopened).unwrap();
            assert!(!flags.contains(OFlags::NONBLOCK), "{flags:?}");
        }
    }
}

#[test]
fn without_procfs_another_file_at_the_path_is_detected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, b"one").unwrap();
    let found = open(&path, OFlags::PATH, Mode::empty()).unwrap();
    assert!(reopen_by_path(&found, &path, OFlags::empty()).is_ok());
    fs::remove_file(&path).unwrap();
    assert_eq!(reopen_by_path(&found, &path, OFlags::empty()).unwrap_err(), Errno::NOENT);
    // The descriptor still leads to the file.
    assert!(reopen(&found, &path, OFlags::empty()).is_ok());
    fs::write(&path, b"two").unwrap();
    assert_eq!(reopen_by_path(&found, &path, OFlags::empty()).unwrap_err(), Errno::STALE);
    fs::remove_file(&path).unwrap();
    // Opening this FIFO must not wait for a writer.
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    assert_eq!(reopen_by_path(&found, &path, OFlags::empty()).unwrap_err(), Errno::STALE);
}

#[test]
fn stat_is_used_where_statx_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, [7; 4097]).unwrap();
    let seen = Attributes::at_path(file.path()).unwrap();
    for errno in [Errno::NOSYS, Errno::PERM] {
        let refused = Attributes::from_statx_or(Err(errno), || stat(file.path())).unwrap();
        assert_eq!((refused.identity, refused.device.major), (seen.identity, seen.device.major));
        assert!(refused.from_cache && !seen.from_cache);
    }
    assert_eq!(Attributes::from_statx_or(Err(Errno::IO), || stat(file.path())).unwrap_err(), Errno::IO);
}

#[test]
fn file_has_the_same_identity_before_and_after_opening() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, [7; 4097]).unwrap();
    let (looked_at, alignment_bytes) = identify(file.path()).unwrap();
    let opened = OpenFile::open(file.path()).unwrap();
    assert_eq!((looked_at, alignment_bytes), (opened.identity, opened.alignment_bytes));
}

#[test]
fn growing_shrinking_writing_and_replacing_are_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let write = |bytes: &[u8]| fs::write(&path, bytes).unwrap();
    let opened = || {
        write(b"four");
        let file = fs::File::open(&path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        OpenFile::open(&path).unwrap()
    };
    let check = |file: &OpenFile| match file.check_unchanged(&file.identity) {
        Ok(()) => "unchanged",
        Err(Error::Changed { change, .. }) => change,
        Err(other) => panic!("{other}"),
    };
    let file = opened();
    assert_eq!(check(&file), "unchanged");
    write(b"fours");
    assert_eq!(check(&file), "it grew");
    write(b"for");
    assert_eq!(check(&file), "it shrank");

    let file = opened();
    write(b"FOUR");
    assert_eq!(check(&file), "it was modified");

    let file = opened();
    fs::remove_file(&path).unwrap();
    assert_eq!(check(&file), "unchanged");
    write(b"four");
    assert_eq!(check(&file), "it was replaced");
}
