//! Memory pressure: makes memory scarce while modes run.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result};
use bytesize::ByteSize;
use dmaload_text::{ForPath, bytes};
use memmap2::MmapOptions;
use serde_json::json;

use crate::cgroup::Group;
use crate::cold;
use crate::host;
use crate::noise::fill_with_noise;
use crate::scratch::ScratchFile;
use crate::worker::{self, Worker};

const BLOCK: usize = 1 << 20;

/// A kind of memory pressure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pressure {
    /// Each run takes place in a memory cgroup with this limit in bytes. The cgroup can be filled
    /// with page cache before the run.
    Cgroup(u64, Option<Cache>),
    /// Another process occupies this many bytes of memory.
    Hog(u64),
    /// Another process occupies all available memory except this many bytes.
    HogAllBut(u64),
}

/// The kind of page cache that fills a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Pages that were read.
    Clean,
    /// Pages that were written but not yet written back.
    Dirty,
}

impl FromStr for Pressure {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let forms = "the kinds of pressure are cgroup:SIZE, cgroup:SIZE,clean, cgroup:SIZE,dirty, hog:SIZE, hog:all-but:SIZE";
        let size = |size: &str| size.parse::<ByteSize>().map(|size| size.as_u64()).ok().filter(|&size| size > 0);
        let parsed = match text.split_once(':') {
            Some(("cgroup", rest)) => match rest.split_once(',') {
                None => size(rest).map(|bytes| Pressure::Cgroup(bytes, None)),
                Some((bytes, "clean")) => size(bytes).map(|bytes| Pressure::Cgroup(bytes, Some(Cache::Clean))),
                Some((bytes, "dirty")) => size(bytes).map(|bytes| Pressure::Cgroup(bytes, Some(Cache::Dirty))),
                Some(_) => None,
            },
            Some(("hog", rest)) => match rest.strip_prefix("all-but:") {
                None => size(rest).map(Pressure::Hog),
                Some(bytes) => size(bytes).map(Pressure::HogAllBut),
            },
            _ => None,
        };
        parsed.ok_or_else(|| format!("unknown pressure {text:?}: {forms}"))
    }
}

impl fmt::Display for Pressure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pressure::Cgroup(limit, None) => write!(f, "a cgroup of {}", bytes(*limit)),
            Pressure::Cgroup(limit, Some(Cache::Clean)) => write!(f, "a cgroup of {} full of clean page cache", bytes(*limit)),
            Pressure::Cgroup(limit, Some(Cache::Dirty)) => write!(f, "a cgroup of {} full of dirty page cache", bytes(*limit)),
            Pressure::Hog(taken) => write!(f, "{} taken by another process", bytes(*taken)),
            Pressure::HogAllBut(left) => write!(f, "all but {} taken by another process", bytes(*left)),
        }
    }
}

/// The pressure applied to a bench. Dropping this value ends the pressure.
#[derive(Debug)]
pub(crate) struct Applied {
    pressure: Option<Pressure>,
    /// The file whose pages fill the page cache.
    cache: Option<ScratchFile>,
    /// The process that occupies memory, which exits when its standard input ends.
    _hog: Option<Worker>,
}

impl Applied {
    /// Applies the part of the pressure that lasts for the whole bench.
    ///
    /// # Errors
    /// If there is not enough memory, or the file for the page cache can't be created.
    pub(crate) fn new(pressure: Option<Pressure>, folder: Option<&Path>) -> Result<Self> {
        let hog = match pressure {
            Some(Pressure::Hog(bytes)) => Some(start_hog(bytes)?),
            Some(Pressure::HogAllBut(bytes)) => Some(start_hog(host::available_bytes().saturating_sub(bytes))?),
            _ => None,
        };
        let cache = match pressure {
            Some(Pressure::Cgroup(bytes, Some(_))) => {
                let file = ScratchFile::create(folder, "bench-cache", bytes)?;
                write_noise(file.file(), bytes).for_path("write to", file.path())?;
                Some(file)
            }
            _ => None,
        };
        Ok(Applied { pressure, cache, _hog: hog })
    }

    /// Returns whether any pressure is applied.
    pub(crate) fn is_on(&self) -> bool {
        self.pressure.is_some()
    }

    /// Creates the cgroup for one run, if the pressure needs one.
    ///
    /// # Errors
    /// If the cgroup can't be created.
    pub(crate) fn create_group(&self) -> Result<Option<Group>> {
        match self.pressure {
            Some(Pressure::Cgroup(bytes, _)) => Group::new(bytes).map(Some),
            _ => Ok(None),
        }
    }

