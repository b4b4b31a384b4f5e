//! `dmaload serve`: loads, and hands the memory out. `dmaload attach`: has it, too.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use clap::Args;
use dmabuf::printable;
use dmaload::Segment;
use dmaload::share::{AttachOptions, Server, ServerOptions, attach};
use dmaload::verify::{Algorithm, Digest, Hasher, digest};
use dmaload_bench::usage;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::engine::{self, EngineArguments, block_on};
use crate::load::{Used, finish, is_quiet, summary, to_json};
use crate::{errors, output};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The socket, which appears when the files are loaded; one that no process listens at any more is replaced.
    pub(crate) socket: PathBuf,
    /// The files; a folder or an index stands for all files of a model.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// The name that the memory is asked for by.
    #[arg(long, default_value = "model")]
    pub(crate) name: String,
    /// Let this user attach, too, by its number; may be repeated. Without, only your own may.
    ///
    /// In a user namespace, users that are not mapped all appear as the overflow id, usually 65534: to allow that is to allow all of
    /// them.
    #[arg(long = "allow-user", value_name = "UID")]
    pub(crate) allow_users: Vec<u32>,
    /// Hand out dma-bufs, which whoever has them can WRITE to, instead of sealed memory files; takes --dma-buf.
    #[arg(long, requires = "dma_buf")]
    pub(crate) share_dma_bufs: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArguments {
    /// The socket.
    pub(crate) socket: PathBuf,
    /// The name of what is asked for; needed where the server has several.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Trust a server of this user, by its number, besides your own and root's; may be repeated.
    ///
    /// In a user namespace, users that are not mapped all appear as the overflow id, usually 65534: to trust that is to trust all of
    /// them.
    #[arg(long = "trust-user", value_name = "UID")]
    pub(crate) trust_users: Vec<u32>,
    /// Compute this digest of each file, from the mapped memory: sha256, blake3, crc32c, xxh3.
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) digest: Option<Algorithm>,
    /// Print one JSON object, and nothing else, on standard output.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn serve(arguments: &Arguments) -> Result<ExitCode> {
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
    let cpu_before = usage::cpu_time();
    let load = loader.load(&arguments.paths).start();
    let image = block_on(finish(load, is_quiet()))?.map_err(about)?;
    let text = summary(&image, &vec![None; image.files().len()], Used::since(cpu_before));
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

pub(crate) fn attached(arguments: &AttachArguments) -> Result<ExitCode> {
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
        // Others may write to dma-bufs: they are looked at, not lent.
        Some(algorithm) if attached.dma_bufs => of_dma_bufs(algorithm, file.segments()).map(Some),
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
