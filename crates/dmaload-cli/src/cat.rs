//! `dmaload cat`: what was loaded, written out.

use std::io::Write;

use anyhow::Result;

use crate::{args, block_on, engine, errors};

pub(crate) fn run(arguments: &args::Cat) -> Result<()> {
    let about = |error| errors::about(error, std::slice::from_ref(&arguments.path));
    let loader = engine::loader(&arguments.engine).map_err(about)?;
    // A file is written as it is, whatever its name says; a folder must be one whole model.
    let as_one_file = !arguments.path.is_dir();
    let options = match (&arguments.tensor, &arguments.verify) {
        (Some(name), _) => loader.options().tensor_names([name]),
        (None, Some(against)) => against.applied_to(loader.options().as_one_file(as_one_file))?,
        (None, None) => loader.options().as_one_file(as_one_file),
    };
    let mut segments = loader.stream_with([&arguments.path], options);
    block_on(async {
        let mut stdout = crate::output::stdout();
        // The stream goes ahead of a slow reader by the window and a segment, not more.
        while let Some(segment) = segments.next().await {
            let segment = segment.map_err(about)?;
            let wanted = match &arguments.tensor {
                // A segment also has what lies beside the tensor in its first and last blocks.
                Some(name) => segment.range_of(name).unwrap_or_default(),
                None => 0..segment.len(),
            };
            stdout.write_all(&segment.bytes().map_err(about)?.slice(wanted))?;
        }
        Ok(stdout.flush()?)
    })?
}
