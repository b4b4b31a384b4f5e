//! `dmaload cat`: what was loaded, written out.

use std::io::Write;

use anyhow::Result;

use crate::errors::about;
use crate::{args, block_on, engine};

pub(crate) fn run(arguments: &args::Cat) -> Result<()> {
    let loader = engine::loader(&arguments.engine)?;
    let mut segments = loader.stream_with([&arguments.path], loader.options());
    block_on(async {
        let mut stdout = std::io::stdout().lock();
        while let Some(segment) = segments.next().await {
            let segment = segment.map_err(|error| about(error, std::slice::from_ref(&arguments.path)))?;
            stdout.write_all(segment.as_ref())?;
        }
        Ok(stdout.flush()?)
    })?
}
