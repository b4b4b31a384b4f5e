//! A soak test: several tasks load files with random sizes, routes, heaps, cancellations and
//! faults, and compare every byte that they receive.
//!
//! At the end of each period, the tasks drop all loaders and loads. The process must then hold no
//! more resources than after the first period, except for at most 16 more mappings and 2 MiB more
//! resident memory.
//!
//! Run it with `just soak --minutes 30`.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use dmaload::heap::{AnonHeap, HeapError, HeapHooks, Hooked, MemfdHeap, Pages};
use dmaload::verify::{Algorithm, Manifest, Recorder};
use dmaload::{Cache, Error, Image, Layout, LoadOptions, Loader, Route};
use dmaload_testing::Random;

const MIB: u64 = 1 << 20;
const TASKS: u64 = 4;
const PERIOD: Duration = Duration::from_secs(20);
/// How much resident memory may grow after the first period, in KiB. The allocator's caches and
/// the threads' stacks can grow even if there is no leak.
const SLACK_KIB: u64 = 2 << 10;
/// The environment variable that limits the C library's allocator to one arena. By default, the
/// allocator has several arenas, whose growth over half an hour would hide leaks.
const ONE_HEAP: (&str, &str) = ("MALLOC_ARENA_MAX", "1");

/// Returns the eight bytes at offset `8 * index` of file `number`.
fn word(number: u64, index: u64) -> [u8; 8] {
    ((number << 48 | index) ^ 0x5DEE_CE66_D1CE_4E5B).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()
}

/// Checks that `seen` equals the bytes of file `number` that begin at offset `start`.
fn compare(number: u64, start: u64, seen: &[u8]) -> Result<()> {
    let mut at = start;
    let mut seen = seen;
    while !seen.is_empty() {
        let expected = &word(number, at / 8)[usize::try_from(at % 8)?..];
        let length = expected.len().min(seen.len());
        ensure!(seen[..length] == expected[..length], "WRONG BYTES: file {number} at {at}");
        at += length as u64;
        seen = &seen[length..];
    }
    Ok(())
}

fn write_file(path: &Path, number: u64, bytes: u64) -> Result<()> {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, fs::File::create(path)?);
    for index in 0..bytes.div_ceil(8) {
        let left = usize::try_from((bytes - index * 8).min(8))?;
        file.write_all(&word(number, index)[..left])?;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}

/// Makes a random 5 % of a heap's allocations fail.
#[derive(Debug)]
struct Failing(std::sync::Mutex<Random>);

impl HeapHooks for Failing {
    fn name(&self) -> Option<Cow<'_, str>> {
        Some("failing".into())
    }

    fn before_allocate(&self, bytes: usize) -> Result<(), HeapError> {
        let fails = self.0.lock().expect("the lock is poisoned").chance(50);
        if fails { Err(HeapError::new("allocate", bytes, dmaload::Errno::ENOMEM)) } else { Ok(()) }
    }
}

struct World {
    folder: PathBuf,
    /// The path and length of each file, indexed by file number.
    files: Vec<(PathBuf, u64)>,
    manifest: Arc<Manifest>,
}

impl World {
    async fn new(folder: &Path) -> Result<Self> {
        let mut random = Random::new(42);
        let mut files = Vec::new();
        for number in 0..48 {
            let bytes = match number % 4 {
                0 => random.below(64 << 10),
                1 => random.below(2 * MIB),
                2 => random.below(40 * MIB),
                _ => 2 * MIB * random.below(100) + number % 3 * 4095,
            };
            let path = folder.join(format!("{number}.bin"));
            write_file(&path, number, bytes)?;
            files.push((path, bytes));
        }
        let loader = Loader::new()?;
        let recorder = Arc::new(Recorder::new(Algorithm::Xxh3, MIB));
        let paths: Vec<_> = files.iter().map(|(path, _)| path.clone()).collect();
        let mut segments = loader.load(&paths).options(loader.load_options().observer(recorder.clone())).segments();
        while let Some(segment) = segments.next().await {
            let segment = segment?;
            compare(segment.file_index() as u64, segment.file_range().start, &segment.bytes()?)?;
        }
        let manifest = Arc::new(recorder.manifest(segments.report().context("the stream has no report")?));
        drop(segments);
        let _ = loader.shutdown().await;
        Ok(World { folder: folder.to_owned(), files, manifest })
    }
}

