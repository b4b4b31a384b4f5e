//! How much work the pure parts are: the header of a model of 200,000 tensors, the plan of a load, window and slots.
//!
//! In instructions, counted by callgrind where valgrind is installed (the same number on a busy machine, too), and in time.

use std::env;
use std::fmt::Write;
use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use dmaload::internals;
use dmaload::model::safetensors::parse;

const ROUNDS: usize = 9;
/// Tells a process of this bench to do one of them so often, and nothing else.
const ONLY: &str = "--only";

/// Something to be counted.
struct Case {
    name: &'static str,
    /// What the work is divided by.
    unit: &'static str,
    units: usize,
    work: Box<dyn Fn() -> Result<()>>,
}

/// As model writers do it: sorted names, offsets without gaps.
fn header(tensors: usize) -> Result<(String, u64)> {
    const TENSOR_BYTES: usize = 8192;
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    for number in 0..tensors {
        let (layer, part, start) = (number / 8, number % 8, number * TENSOR_BYTES);
        let end = start + TENSOR_BYTES;
        write!(
            header,
            ",\"model.layers.{layer}.block.{part}.weight\":{{\"dtype\":\"BF16\",\"shape\":[64,64],\"data_offsets\":[{start},{end}]}}"
        )?;
    }
    header.push('}');
    let file_bytes = 8 + header.len() + tensors * TENSOR_BYTES;
    Ok((header, file_bytes as u64))
}

fn cases() -> Result<Vec<Case>> {
    const TENSORS: usize = 200_000;
    const MANY: usize = 1_000_000;
    let (header, file_bytes) = header(TENSORS)?;
    let small: Vec<u64> = (0..2000).map(|number| 65_536 + number * 719).collect();
    let parser = move || parse(black_box(header.as_bytes()), file_bytes).map(|map| drop(black_box(map))).context("a good header");
    let all = |done: bool| if done { Ok(()) } else { bail!("some of it was not done") };
    let large = move || all(internals::plan(black_box(&[1 << 40])) == 1 << 16);
    let small = move || all(internals::plan(black_box(&small)) >= small.len());
    let window = move || all(internals::window(black_box(MANY as u64)) == MANY as u64);
    let slots = move || all(internals::slots(black_box(MANY)) == MANY);
    Ok(vec![
        Case { name: "parser", unit: "tensor", units: TENSORS, work: Box::new(parser) },
        Case { name: "plan, a file of 1 TiB", unit: "piece", units: 1 << 16, work: Box::new(large) },
        Case { name: "plan, 2,000 small files", unit: "file", units: 2000, work: Box::new(small) },
        Case { name: "window", unit: "permit", units: MANY, work: Box::new(window) },
        Case { name: "slots", unit: "read", units: MANY, work: Box::new(slots) },
    ])
}

/// Instructions of a process that does this so often.
fn instructions(case: &Case, times: u32) -> Result<Option<u64>> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(env::current_exe()?);
    let Ok(output) = valgrind.args([ONLY, case.name, &times.to_string()]).output() else { return Ok(None) };
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "valgrind said: {told}");
    let collected = told.lines().find_map(|line| line.split_once("Collected : ").map(|(_, count)| count.trim().to_owned()));
    let collected = collected.with_context(|| format!("valgrind said: {told}"))?;
    Ok(Some(collected.parse()?))
}

fn milliseconds(case: &Case) -> Result<f64> {
    let mut seconds = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        (case.work)()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds.get(ROUNDS / 2).copied().unwrap_or_default() * 1e3)
}

fn main() -> Result<()> {
    let cases = cases()?;
    let arguments: Vec<_> = env::args().skip_while(|argument| argument != ONLY).skip(1).collect();
    if let [name, times, ..] = &*arguments {
        let case = cases.iter().find(|case| case.name == name).context("no such case")?;
        return (0..times.parse::<u32>()?).try_for_each(|_| (case.work)());
    }
    for case in &cases {
        let Case { name, unit, units, .. } = case;
        print!("{name:25} {:8.2} ms (median of {ROUNDS})", milliseconds(case)?);
        // What the process does besides is the same, and drops out.
        match instructions(case, 3)?.zip(instructions(case, 1)?) {
            Some((thrice, once)) => {
                let each = thrice.saturating_sub(once) / 2;
                println!(", {each:>10} instructions, {} a {unit}", each / *units as u64);
            }
            None => println!("; instructions are counted where valgrind is installed"),
        }
    }
    Ok(())
}
