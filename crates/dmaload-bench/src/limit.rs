//! Measures the device limit with a loop that keeps many direct reads in flight. The loop shares
//! no code with the engine.
//!
//! `fio --ioengine=io_uring --direct=1 --fixedbufs` reads in the same way. To measure the limit,
//! each slot of the ring repeatedly reads into its own buffer ([`Into::Slots`]). In the reading
//! phase of `no-overlap`, every read has its own place in memory ([`Into::Places`]).
//!
//! The total size of the buffers affects the speed of a virtual disk: the disk's host copies into
//! the guest's memory, and buffers that stay in the CPU cache are filled faster. The reads are
//! therefore measured with several [`DESTINATIONS`], and the best median is reported as the limit.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use dmaload_text::{FileError, ForPath};

use crate::sys::{Read, Reader};

/// The buffers to read into, one for each read in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Destination {
    /// The size of one read.
    pub(crate) chunk_bytes: usize,
    /// The number of reads in flight.
    pub(crate) depth: usize,
}

impl Destination {
    /// The total size of the buffers.
    pub(crate) const fn bytes(self) -> usize {
        self.chunk_bytes * self.depth
    }
}

/// Buffers of 4, 8, 16 and 64 MiB in total. The three smaller destinations have eight reads in
/// flight, which kept every tested disk busy.
pub(crate) const DESTINATIONS: [Destination; 4] = [
    Destination { chunk_bytes: 512 << 10, depth: 8 },
    Destination { chunk_bytes: 1 << 20, depth: 8 },
    Destination { chunk_bytes: 2 << 20, depth: 8 },
    LARGEST,
];
/// The largest destination. `no-overlap` uses the same chunk size and number of reads in flight.
pub(crate) const LARGEST: Destination = Destination { chunk_bytes: 4 << 20, depth: 16 };
/// The largest alignment in bytes that `O_DIRECT` usually requires for offsets, lengths and
/// addresses.
const ALIGNMENT: usize = 4096;

/// The memory into which chunks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// Each slot of the ring has a buffer, which its reads overwrite one after another.
    Slots(Destination),
    /// Each chunk has its own place in memory, as assigned by [`plan`].
    Places,
}

impl Into {
    /// The number of reads in flight.
    fn depth(self) -> usize {
        match self {
            Into::Slots(destination) => destination.depth,
            Into::Places => LARGEST.depth,
        }
    }

    fn place(self, slot: usize, chunk: &Chunk) -> usize {
        match self {
            Into::Slots(destination) => slot * destination.chunk_bytes,
            Into::Places => chunk.at,
        }
    }
}

/// A range of a file, read by one request, or by several after a short read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) file: usize,
    pub(crate) offset: u64,
    /// The length of the chunk, not rounded up to whole blocks.
    pub(crate) bytes: usize,
    /// The chunk's offset in the region that holds all files.
    pub(crate) at: usize,
}

/// Divides files with these lengths into chunks of at most `chunk_bytes`. Returns the chunks, and
/// the size in bytes of the region that holds all files. Each file begins at a multiple of
/// [`ALIGNMENT`] in this region, and no chunk crosses a multiple of `part_bytes`.
pub(crate) fn plan(lengths: &[u64], part_bytes: usize, chunk_bytes: usize) -> (Vec<Chunk>, usize) {
    let mut chunks = Vec::new();
    let mut at = 0;
    for (file, &length) in lengths.iter().enumerate() {
        let mut offset = 0;
        while offset < length {
            let left = usize::try_from(length - offset).unwrap_or(usize::MAX);
            let bytes = chunk_bytes.min(left).min(part_bytes - at % part_bytes);
            chunks.push(Chunk { file, offset, bytes, at });
            offset += bytes as u64;
            at += bytes.next_multiple_of(ALIGNMENT);
        }
    }
    (chunks, at)
}

/// Opens files for direct reads.
///
/// # Errors
/// If a file can't be opened with `O_DIRECT`.
pub(crate) fn open(paths: &[PathBuf]) -> Result<Vec<File>, FileError> {
    let open = |path: &PathBuf| {
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).for_path("open with O_DIRECT", path)
    };
    paths.iter().map(open).collect()
}