/// How many actions of each kind the tasks have performed.
#[derive(Debug, Default, Clone)]
struct Counts {
    loads: u64,
    bytes: u64,
    others: BTreeMap<&'static str, u64>,
}

impl Counts {
    fn count(&mut self, what: &'static str) {
        *self.others.entry(what).or_default() += 1;
    }

    fn add(&mut self, other: &Counts) {
        self.loads += other.loads;
        self.bytes += other.bytes;
        for (&what, count) in &other.others {
            *self.others.entry(what).or_default() += count;
        }
    }
}

fn loader(random: &mut Random) -> Result<Loader> {
    let segment_bytes = *random.pick(&[2, 4, 16, 64]) * MIB;
    let builder = Loader::builder()
        .load_options(LoadOptions::new().segment_bytes(segment_bytes).chunk_bytes(*random.pick(&[64 << 10, MIB, 2 * MIB])))
        .window_bytes(segment_bytes * (1 + random.below(4)))
        .queue_depth(*random.pick(&[1, 4, 32, 128]))
        .staging_bytes(*random.pick(&[2, 16]) * MIB)
        .pool_bytes(*random.pick(&[0, 0, 256]) * MIB);
    let builder = match random.below(6) {
        0 => builder.heap(AnonHeap::default()),
        1 => builder.heap(Hooked::new(MemfdHeap::default(), Failing(std::sync::Mutex::new(random.clone())))),
        2 => builder.heap(MemfdHeap { pages: Pages::Small }),
        _ => builder.heap(MemfdHeap::default()),
    };
    Ok(builder.build()?)
}

fn options(random: &mut Random, loader: &Loader, world: &World) -> LoadOptions {
    let mut options = loader
        .load_options()
        .route(*random.pick(&Route::ALL))
        .layout(*random.pick(&[Layout::Segmented, Layout::Segmented, Layout::Single]))
        .packed(random.chance(700))
        .cache(*random.pick(&[Cache::Bypass, Cache::Auto]))
        .trace(random.chance(100));
    if random.chance(300) {
        options = options.verify(Arc::clone(&world.manifest));
    }
    options
}

fn check(image: &Image, numbers: &[u64]) -> Result<()> {
    for (file, &number) in image.files().iter().zip(numbers) {
        compare(number, 0, &file.bytes()?)?;
    }
    Ok(())
}

