//! `dmaload serve`: loads files and shares their memory with other processes.

use std::io::Write;
use std::path::PathBuf;
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
    /// The path of the socket, which is created once the files are loaded; an old socket on which
    /// no process listens is replaced.
    pub(crate) socket: PathBuf,
    /// The files to load; for a folder or an index, all files of its model are loaded.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// The name under which clients request the memory.
    #[arg(long, default_value = "model")]
    pub(crate) name: String,
    /// Allow this user id to attach; may be repeated. By default, only your own user can attach.
    ///
    /// In a user namespace, all unmapped users appear as the overflow id, usually 65534: allowing
    /// that id allows all of them.
    #[arg(long = "allow-user", value_name = "UID")]
    pub(crate) allow_users: Vec<u32>,
    /// Share dma-bufs, which every client can WRITE to, instead of sealed memfds; requires
    /// --dma-buf.
    #[arg(long, requires = "dma_buf")]
    pub(crate) share_dma_bufs: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let about = |error| errors::with_files(error, &arguments.paths);
    let server: Arc<Mutex<Option<Server>>> = Arc::default();
    // Handle signals from the start, even during the load, because the socket must not be left
    // behind. The loaded memory is freed when the process exits.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let own = Arc::clone(&server);
    let ending = move || {
        let _ = signals.forever().next();
        // If the socket is being created, this waits until it exists and can be removed.
        let mut server = own.lock().unwrap_or_else(PoisonError::into_inner);
        drop(server.take());
        std::process::exit(0);
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(ending)?;
    {
        // Check the socket's path before the load, which can take minutes.
        let _held = server.lock().unwrap_or_else(PoisonError::into_inner);
        Server::check(&arguments.socket)?;
    }
    let loader = engine::loader_for(&arguments.engine, &arguments.paths)?;
    let cpu_before = usage::cpu_time();
    let load = loader.load(&arguments.paths).start();
    let image = block_on(finish(load, is_quiet()))?.map_err(about)?;
    let text = summary(&image, &vec![None; image.files().len()], Used::since(cpu_before));
    let options = arguments.allow_users.iter().fold(ServerOptions::default(), |options, &user| options.allow_user(user));
    {
        // The socket is created only after the load. A client that connects before the image is
        // published waits for the image.
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