    /// Fills the group with page cache, if the pressure requires it.
    ///
    /// # Errors
    /// If the process that fills the page cache fails.
    pub(crate) fn fill_page_cache(&self, group: &Group) -> Result<()> {
        let (Some(Pressure::Cgroup(bytes, Some(kind))), Some(cache)) = (self.pressure, &self.cache) else { return Ok(()) };
        cold::make_cold(cache.path())?;
        let mut command = worker::command();
        command.arg("fill").arg(bytes.to_string()).arg(cache.path());
        if kind == Cache::Dirty {
            command.arg("--dirty");
        }
        let mut filler = Worker::start(&mut command)?;
        group.add(filler.id())?;
        filler.send_line("go");
        filler.receive_line().context("cannot fill the group's page cache")?;
        Ok(())
    }

    /// Writes back and evicts those pages of the cache file that are still in the page cache after
    /// a run. Otherwise, dirty pages would be written back during the next run.
    ///
    /// # Errors
    /// If the pages can't be written back or evicted.
    pub(crate) fn settle(&self) -> Result<()> {
        if let Some(cache) = &self.cache {
            cold::make_cold(cache.path())?;
        }
        Ok(())
    }
}

fn start_hog(bytes: u64) -> Result<Worker> {
    let mut command = worker::command();
    command.arg("hog").arg(bytes.to_string());
    let mut hog = Worker::start(&mut command)?;
    hog.receive_line().with_context(|| format!("cannot occupy {} of memory in another process", dmaload_text::bytes(bytes)))?;
    Ok(hog)
}

/// Occupies memory until standard input ends. The child process `bench-child hog BYTES` calls
/// this function.
///
/// # Errors
/// If there is not enough memory.
pub fn hog(bytes: u64, output: &mut dyn Write) -> Result<()> {
    let memory = host::allocate_touched(usize::try_from(bytes)?)?;
    report_ready(output)?;
    // This returns when standard input ends.
    io::copy(&mut io::stdin(), &mut io::sink())?;
    drop(memory);
    Ok(())
}

/// Waits for a line, then fills the page cache. The child process
/// `bench-child fill BYTES PATH [--dirty]` calls this function.
///
/// The kernel charges a cached page to the cgroup of the process that first reads or writes it.
/// The parent therefore moves this process into the cgroup before it sends the line.
///
/// # Errors
/// If the file can't be read or written.
pub fn fill_cache_on_request(path: &Path, bytes: u64, dirty: bool, output: &mut dyn Write) -> Result<()> {
    io::stdin().lock().read_line(&mut String::new())?;
    if dirty {
        let file = OpenOptions::new().write(true).open(path).for_path("open", path)?;
        write_noise(&file, bytes).for_path("write to", path)?;
    } else {
        let mut file = File::open(path).for_path("open", path)?;
        let mut block = vec![0; BLOCK];
        while file.read(&mut block).for_path("read", path)? > 0 {}
    }
    report_ready(output)
}

fn report_ready(output: &mut dyn Write) -> Result<()> {
    writeln!(output, "{}", json!({ "ready": true }))?;
    Ok(output.flush()?)
}

/// Writes bytes that lower layers can neither compress nor deduplicate: a random block that is
/// repeated, with a different number in each 512-byte sector.
fn write_noise(mut file: &File, bytes: u64) -> io::Result<()> {
    let mut block = MmapOptions::new().len(BLOCK).map_anon()?;
    fill_with_noise(&mut block, 0x9E37_79B9_7F4A_7C15);
    let mut written = 0;
    while written < bytes {
        for (number, sector) in (written / 512..).zip(block.chunks_exact_mut(512)) {
            if let Some(place) = sector.first_chunk_mut() {
                *place = number.to_le_bytes();
            }
        }
        let next = usize::try_from(bytes - written).unwrap_or(BLOCK).min(BLOCK);
        file.write_all(block.get(..next).unwrap_or_default())?;
        written += next as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_pressure_parse() {
        let parse = |text: &str| text.parse::<Pressure>();
        assert_eq!(parse("cgroup:1GiB"), Ok(Pressure::Cgroup(1 << 30, None)));
        assert_eq!(parse("cgroup:64MiB,clean"), Ok(Pressure::Cgroup(64 << 20, Some(Cache::Clean))));
        assert_eq!(parse("cgroup:64MiB,dirty"), Ok(Pressure::Cgroup(64 << 20, Some(Cache::Dirty))));
        assert_eq!(parse("hog:3GiB"), Ok(Pressure::Hog(3 << 30)));
        assert_eq!(parse("hog:all-but:3GiB"), Ok(Pressure::HogAllBut(3 << 30)));
        for wrong in ["", "cgroup", "cgroup:", "cgroup:0", "cgroup:1GiB,wet", "hog:all-but:", "hog:much", "swap:1GiB"] {
            assert!(parse(wrong).unwrap_err().contains("cgroup:SIZE,clean"), "{wrong}");
        }
    }

    #[test]
    fn noise_has_the_requested_length_and_no_equal_sectors() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write_noise(file.as_file(), 2 * BLOCK as u64 + 700).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.len(), 2 * BLOCK + 700);
        let sectors: std::collections::HashSet<_> = bytes.chunks(512).collect();
        assert_eq!(sectors.len(), bytes.len().div_ceil(512));
    }
}