/// Performs one randomly chosen action.
async fn act(random: &mut Random, loader: &Loader, world: &World, task: u64, counts: &mut Counts) -> Result<()> {
    let count = *random.pick(&[1, 1, 1, 3, 12]);
    let numbers: Vec<u64> = (0..count).map(|_| random.below(world.files.len() as u64)).collect();
    let file = |&number: &u64| world.files[usize::try_from(number).expect("a file number fits into usize")].clone();
    let (paths, lengths): (Vec<_>, Vec<_>) = numbers.iter().map(file).unzip();
    let options = options(random, loader, world);
    let failed = |error: Error, counts: &mut Counts| match error {
        Error::Memory { heap, .. } if heap == "failing" => {
            counts.count("out of memory");
            Ok(())
        }
        other => Err(other),
    };
    match random.below(10) {
        0 | 1 => {
            let load = loader.load(&paths).options(options).start();
            tokio::time::sleep(Duration::from_micros(random.below(60_000))).await;
            drop(load);
            counts.count("dropped");
        }
        2 => {
            let mut segments = loader.load(&paths).options(options).segments();
            let stops = random.chance(300).then(|| random.below(4));
            let mut received = 0;
            while let Some(segment) = segments.next().await {
                if stops == Some(received) {
                    counts.count("stopped reading");
                    return Ok(());
                }
                received += 1;
                let segment = match segment {
                    Ok(segment) => segment,
                    Err(error) => return Ok(failed(error, counts)?),
                };
                compare(numbers[segment.file_index()], segment.file_range().start, &segment.bytes()?)?;
                counts.bytes += segment.len() as u64;
            }
            counts.loads += 1;
        }
        3 => {
            // The file may be truncated or removed during the load. The load must then fail or
            // return the original bytes.
            let (path, bytes) = (world.folder.join(format!("scratch-{task}")), 1 + random.below(8 * MIB));
            write_file(&path, 99, bytes)?;
            let load = loader.load(&path).options(options.clone().route(*random.pick(&Route::ALL))).start();
            tokio::time::sleep(Duration::from_micros(random.below(3000))).await;
            let change = random.below(3);
            match change {
                0 => fs::OpenOptions::new().write(true).open(&path)?.set_len(bytes / 2)?,
                1 => fs::remove_file(&path)?,
                _ => {}
            }
            match load.await {
                Ok(image) => check(&image, &[99])?,
                Err(Error::Ended { .. } | Error::Changed { .. }) if change == 0 => counts.count("shrank"),
                Err(Error::File { .. }) if change == 1 => counts.count("was gone"),
                Err(Error::NotInManifest { .. }) => counts.count("not in the manifest"),
                Err(error) => failed(error, counts)?,
            }
            let _ = fs::remove_file(&path);
        }
        4 => {
            // A copy that differs from the original in one bit must be refused, because the
            // manifest has the checksums of the original.
            let other = numbers.first().map_or(0, |number| (number + 1) % world.files.len() as u64);
            let (path, bytes) = (world.folder.join(format!("{other}-{task}.wrong")), file(&other).1);
            let Some(at) = bytes.checked_sub(1).map(|last| random.below(last + 1)) else { return Ok(()) };
            fs::copy(file(&other).0, &path)?;
            let mut byte = word(other, at / 8)[usize::try_from(at % 8)?];
            byte ^= 1;
            std::os::unix::fs::FileExt::write_all_at(&fs::OpenOptions::new().write(true).open(&path)?, &[byte], at)?;
            let alone = Manifest::parse(reduce_manifest(&world.manifest.to_json(), other)?.as_bytes())?;
            match loader.load(&path).options(options.verify(alone)).await {
                Err(Error::Corrupt { offset, bytes, .. }) if (offset..offset + bytes).contains(&at) => counts.count("corrupt"),
                Err(error) => failed(error, counts)?,
                Ok(_) => bail!("WRONG BYTES: the wrong byte {at} of {} was not detected", path.display()),
            }
            fs::remove_file(&path)?;
        }
        5 => {
            let missing = loader.load(world.folder.join("missing")).await;
            ensure!(matches!(missing, Err(Error::File { .. })), "{missing:?}");
            counts.count("missing");
        }
        _ => match loader.load(&paths).options(options).await {
            Ok(image) => {
                check(&image, &numbers)?;
                counts.loads += 1;
                counts.bytes += lengths.iter().sum::<u64>();
                let fallbacks = &image.report().fallbacks;
                ensure!(fallbacks.is_empty(), "unexpected fallbacks: {fallbacks:?}");
            }
            Err(error) => failed(error, counts)?,
        },
    }
    Ok(())
}

/// Removes all entries from a manifest except the one for this file.
fn reduce_manifest(json: &str, number: u64) -> Result<String> {
    let mut value: serde_json::Value = serde_json::from_str(json)?;
    let name = format!("{number}.bin");
    let files = value["files"].as_array_mut().context("the manifest has no list of files")?;
    files.retain(|file| file["path"] == name.as_str());
    Ok(value.to_string())
}

async fn task(world: Arc<World>, task: u64, seed: u64, until: Instant) -> Result<Counts> {
    let mut random = Random::new(seed);
    let mut counts = Counts::default();
    while Instant::now() < until {
        let own = loader(&mut random)?;
        for _ in 0..random.below(12) {
            act(&mut random, &own, &world, task, &mut counts).await.with_context(|| format!("seed {seed}"))?;
        }
        // In some iterations, the loader is shut down while a load is running.
        let running = random.chance(300).then(|| own.load(&world.files[3].0).start());
        if let Err(leaked) = own.shutdown().await {
            bail!("{leaked}");
        }
        drop(running);
        counts.count("loaders");
    }
    Ok(counts)
}

/// The resources that the process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holdings {
    descriptors: u64,
    mappings: u64,
    threads: u64,
    pinned_kib: u64,
    resident_kib: u64,
}

