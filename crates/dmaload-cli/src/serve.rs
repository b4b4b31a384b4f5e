//! `dmaload serve`: loads files, and hands their memory out to other processes.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use clap::Args;
use dmabuf::printable;
use dmaload::share::{Server, ServerOptions};
use dmaload_bench::usage;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::engine::{self, EngineArguments, block_on};
use crate::progress::{finish, is_quiet};
use crate::summary::{Used, summary};
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

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
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
