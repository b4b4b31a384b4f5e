//! `dmaload serve`: loads, and hands the memory out. `dmaload attach`: has it, too.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use dmaload::share::{AttachOptions, Server, ServerOptions, attach};
use dmaload::verify::digest;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::load::{finish, is_quiet, summary, to_json};
use crate::{args, block_on, engine, errors};

pub(crate) fn serve(arguments: &args::Serve) -> Result<ExitCode> {
    let about = |error| errors::about(error, &arguments.paths);
    // Before anything else: whoever ends it while it loads must find no socket left behind.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let options = arguments.allow_users.iter().fold(ServerOptions::default(), |options, &user| options.allow_user(user));
    let server = Server::bind(&arguments.socket, options.dma_bufs(arguments.share_dma_bufs))?;
    let loader = engine::loader(&arguments.engine).map_err(about)?;
    let load = loader.load_with(&arguments.paths, loader.options());
    let image = block_on(finish(load, is_quiet()))?.map_err(about)?;
    let text = summary(&image, &vec![None; image.files().len()]);
    server.publish(&arguments.name, image)?;
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "{text}")?;
    writeln!(stdout, "serving {:?} at {}", arguments.name, arguments.socket.display())?;
    stdout.flush()?;
    drop(stdout);
    let _ = signals.forever().next();
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn attached(arguments: &args::Attach) -> Result<ExitCode> {
    let options = arguments.trust_users.iter().fold(AttachOptions::default(), |options, &user| options.trust_user(user));
    let options = match &arguments.name {
        Some(name) => options.name(name),
        None => options,
    };
    let attached = block_on(attach(&arguments.socket, options))??;
    let image = &attached.image;
    let digests = image.files().iter().map(|file| match arguments.digest {
        Some(algorithm) => file.bytes().map(|bytes| Some(digest(algorithm, &bytes))),
        None => Ok(None),
    });
    let digests = digests.collect::<dmaload::Result<Vec<_>>>()?;
    let mut stdout = std::io::stdout().lock();
    if arguments.json {
        let mut object = to_json(image, &digests);
        if let Some(object) = object.as_object_mut() {
            object.insert("process".to_owned(), json!(attached.process));
        }
        writeln!(stdout, "{object:#}")?;
    } else {
        write!(stdout, "{}", summary(image, &digests))?;
    }
    stdout.flush()?;
    Ok(ExitCode::SUCCESS)
}