impl Holdings {
    fn now() -> Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
            line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        Ok(Holdings {
            descriptors: fs::read_dir("/proc/self/fd")?.count() as u64,
            mappings: fs::read_to_string("/proc/self/maps")?.lines().count() as u64,
            threads: field("Threads:"),
            pinned_kib: field("VmPin:"),
            resident_kib: field("VmRSS:"),
        })
    }

    /// Returns whether the process holds more resources than before. Mappings and resident memory
    /// may grow a little, because the C library's allocator keeps some of both.
    fn has_grown_since(&self, before: &Holdings) -> bool {
        self.descriptors > before.descriptors
            || self.threads > before.threads
            || self.pinned_kib > before.pinned_kib
            || self.mappings > before.mappings + 16
            || self.resident_kib > before.resident_kib + SLACK_KIB
    }
}

/// If `before` is given, waits up to 10 s until the process no longer holds more than it did then.
/// Returns the current holdings.
async fn wait_until_settled(before: Option<&Holdings>) -> Result<Holdings> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = Holdings::now()?;
        if before.is_none_or(|before| !now.has_grown_since(before)) || Instant::now() > deadline {
            return Ok(now);
        }
    }
}

fn row(minutes: f64, counts: &Counts, held: &Holdings) {
    let Holdings { descriptors, mappings, threads, pinned_kib, resident_kib } = held;
    let gib = counts.bytes as f64 / (1u64 << 30) as f64;
    println!(
        "| {minutes:.1} | {} | {gib:.1} | {descriptors} | {mappings} | {threads} | {pinned_kib} | {:.1} |",
        counts.loads,
        *resident_kib as f64 / 1024.0
    );
}

fn main() -> Result<()> {
    if std::env::var_os(ONE_HEAP.0).is_none() {
        let failed = std::process::Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(ONE_HEAP.0, ONE_HEAP.1)
            .exec();
        return Err(failed).context("cannot restart with a single arena");
    }
    soak()
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn soak() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let number = |name: &str, default: u64| -> Result<u64> {
        match arguments.iter().position(|argument| argument == name) {
            Some(at) => Ok(arguments.get(at + 1).with_context(|| format!("{name} needs a number"))?.parse()?),
            None => Ok(default),
        }
    };
    // The test is short by default, because `cargo bench` runs it, too.
    let (minutes, seed) = (number("--minutes", 1)?, number("--seed", 1)?);
    let folder = tempfile::tempdir_in(std::env::var_os("BENCH_DIR").unwrap_or("/var/tmp".into()))?;
    let world = Arc::new(World::new(folder.path()).await?);
    let started = Instant::now();
    let end = started + Duration::from_secs(60 * minutes);
    let (mut before, mut counts, mut rows): (Option<Holdings>, _, _) = (None, Counts::default(), 0u64);
    println!("| minute | loads | GiB compared | descriptors | mappings | threads | pinned KiB | resident MiB |");
    println!("| --: | --: | --: | --: | --: | --: | --: | --: |");
    let mut seed = seed;
    while Instant::now() < end || before.is_none() {
        let until = (Instant::now() + PERIOD).min(end.max(started + PERIOD));
        let tasks: Vec<_> = (0..TASKS)
            .map(|number| {
                seed += 1;
                tokio::spawn(task(Arc::clone(&world), number, seed, until))
            })
            .collect();
        for task in tasks {
            counts.add(&task.await??);
        }
        let held = wait_until_settled(before.as_ref()).await?;
        // Prints about ten rows in total, plus one at the end and one if the holdings have grown.
        let is_due = rows.is_multiple_of((minutes * 60 / PERIOD.as_secs() / 10).max(1));
        let grown = before.is_some_and(|before| held.has_grown_since(&before));
        if is_due || grown || Instant::now() >= end {
            row(started.elapsed().as_secs_f64() / 60.0, &counts, &held);
        }
        rows += 1;
        ensure!(!grown, "the process holds more resources than after the first period: {before:?} then, {held:?} now");
        before.get_or_insert(held);
    }
    println!();
    let others: Vec<_> = counts.others.iter().map(|(what, count)| format!("{what} {count}")).collect();
    println!("other actions: {}", others.join(", "));
    Ok(())
}
