//! Measures the cost of code that makes no system calls: parsing a header with 200,000 tensors,
//! planning a load, taking permits from the window, and using slots. This is a benchmark rather
//! than a test:
//!
//! ```text
//! cargo test --release -p dmaload --lib instructions::bench -- --ignored --exact --nocapture
//! ```
//!
//! Prints times and, if valgrind is installed, callgrind's instruction counts, which don't depend
//! on how busy the machine is.
#![allow(clippy::print_stdout, reason = "prints its measurements")]
#![allow(clippy::unwrap_used, reason = "a failure here should fail the benchmark")]

use std::collections::VecDeque;
use std::env;
use std::fmt::Write;
use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use crate::memory::window::{Permitted, Window};
use crate::model::safetensors::parse;
use crate::options::choices::Layout;
use crate::plan::{Plan, Shape, Span};
use crate::ring::Slots;

const ROUNDS: usize = 9;
const TENSORS: usize = 200_000;
const MANY: usize = 1_000_000;
/// Tells a child process of this benchmark which case to run.
const CASE: &str = "DMALOAD_INSTRUCTIONS_CASE";
/// Tells the child process how many times to run the case.
const TIMES: &str = "DMALOAD_INSTRUCTIONS_TIMES";

struct Case {
    name: &'static str,
    /// What the work is counted in, such as tensors. The benchmark prints the number of
    /// instructions for each one.
    unit: &'static str,
    units: usize,
    work: Box<dyn Fn()>,
}

/// Builds a header like those of typical models, with one layer after another and no gaps between
/// tensors. Returns the header and the length of its file.
fn header(tensors: usize) -> (String, u64) {
    const TENSOR_BYTES: usize = 8192;
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    for number in 0..tensors {
        let (layer, part, start) = (number / 8, number % 8, number * TENSOR_BYTES);
        let end = start + TENSOR_BYTES;
        write!(
            header,
            ",\"model.layers.{layer}.block.{part}.weight\":{{\"dtype\":\"BF16\",\"shape\":[64,64],\"data_offsets\":[{start},{end}]}}"
        )
        .unwrap();
    }
    header.push('}');
    let file_bytes = 8 + header.len() + tensors * TENSOR_BYTES;
    (header, file_bytes as u64)
}

/// Plans a load of files with these lengths, with the default sizes of segments and batches.
/// Returns the number of pieces.
fn plan(lengths: &[u64]) -> usize {
    let (segment_bytes, batch_bytes) = (64 << 20, 16 << 20);
    let shape = Shape { layout: Layout::Segmented, segment_bytes, batch_bytes, packed: true, batch_files: 64 };
    let spans: Vec<_> = lengths.iter().enumerate().map(|(file, &bytes)| Span::whole(file, bytes)).collect();
    Plan::new(&vec![4096; lengths.len()], &spans, shape).pieces.len()
}

/// Takes permits from a window and gives them back, with eight outstanding at a time. Returns how
/// many were granted.
fn window(permits: usize) -> usize {
    const PERMIT_BYTES: u64 = 16 << 20;
    let mut window = Window::new(12 * PERMIT_BYTES, PERMIT_BYTES);
    let mut granted = 0;
    for number in 0..permits {
        if number >= 8 {
            window.give_back(&0, 0, PERMIT_BYTES);
        }
        granted += usize::from(window.take(&0, 0, PERMIT_BYTES) == Permitted::Yes);
    }
    granted
}

/// Inserts entries into slots, at most 32 at a time, and removes each once. Returns how many of
/// the removed entries were the expected ones.
fn slots(entries: usize) -> usize {
    let mut slots = Slots::new();
    let mut in_flight = VecDeque::new();
    let mut found = 0;
    for entry in 0..entries {
        if in_flight.len() == 32
            && let Some((token, entry)) = in_flight.pop_front()
        {
            found += usize::from(slots.get_mut(token) == Some(&mut { entry }) && slots.remove(token) == Some(entry));
        }
        in_flight.push_back((slots.insert(entry), entry));
    }
    found + in_flight.into_iter().filter(|&(token, entry)| slots.remove(token) == Some(entry)).count()
}

fn cases() -> Vec<Case> {
    let (header, file_bytes) = header(TENSORS);
    let small: Vec<u64> = (0..2000).map(|number| 65_536 + number * 719).collect();
    let parser = move || drop(black_box(parse(black_box(header.as_bytes()), file_bytes).unwrap()));
    let large = || assert_eq!(plan(black_box(&[1 << 40])), 1 << 16);
    let small = move || assert!(plan(black_box(&small)) >= small.len());
    let window = || assert_eq!(window(black_box(MANY)), MANY);
    let slots = || assert_eq!(slots(black_box(MANY)), MANY);
    vec![
        Case { name: "parser", unit: "tensor", units: TENSORS, work: Box::new(parser) },
        Case { name: "plan, a file of 1 TiB", unit: "piece", units: 1 << 16, work: Box::new(large) },
        Case { name: "plan, 2,000 small files", unit: "file", units: 2000, work: Box::new(small) },
        Case { name: "window", unit: "permit", units: MANY, work: Box::new(window) },
        Case { name: "slots", unit: "read", units: MANY, work: Box::new(slots) },
    ]
}

/// Counts the instructions of a process that runs this case `times` times. Returns `None` if
/// valgrind is not installed.
fn instructions(case: &Case, times: u32) -> Option<u64> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(env::current_exe().unwrap());
    valgrind.args(["--ignored", "--exact", "instructions::bench", "--test-threads=1"]);
    let output = valgrind.env(CASE, case.name).env(TIMES, times.to_string()).output().ok()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "valgrind said: {said}");
    let collected = said.lines().find_map(|line| line.split_once("Collected : ").map(|(_, count)| count.trim().to_owned()));
    Some(collected.unwrap_or_else(|| panic!("valgrind said: {said}")).parse().unwrap())
}

fn milliseconds(case: &Case) -> f64 {
    let mut seconds: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            (case.work)();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[ROUNDS / 2] * 1e3
}

#[test]
#[ignore = "a benchmark, not a test"]
fn bench() {
    let cases = cases();
    if let Ok(name) = env::var(CASE) {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let times: u32 = env::var(TIMES).unwrap().parse().unwrap();
        return (0..times).for_each(|_| (case.work)());
    }
    println!();
    for case in &cases {
        let Case { name, unit, units, .. } = case;
        print!("{name:25} {:8.2} ms (median of {ROUNDS})", milliseconds(case));
        // Subtracting one run from three cancels out the process's fixed costs.
        match instructions(case, 3).zip(instructions(case, 1)) {
            Some((thrice, once)) => {
                let each = thrice.saturating_sub(once) / 2;
                println!(", {each:>10} instructions, {} a {unit}", each / *units as u64);
            }
            None => println!("; install valgrind to count instructions"),
        }
    }
}

#[test]
fn cases_do_the_counted_work() {
    assert_eq!(plan(&[1, 20 << 20, 65 << 20]), 1 + 2 + 5);
    assert_eq!(window(1000), 1000);
    assert_eq!(slots(1000), 1000);
}
