//! `dmaload attach`: maps memory that `serve` has loaded.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use dmaload::Segment;
use dmaload::share::{AttachOptions, attach};
use dmaload::verify::{Algorithm, Digest, Hasher, digest};
use dmaload_bench::usage;
use serde_json::json;

use crate::engine::block_on;
use crate::output;
use crate::summary::{Used, summary, to_json};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The server's socket.
    pub(crate) socket: PathBuf,
    /// The name of the image; required if the server shares several.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Trust a server that runs as this user id, in addition to your own and root; may be
    /// repeated.
    ///
    /// In a user namespace, all unmapped users appear as the overflow id, usually 65534: trusting
    /// that id trusts all of them.
    #[arg(long = "trust-user", value_name = "UID")]
    pub(crate) trust_users: Vec<u32>,
    /// Compute this digest of each file from the mapped memory: sha256, blake3, crc32c, xxh3.
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) digest: Option<Algorithm>,
    /// Print one JSON object to standard output, and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let options = arguments.trust_users.iter().fold(AttachOptions::default(), |options, &user| options.trust_user(user));
    let options = match &arguments.name {
        Some(name) => options.name(name),
        None => options,
    };
    let cpu_before = usage::cpu_time();
    let attached = block_on(attach(&arguments.socket, options))??;
    let used = Used::since(cpu_before);
    let image = &attached.image;
    let digests = image.files().iter().map(|file| match arguments.digest {
        // Other processes can write to dma-bufs, so dma-bufs can't be viewed as slices.
        Some(algorithm) if attached.dma_bufs => digest_dma_bufs(algorithm, file.segments()).map(Some),
        Some(algorithm) => file.bytes().map(|bytes| Some(digest(algorithm, &bytes))),
        None => Ok(None),
    });
    let digests = digests.collect::<dmaload::Result<Vec<_>>>()?;
    if arguments.json {
        let mut object = to_json(image, &digests, used);
        if let Some(object) = object.as_object_mut() {
            object.insert("process".to_owned(), json!(attached.process));
        }
        output::write_json(&object)?;
    } else {
        let mut stdout = output::stdout();
        write!(stdout, "{}", summary(image, &digests, used))?;
        stdout.flush()?;
    }
    Ok(crate::status::SUCCESS)
}

fn digest_dma_bufs(algorithm: Algorithm, segments: &[Segment]) -> dmaload::Result<Digest> {
    let (mut hasher, mut buffer) = (Hasher::new(algorithm), vec![0; 1 << 20]);
    for segment in segments {
        let access = segment.cpu_access()?;
        let mut at = 0;
        while at < segment.len() {
            let read = access.read_at(&mut buffer, at);
            hasher.update(buffer.get(..read).unwrap_or_default());
            at += read;
        }
    }
    Ok(hasher.finish())
}