/// A chunk that is being read.
#[derive(Debug, Clone, Copy)]
struct Active {
    chunk: Chunk,
    done: usize,
}

/// Reads all chunks.
///
/// # Errors
/// If a read fails, or a file was truncated.
pub(crate) fn read_all(
    reader: &mut Reader,
    files: &[File],
    paths: &[PathBuf],
    chunks: &[Chunk],
    into: Into,
) -> Result<(), FileError> {
    let depth = into.depth();
    let mut queue = chunks.iter();
    let mut slots: Vec<Option<Active>> = vec![None; depth];
    let mut results = Vec::with_capacity(depth);
    let path = |file: usize| paths.get(file).map_or(Path::new("?"), PathBuf::as_path);
    let mut left = chunks.len();
    for slot in 0..depth {
        start(reader, files, &mut slots, slot, queue.next(), into).for_path("read", path(0))?;
    }
    while left > 0 {
        reader.wait(&mut results).for_path("wait for reads of", path(0))?;
        for (token, result) in results.drain(..) {
            let slot = usize::try_from(token).unwrap_or(usize::MAX);
            let Some(active) = slots.get_mut(slot).and_then(Option::take) else { continue };
            let place = path(active.chunk.file);
            let next = advance(active, result).for_path("read", place)?;
            if next.is_none() {
                left -= 1;
            }
            match next {
                Some(active) => push(reader, files, &mut slots, slot, active, into).for_path("read", place)?,
                None => start(reader, files, &mut slots, slot, queue.next(), into).for_path("read", place)?,
            }
        }
    }
    Ok(())
}

/// Returns the state of a chunk after a completion, or `None` once it is complete.
fn advance(active: Active, result: io::Result<usize>) -> io::Result<Option<Active>> {
    let count = match result {
        Ok(count) => count,
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => return Ok(Some(active)),
        Err(error) => return Err(error),
    };
    let done = active.done + count;
    if done >= active.chunk.bytes {
        return Ok(None);
    }
    // The next read must begin at an aligned offset.
    let done = done / ALIGNMENT * ALIGNMENT;
    if done <= active.done {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(Active { done, ..active }))
}

fn start(
    reader: &mut Reader,
    files: &[File],
    slots: &mut [Option<Active>],
    slot: usize,
    chunk: Option<&Chunk>,
    into: Into,
) -> io::Result<()> {
    chunk.map_or(Ok(()), |&chunk| push(reader, files, slots, slot, Active { chunk, done: 0 }, into))
}

