//! Writes cpio archives in the `newc` format, which the kernel accepts as an initramfs. Each entry
//! consists of a header of hexadecimal numbers, the entry's name and its contents.

// File types, as in `st_mode`.
const FOLDER: u32 = 0o04_0000;
const FILE: u32 = 0o10_0000;
const DEVICE: u32 = 0o02_0000;

/// An archive that is written entry by entry. Root owns every entry.
#[derive(Debug, Default)]
pub(crate) struct CpioArchive {
    bytes: Vec<u8>,
    entries: u32,
}

impl CpioArchive {
    /// Adds a folder. Its parent folders must already have been added.
    pub(crate) fn add_folder(&mut self, path: &str) {
        self.add_entry(path, FOLDER | 0o755, &[], (0, 0));
    }

    /// Adds a file that all users may read. If `program` is set, they may also run it.
    pub(crate) fn add_file(&mut self, path: &str, contents: &[u8], program: bool) {
        self.add_entry(path, FILE | if program { 0o755 } else { 0o644 }, contents, (0, 0));
    }

    /// Adds a character device.
    pub(crate) fn add_device(&mut self, path: &str, number: (u32, u32)) {
        self.add_entry(path, DEVICE | 0o600, &[], number);
    }

    /// Finishes the archive, and returns its bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.add_entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn add_entry(&mut self, path: &str, mode: u32, contents: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let len = u32::try_from(contents.len()).expect("a file must be shorter than 4 GiB, the limit of newc");
        let name_len = u32::try_from(path.len() + 1).expect("path length overflow");
        let links = 1;
        // Inode, mode, user, group, links, time, length, the file system's device (major, minor),
        // the entry's own device (major, minor), length of the name, checksum.
        let fields = [self.entries, mode, 0, 0, links, 0, len, 0, 0, device.0, device.1, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(contents);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the name, mode and contents of each entry of an archive.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, len, name_len) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_len - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name_len - 1], 0);
            let begin = (110 + name_len).next_multiple_of(4);
            entries.push((name, mode, bytes[begin..begin + len].to_vec()));
            bytes = &bytes[(begin + len).next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn written_entries_can_be_read() {
        let mut archive = CpioArchive::default();
        archive.add_folder("bin");
        archive.add_file("bin/program", b"12345", true);
        archive.add_file("empty", b"", false);
        archive.add_device("console", (5, 1));
        let entries = read(&archive.finish());
        let expected = [
            ("bin", 0o040_755, &b""[..]),
            ("bin/program", 0o100_755, b"12345"),
            ("empty", 0o100_644, b""),
            ("console", 0o020_600, b""),
            ("TRAILER!!!", 0, b""),
        ];
        assert_eq!(entries, expected.map(|(name, mode, contents)| (name.to_owned(), mode, contents.to_vec())));
    }
}
