//! `dmaload serve`: loads, and hands the memory out. `dmaload attach`: has it, too.

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use dmaload::Segment;
use dmaload::dmabuf::printable;
use dmaload::share::{AttachOptions, Server, ServerOptions, attach};
use dmaload::verify::{Algorithm, Digest, Hasher, digest};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::load::{finish, is_quiet, summary, to_json};
use crate::{args, block_on, engine, errors, output};

pub(crate) fn serve(arguments: &args::Serve) -> Result<ExitCode> {
    let about = |error| errors::about(error, &arguments.paths);
    let server: Arc<Mutex<Option<Server>>> = Arc::default();
    // From the beginning, also while it loads: the socket must not be left behind, and what was
    // loaded goes with the process.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let own = Arc::clone(&server);
    let ending = move || {
        let _ = signals.forever().next();
        // Waits while a socket is being made.
        let mut server = own.lock().unwrap_or_else(PoisonError::into_inner);
        drop(server.take());
        std::process::exit(0);
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(ending)?;
    {
        // Before minutes of loading, not after.
        let _held = server.lock().unwrap_or_else(PoisonError::into_inner);
        Server::check(&arguments.socket)?;
    }
    let loader = engine::loader(&arguments.engine).map_err(about)?;
    let load = loader.load_with(&arguments.paths, loader.options());
    let image = block_on(finish(load, is_quiet()))?.map_err(about)?;
    let text = summary(&image, &vec![None; image.files().len()]);
    let options = arguments.allow_users.iter().fold(ServerOptions::default(), |options, &user| options.allow_user(user));
    {
        // The socket appears with the image: who sees it can attach.
        let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
        let bound = server.insert(Server::bind(&arguments.socket, options.dma_bufs(arguments.share_dma_bufs))?);
        if let Err(error) = bound.publish(&arguments.name, image) {
            drop(server.take());
            return Err(error.into());
        }
    }
    let mut stdout = output::stdout();
    write!(stdout, "{text}")?;
    writeln!(stdout, "serving {:?} at {}", arguments.name, printable::path(&arguments.socket))?;
    stdout.flush()?;
    drop(stdout);
    loop {
        std::thread::park();
    }
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
        // Others may write to dma-bufs: they are looked at, not lent.
        Some(algorithm) if attached.dma_bufs => of_dma_bufs(algorithm, file.segments()).map(Some),
        Some(algorithm) => file.bytes().map(|bytes| Some(digest(algorithm, &bytes))),
        None => Ok(None),
    });
    let digests = digests.collect::<dmaload::Result<Vec<_>>>()?;
    if arguments.json {
        let mut object = to_json(image, &digests);
        if let Some(object) = object.as_object_mut() {
            object.insert("process".to_owned(), json!(attached.process));
        }
        output::write_json(&object)?;
    } else {
        let mut stdout = output::stdout();
        write!(stdout, "{}", summary(image, &digests))?;
        stdout.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn of_dma_bufs(algorithm: Algorithm, segments: &[Segment]) -> dmaload::Result<Digest> {
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
