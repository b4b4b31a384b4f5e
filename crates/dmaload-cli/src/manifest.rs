//! `dmaload manifest`: writes checksums of files, for `load --verify`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use dmaload::verify::{Algorithm, Manifest, Recorder};

use crate::engine::{self, EngineArguments, block_on};
use crate::manifests::record_manifest;
use crate::{errors, output, parse};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The files to compute checksums of.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// The checksum to compute for each chunk: crc32c or xxh3; or, to detect deliberate changes,
    /// blake3 or sha256.
    #[arg(long, default_value = "crc32c")]
    pub(crate) algorithm: Algorithm,
    /// The size of a chunk: a power of two from 4KiB to 1MiB.
    #[arg(long, default_value = "1MiB", value_name = "BYTES", value_parser = parse::bytes)]
    pub(crate) chunk: u64,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let about = |error| errors::with_files(error, &arguments.paths);
    if !Manifest::allows_chunk_bytes(arguments.chunk) {
        let text = format!("--chunk: {} is not a power of two from 4KiB to 1MiB", arguments.chunk);
        return Err(dmaload::Error::Config(text).into());
    }
    let loader = engine::loader_for(&arguments.engine, &arguments.paths)?;
    let manifest = block_on(record_manifest(&loader, &arguments.paths, Recorder::new(arguments.algorithm, arguments.chunk)))?;
    let mut stdout = output::stdout();
    writeln!(stdout, "{}", output::escape(manifest.map_err(about)?.to_json()))?;
    Ok(stdout.flush()?)
}
