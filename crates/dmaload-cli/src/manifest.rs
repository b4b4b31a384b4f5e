//! `dmaload manifest`: what files are to be, for `load --verify`; and reading it back.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use dmaload::LoadOptions;
use dmaload::dmabuf::printable;
use dmaload::verify::{Digest, Manifest, Recorder};

use crate::errors::At;
use crate::{args, block_on, engine, errors, output};

pub(crate) fn run(arguments: &args::Manifest) -> Result<()> {
    let about = |error| errors::about(error, &arguments.paths);
    if !Manifest::allows_chunk_bytes(arguments.chunk) {
        let text = format!("--chunk: {} is no power of two from 4KiB to 1MiB", arguments.chunk);
        return Err(dmaload::Error::Config(text).into());
    }
    let loader = engine::loader(&arguments.engine).map_err(about)?;
    let manifest = block_on(recorded(&loader, &arguments.paths, Recorder::new(arguments.algorithm, arguments.chunk)))?;
    let mut stdout = output::stdout();
    writeln!(stdout, "{}", output::escaped(manifest.map_err(about)?.to_json()))?;
    Ok(stdout.flush()?)
}

/// The manifest of what these files hold now.
pub(crate) async fn recorded(loader: &dmaload::Loader, paths: &[PathBuf], recorder: Recorder) -> dmaload::Result<Manifest> {
    let recorder = Arc::new(recorder);
    let mut segments = loader.stream_with(paths, loader.options().observer(recorder.clone()));
    while let Some(segment) = segments.next().await {
        drop(segment?);
    }
    let report = segments.report().expect("a stream that has ended without an error has a report");
    Ok(recorder.manifest(report))
}

/// What files are verified by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Against {
    Digest(Digest),
    Manifest(PathBuf),
}

impl FromStr for Against {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = text.split_once(':').is_some_and(|(name, _)| name.parse::<dmaload::verify::Algorithm>().is_ok());
        if named { text.parse().map(Against::Digest) } else { Ok(Against::Manifest(text.into())) }
    }
}

impl Against {
    /// The options of the load that is to be verified.
    pub(crate) fn applied_to(&self, options: LoadOptions) -> Result<LoadOptions> {
        match self {
            Against::Digest(digest) => Ok(options.verify(*digest)),
            Against::Manifest(path) => Ok(options.verify(read(path)?)),
        }
    }
}

fn read(path: &Path) -> Result<Manifest> {
    let json = std::fs::read(path).at("read", path)?;
    Manifest::parse(&json).with_context(|| printable::path(&path).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_told_from_a_path() {
        let hex = "e3069283";
        assert_eq!(format!("crc32c:{hex}").parse(), Ok(Against::Digest(format!("crc32c:{hex}").parse().unwrap())));
        assert_eq!("m.json".parse(), Ok(Against::Manifest("m.json".into())));
        assert_eq!("C:m.json".parse(), Ok(Against::Manifest("C:m.json".into())));
        "sha256:12".parse::<Against>().unwrap_err();
    }
}
