//! Tests that damaged headers cause no panic, no endless loop and no out-of-bounds read, and that
//! parsing them uses memory in proportion to the input. Also tests that the safetensors crate
//! finds the same tensors in every safetensors file that dmaload accepts.
//!
//! The tests damage stored inputs (`tests/corpus`) at random, reproducibly for each seed.
//! `DMALOAD_INPUTS=1000000` tries more inputs of each kind, and `DMALOAD_SEED=2` tries others. If
//! a parser panics or a check fails, the input is printed: add it to the corpus.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a setup error should fail the test; tests report what they tried"
)]
#![allow(unsafe_code, reason = "implements a global allocator")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use dmaload::model::gguf::{self, Parsed};
use dmaload::model::index::Index;
use dmaload::model::safetensors::{Sniff, parse, sniff};
use dmaload::verify::Manifest;
use dmaload::{LoadOptions, Loader};
use dmaload_testing::Random;
use safetensors::SafeTensors;

/// The system allocator, with two counters for each thread: the bytes that are currently
/// allocated, and their peak.
struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // The counters of a thread that is exiting may already be destroyed. Its allocations are then
    // not counted, because this function must not panic.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(now.get())));
    });
}

// SAFETY: all calls are forwarded to the system allocator, which upholds the contract. Counting
// neither allocates nor panics: the counters need no initialization, and `try_with` returns
// errors.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller upholds the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes.cast_signed() - layout.size().cast_signed());
        // SAFETY: the caller upholds the contract of `GlobalAlloc::realloc`.
        unsafe { System.realloc(place, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Calls a function and returns its result, its peak memory usage in bytes, and its duration.
fn measure<T>(call: impl FnOnce() -> T) -> (T, usize, Duration) {
    let before = NOW.get();
    MOST.set(before);
    let started = Instant::now();
    let result = call();
    (result, (MOST.get() - before).try_into().unwrap_or(0), started.elapsed())
}

/// Texts that often break parsers.
const TOKENS: [&str; 36] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "\\",
    "\\u0000",
    "\\ud800",
    "null",
    "true",
    "-1",
    "0",
    "1",
    "1e999",
    "0.5",
    "01",
    "+1",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775808",
    "4294967296",
    "340282366920938463463374607431768211456",
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "\"__metadata__\"",
    "\"F32\"",
    "\"chunks\"",
    "\"bytes\"",
    "\"chunk_bytes\":1",
    "[[[[[[[[[[[[[[[[",
    "\u{0}",
    "\u{202E}",
    "ÿ",
];

/// Returns a random input from the corpus with one to four random changes.
fn damaged(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = corpus[random.index(corpus.len())].clone();
    for _ in 0..1 + random.index(4) {
        let at = random.index(input.len() + 1);
        let end = (at + random.index(24)).min(input.len());
        match random.index(9) {
            0 if at < input.len() => input[at] ^= 1 << random.index(8),
            1 => input.insert(at, u8::try_from(random.index(256)).unwrap()),
            2 => drop(input.drain(at..end)),
            3 => input.truncate(at),
            4 => drop(input.splice(at..end, TOKENS[random.index(TOKENS.len())].bytes())),
            5 => {
                // Insert a part of another input.
                let other = &corpus[random.index(corpus.len())];
                let from = random.index(other.len() + 1);
                let to = (from + random.index(60)).min(other.len());
                drop(input.splice(at..at, other[from..to].iter().copied()));
            }
            6 => {
                // Repeat a part of the input.
                let copy = input[at..end].to_vec();
                drop(input.splice(end..end, copy));
            }
            7 => {
                // Replace a number.
                if let Some(start) = (at..input.len()).find(|&at| input[at].is_ascii_digit()) {
                    let digits = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                    let number = TOKENS[12 + random.index(12)];
                    drop(input.splice(start..start + digits, number.bytes()));
                }
            }
            // Correct the length prefix of a safetensors file (its first eight bytes), so the JSON
            // is parsed.
            _ => {
                if let Some(end) = input.iter().rposition(|&byte| byte == b'}')
                    && input.len() > 9
                    && end > 8
                {
                    input[..8].copy_from_slice(&(end as u64 - 7).to_le_bytes());
                }
            }
        }
    }
    input
}

fn read_variable(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Returns the stored inputs of a kind, sorted by file name.
fn corpus(kind: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 8, "{kind}: only {} inputs in the corpus", paths.len());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Calls `parse` with each stored input, then with damaged inputs. `parse` returns whether it
/// accepted the input.
fn for_each_input(kind: &str, mut parse: impl FnMut(&[u8]) -> bool) {
    let corpus = corpus(kind);
    let (count, seed) = (read_variable("DMALOAD_INPUTS", 20_000), read_variable("DMALOAD_SEED", 1));
    let mut random = Random::new(seed);
    let mut accepted = 0;
    for index in 0..corpus.len() as u64 + count {
        let input = match corpus.get(usize::try_from(index).unwrap()) {
            Some(stored) => stored.clone(),
            None => damaged(&mut random, &corpus),
        };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| parse(&input)));
        match result {
            Ok(is_accepted) => accepted += u64::from(is_accepted),
            Err(panic) => {
                eprintln!("{kind}: input {index} of seed {seed}: {:?}", String::from_utf8_lossy(&input));
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{kind}: {count} damaged inputs (seed {seed}) and {} stored ones, {accepted} accepted", corpus.len());
    // If nearly all inputs are refused, only the first checks were tested. If none are refused,
    // the inputs were not damaged.
    assert!(accepted > count / 200 && accepted < count, "{accepted} of {count} accepted");
}

/// Maximum memory, in bytes, that a parser may use for an input of this length. The constant term
/// covers errors and small inputs.
fn memory_limit(input: usize) -> usize {
    64 * input + 16_384
}

#[track_caller]
fn assert_bounded(input: usize, memory: usize, time: Duration) {
    assert!(memory <= memory_limit(input), "{memory} bytes of memory for an input of {input} bytes");
    assert!(time < Duration::from_secs(1), "{time:?} for an input of {input} bytes");
}

/// Parses a file as a loader does, and returns whether the parser accepts it.
fn parse_safetensors(file: &[u8]) -> bool {
    let length = file.len() as u64;
    let (map, memory, time) = measure(|| match sniff(&file[..file.len().min(9)], length, true) {
        Sniff::Safetensors { header_bytes } => parse(&file[8..8 + usize::try_from(header_bytes).unwrap()], length).ok(),
        Sniff::Broken { error } => {
            assert!(!error.to_string().is_empty());
            None
        }
        Sniff::Not { .. } => unreachable!("a file with a safetensors name is never read as raw bytes"),
    });
    assert_bounded(file.len(), memory, time);
    let Some(map) = map else { return false };
    let theirs = SafeTensors::deserialize(file).expect("the safetensors crate should accept every file that we accept");
    assert_eq!(map.len(), theirs.len());
    for tensor in map.iter() {
        let range = &tensor.file_range;
        assert!(range.start <= range.end && range.end <= length, "{tensor:?} extends past the end of the file");
        let data = theirs.tensor(&tensor.name).unwrap().data();
        let start = data.as_ptr().addr() - file.as_ptr().addr();
        assert_eq!(*range, start as u64..(start + data.len()) as u64, "{tensor:?}");
    }
    true
}

#[test]
fn damaged_safetensors_headers_cost_little_and_match_the_crate() {
    for_each_input("safetensors", parse_safetensors);
}

#[test]
fn damaged_manifests_cost_little_and_round_trip() {
    for_each_input("manifest", |json| {
        let (manifest, memory, time) = measure(|| Manifest::parse(json));
        assert_bounded(json.len(), memory, time);
        let manifest = match manifest {
            Ok(manifest) => manifest,
            Err(error) => {
                assert!(error.to_string().starts_with("invalid manifest: "), "{error}");
                return false;
            }
        };
        assert_eq!(Manifest::parse(manifest.to_json().as_bytes()), Ok(manifest));
        true
    });
}

#[test]
fn damaged_gguf_headers_cost_little_and_stay_within_the_file() {
    for_each_input("gguf", |file| {
        let length = file.len() as u64;
        let (parsed, memory, time) = measure(|| gguf::parse(file, length));
        assert_bounded(file.len(), memory, time);
        let map = match parsed {
            Ok(Parsed::Complete(map)) => map,
            Ok(Parsed::More { bytes }) => panic!("the parser has all {length} bytes, but requests {bytes}"),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return false;
            }
        };
        let mut end = map.header_bytes();
        for tensor in map.iter() {
            let blocks = tensor.shape.iter().product::<usize>() / tensor.dtype.block_elements();
            let bytes = (blocks * tensor.dtype.block_bytes()) as u64;
            assert_eq!(bytes, tensor.file_range.end - tensor.file_range.start);
            assert!(tensor.file_range.start >= end && tensor.file_range.end <= length, "{tensor:?}");
            end = tensor.file_range.end;
        }
        let (reported, memory, time) =
            measure(|| map.gguf().unwrap().iter().map(|(key, value)| format!("{key}{value}").len()).sum::<usize>());
        assert_bounded(file.len() + reported, memory, time);
        true
    });
}

#[test]
fn damaged_indices_cost_little_and_stay_in_their_folder() {
    for_each_input("index", |json| {
        let (index, memory, time) = measure(|| Index::parse(json));
        assert_bounded(json.len(), memory, time);
        let Ok(index) = index else { return false };
        for name in index.files() {
            let folder = Path::new("/folder");
            let inside = folder.join(name).components().all(|part| part != std::path::Component::ParentDir);
            assert!(inside && folder.join(name).starts_with(folder), "{name:?}");
        }
        true
    });
}

/// Loading a damaged file returns an error or the file's bytes.
#[test]
fn damaged_files_load_as_they_are_or_are_refused() {
    for (kind, names) in [("safetensors", ["model.safetensors", "model.bin"]), ("gguf", ["model.gguf", "model"])] {
        load_damaged(kind, names);
    }
}

fn load_damaged(kind: &str, names: [&str; 2]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let folder = common::folder();
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(2 << 20)).window_bytes(4 << 20).build().unwrap();
    let corpus = corpus(kind);
    let mut random = Random::new(read_variable("DMALOAD_SEED", 1));
    let count = read_variable("DMALOAD_INPUTS", 20_000) / 100;
    let mut accepted = 0;
    for index in 0..count {
        let mut bytes = damaged(&mut random, &corpus);
        // Some files are too large to be packed, so their headers are read from the file.
        if index % 10 == 0 {
            bytes.resize(bytes.len() + (1 << 20), 7);
        }
        let name = names[usize::from(index % 2 == 1)];
        let path = common::file(folder.path(), name, &bytes);
        match runtime.block_on(loader.load(&path).into_future()) {
            Ok(image) => {
                common::assert_same(&image.files()[0].bytes().unwrap(), &bytes, &format!("input {index}"));
                for tensor in image.tensors() {
                    let range = tensor.file_range();
                    let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                    common::assert_same(&tensor.bytes().unwrap(), &bytes[range], tensor.name());
                }
                accepted += 1;
            }
            Err(error) => assert!(error.to_string().contains(name), "{error}"),
        }
    }
    println!("{kind}: {count} damaged files, {accepted} of them loaded");
    assert!(accepted > 0 && accepted < count);
}
