//! `dmaload cat`: writes a loaded file or tensor to standard output.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::engine::{self, EngineArguments, block_on};
use crate::errors;
use crate::manifests::Against;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The file to write, unchanged even if it belongs to a multi-file model; or a folder, to
    /// write all files of the model in it.
    #[arg(value_name = "MODEL")]
    pub(crate) path: PathBuf,
    /// Write only the bytes of this tensor, and read little else. If a multi-file model has an
    /// index, the index determines which file the tensor is read from.
    #[arg(long, value_name = "NAME", conflicts_with = "verify")]
    pub(crate) tensor: Option<String>,
    /// Fail unless the file matches, as for `load`; only verified bytes are written.
    #[arg(long, value_name = "MANIFEST|ALGORITHM:HEX")]
    pub(crate) verify: Option<Against>,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let paths = std::slice::from_ref(&arguments.path);
    let about = |error| errors::with_files(error, paths);
    let loader = engine::loader_for(&arguments.engine, paths)?;
    // A file is written unchanged, regardless of its name; a folder must contain one complete
    // model.
    let as_one_file = !arguments.path.is_dir();
    let options = match (&arguments.tensor, &arguments.verify) {
        (Some(name), _) => loader.load_options().tensor_names([name]),
        (None, Some(against)) => against.apply_to(loader.load_options().as_one_file(as_one_file))?,
        (None, None) => loader.load_options().as_one_file(as_one_file),
    };
    let mut segments = loader.load(&arguments.path).options(options).segments();
    block_on(async {
        let mut stdout = crate::output::stdout();
        // If the reader is slow, the load is ahead of it by at most the window and one segment.
        while let Some(segment) = segments.next().await {
            let segment = segment.map_err(about)?;
            let wanted = match &arguments.tensor {
                // The segment's first and last blocks also contain neighboring bytes.
                Some(name) => segment.tensor_range(name).unwrap_or_default(),
                None => 0..segment.len(),
            };
            stdout.write_all(&segment.bytes().map_err(about)?.slice(wanted))?;
        }
        Ok(stdout.flush()?)
    })?
}
