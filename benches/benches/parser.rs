//! How much work the header of a large model is: 200,000 tensors.
//!
//! In instructions, counted by callgrind where valgrind is installed (the same number on a busy machine, too), and in time.

use std::env;
use std::fmt::Write;
use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use dmaload::model::safetensors::parse;

const TENSORS: u64 = 200_000;
const TENSOR_BYTES: u64 = 8192;
const ROUNDS: u32 = 9;
/// Tells a process of this bench to parse so often and do nothing else.
const TIMES: &str = "--times";

/// As model writers do it: sorted names, offsets without gaps.
fn header() -> Result<(String, u64)> {
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    for number in 0..TENSORS {
        let (layer, part, start) = (number / 8, number % 8, number * TENSOR_BYTES);
        let end = start + TENSOR_BYTES;
        write!(
            header,
            ",\"model.layers.{layer}.block.{part}.weight\":{{\"dtype\":\"BF16\",\"shape\":[64,64],\"data_offsets\":[{start},{end}]}}"
        )?;
    }
    header.push('}');
    let file_bytes = 8 + header.len() as u64 + TENSORS * TENSOR_BYTES;
    Ok((header, file_bytes))
}

/// Instructions of a process that parses so often.
fn instructions(times: u32) -> Result<Option<u64>> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(env::current_exe()?);
    let Ok(output) = valgrind.arg(TIMES).arg(times.to_string()).output() else { return Ok(None) };
    let told = String::from_utf8_lossy(&output.stderr);
    let collected = told.lines().find_map(|line| line.split_once("Collected : ").map(|(_, count)| count.trim().to_owned()));
    let collected = collected.with_context(|| format!("valgrind said: {told}"))?;
    Ok(Some(collected.parse()?))
}

fn main() -> Result<()> {
    let (header, file_bytes) = header()?;
    let mut arguments = env::args().skip_while(|argument| argument != TIMES);
    if let Some(times) = arguments.nth(1) {
        for _ in 0..times.parse::<u32>()? {
            black_box(parse(black_box(header.as_bytes()), file_bytes)?);
        }
        return Ok(());
    }
    let mut seconds = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let map = black_box(parse(black_box(header.as_bytes()), file_bytes)?);
        seconds.push(start.elapsed().as_secs_f64());
        drop(map);
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds.get(seconds.len() / 2).copied().unwrap_or_default();
    println!("{TENSORS} tensors, a header of {} bytes: {:.1} ms (median of {ROUNDS})", header.len(), median * 1e3);
    // What the process does besides is the same, and drops out.
    match instructions(3)?.zip(instructions(1)?) {
        Some((thrice, once)) => {
            let each = thrice.saturating_sub(once) / 2;
            println!("{each} instructions, {} a tensor", each / TENSORS);
        }
        None => println!("instructions are counted where valgrind is installed"),
    }
    Ok(())
}