fn push(
    reader: &mut Reader,
    files: &[File],
    slots: &mut [Option<Active>],
    slot: usize,
    active: Active,
    into: Into,
) -> io::Result<()> {
    let Active { chunk, done } = active;
    let file = files.get(chunk.file).ok_or(io::ErrorKind::InvalidInput)?;
    let at = into.place(slot, &chunk);
    // Direct reads need whole blocks, so the last read may extend beyond the end of the file.
    let bytes = (chunk.bytes - done).next_multiple_of(ALIGNMENT);
    reader.push(Read { file, offset: chunk.offset + done as u64, at: at + done, bytes, token: slot as u64 })?;
    if let Some(place) = slots.get_mut(slot) {
        *place = Some(active);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test values are small")]
mod tests {
    use super::*;
    use crate::memory::{PART_BYTES, Region};
    use crate::sys;
    use dmabuf::Pages;
    use dmaload::heap::{AnonHeap, Heap};
    use std::io::Write as _;
    use std::sync::Arc;

    #[test]
    fn chunks_cover_the_files_and_stay_within_a_part() {
        let lengths = [10_000, 0, 2 * PART_BYTES as u64 + 1, 4096];
        let (chunks, bytes) = plan(&lengths, PART_BYTES, LARGEST.chunk_bytes);
        for (file, &length) in lengths.iter().enumerate() {
            let own: Vec<&Chunk> = chunks.iter().filter(|chunk| chunk.file == file).collect();
            assert_eq!(own.iter().map(|chunk| chunk.bytes as u64).sum::<u64>(), length);
            assert!(own.windows(2).all(|pair| pair[0].offset + pair[0].bytes as u64 == pair[1].offset));
        }
        for chunk in &chunks {
            let end = chunk.at + chunk.bytes.next_multiple_of(ALIGNMENT);
            assert!(chunk.at % ALIGNMENT == 0 && chunk.offset % ALIGNMENT as u64 == 0 && end <= bytes, "{chunk:?}");
            assert_eq!(chunk.at / PART_BYTES, (end - 1) / PART_BYTES, "{chunk:?}");
        }
        assert!(chunks.windows(2).all(|pair| pair[0].at + pair[0].bytes <= pair[1].at));
    }

    #[test]
    fn destinations_are_distinct_and_their_buffers_do_not_overlap() {
        assert_eq!(DESTINATIONS.map(|destination| destination.bytes() >> 20), [4, 8, 16, 64]);
        for destination in DESTINATIONS {
            let chunk = Chunk { file: 0, offset: 0, bytes: destination.chunk_bytes, at: 7 };
            let into = Into::Slots(destination);
            let places: Vec<_> = (0..into.depth()).map(|slot| into.place(slot, &chunk)).collect();
            assert!(places.windows(2).all(|pair| pair[0] + destination.chunk_bytes <= pair[1]));
            assert!(destination.bytes() <= LARGEST.bytes());
        }
    }

    #[test]
    fn short_read_resumes_at_a_block_or_is_an_early_end() {
        let active = Active { chunk: Chunk { file: 0, offset: 0, bytes: 10_000, at: 0 }, done: 0 };
        assert!(advance(active, Ok(10_000)).unwrap().is_none());
        assert_eq!(advance(active, Ok(9_999)).unwrap().unwrap().done, 8192);
        assert_eq!(advance(active, Err(io::Error::from_raw_os_error(libc::EAGAIN))).unwrap().unwrap().done, 0);
        assert_eq!(advance(active, Ok(100)).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(advance(active, Ok(0)).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn reads_return_the_contents_of_the_files() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let contents: Vec<Vec<u8>> = [9 << 20, 5_000_u32]
            .into_iter()
            .map(|len| (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect())
            .collect();
        let files: Vec<_> = contents
            .iter()
            .map(|content| {
                let mut file = tempfile::NamedTempFile::new_in(folder).unwrap();
                file.write_all(content).unwrap();
                file
            })
            .collect();
        let paths: Vec<PathBuf> = files.iter().map(|file| file.path().to_owned()).collect();
        let lengths: Vec<u64> = contents.iter().map(|content| content.len() as u64).collect();
        let heap: Arc<dyn Heap> = Arc::new(AnonHeap { pages: Pages::Auto });
        let (chunks, bytes) = plan(&lengths, PART_BYTES, LARGEST.chunk_bytes);
        let Ok(mut reader) = Reader::new(LARGEST.depth as u32, Region::populated(&heap, bytes).unwrap()) else { return };
        let Ok(open) = open(&paths) else { return };
        read_all(&mut reader, &open, &paths, &chunks, Into::Places).unwrap();
        let region = reader.into_region().unwrap();
        for (file, content) in contents.iter().enumerate() {
            for chunk in chunks.iter().filter(|chunk| chunk.file == file) {
                let expected = &content[chunk.offset as usize..][..chunk.bytes];
                assert!(sys::bytes(&region)[chunk.at..][..chunk.bytes] == *expected, "{chunk:?}");
            }
        }
        // A file that is shorter than the plan assumes is an error.
        let (chunks, bytes) = plan(&[lengths[0], 50_000], PART_BYTES, LARGEST.chunk_bytes);
        let mut reader = Reader::new(LARGEST.depth as u32, Region::populated(&heap, bytes).unwrap()).unwrap();
        let error = read_all(&mut reader, &open, &paths, &chunks, Into::Places).unwrap_err();
        assert!(error.to_string().contains(paths[1].to_str().unwrap()), "{error}");
    }
}
