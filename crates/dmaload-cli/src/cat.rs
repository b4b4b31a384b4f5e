//! `dmaload cat`: what was loaded, written out.

use std::io::Write;

use anyhow::Result;

use crate::{args, block_on, engine, errors};

pub(crate) fn run(arguments: &args::Cat) -> Result<()> {
    let about = |error| errors::about(error, std::slice::from_ref(&arguments.path));
    let loader = engine::loader(&arguments.engine).map_err(about)?;
    let options = match &arguments.verify {
        Some(against) => against.applied_to(loader.options())?,
        None => loader.options(),
    };
    let mut segments = loader.stream_with([&arguments.path], options);
    block_on(async {
        let mut stdout = crate::output::stdout();
        // The stream goes ahead of a slow reader by the window and a segment, not more.
        while let Some(segment) = segments.next().await {
            stdout.write_all(&segment.and_then(|segment| segment.bytes()).map_err(about)?)?;
        }
        Ok(stdout.flush()?)
    })?
}
