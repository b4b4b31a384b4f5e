//! Servers that do not answer, each in a process of its own.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dmaload::{Error, Route};
use dmaload_testing::served::{ServedFolder, folder_to_serve};

use crate::common::{assert_same, folder, random_bytes};
use crate::file_system::{Manners, Model, Mounted, Overlay, may_mount, read_only};
use crate::{BYTES, DIRECT_ROUTES, loader, options, shared_loader};

/// A file system of a server in a process of its own, which never answers direct reads, or requests for attributes.
pub(crate) struct SilentServer {
    pub(crate) path: PathBuf,
    pub(crate) served: ServedFolder,
}

/// How the server is silent.
const MANNERS: &str = "DMALOAD_TEST_MANNERS";
/// A file whose bytes the server has.
const CONTENT: &str = "DMALOAD_TEST_CONTENT";

impl SilentServer {
    fn start(manners: Manners) -> Self {
        SilentServer::start_with(&[(MANNERS, format!("{manners:?}").as_ref())])
    }

    /// Serves the bytes of a file.
    pub(crate) fn of(content: &Path, manners: Manners) -> Self {
        SilentServer::start_with(&[(MANNERS, format!("{manners:?}").as_ref()), (CONTENT, content.as_os_str())])
    }

    fn start_with(variables: &[(&str, &OsStr)]) -> Self {
        let served = ServedFolder::start(folder(), "silent::the_silent_server", variables.iter().copied());
        SilentServer { path: served.path().join("model.bin"), served }
    }
}

#[test]
#[ignore = "no test: the server of another one, in its own process"]
fn the_silent_server() {
    let Some(folder) = folder_to_serve() else { return };
    let asked = std::env::var(MANNERS).unwrap();
    let all = [Manners::NeverAnswers, Manners::NeverTells, Manners::NeverAnswersAfterSilence];
    let manners = all.into_iter().find(|manners| format!("{manners:?}") == asked).unwrap();
    let model = match std::env::var_os(CONTENT) {
        Some(content) => Model::holding([std::fs::read(content).unwrap(), Vec::new()], manners),
        None => Model::new(BYTES, manners),
    };
    fuser::mount(model, folder, &read_only()).unwrap();
}

/// A read that its server has been sent can't be called off, and keeps the process that waits for it: a server in the process
/// of the reader would keep itself.
#[tokio::test]
async fn a_shutdown_ends_though_a_server_never_answers_and_tells_what_is_left_to_it() {
    if !may_mount() {
        return;
    }
    for (route, overlaid) in DIRECT_ROUTES.into_iter().flat_map(|route| [(route, false), (route, true)]) {
        let server = SilentServer::start(Manners::NeverAnswers);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let path = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        // Enough staging for as many reads at once.
        let loader =
            loader().staging_bytes(32 << 20).load_options(options().route(route)).shutdown_timeout(Duration::from_millis(300));
        let loader = loader.build().unwrap();
        let mut load = loader.load(path).start();
        // All of the file is being read: five reads, each into a slot of its own where they are staged.
        while loader.metrics().reads_in_flight < 5 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let seen = tokio::time::timeout(Duration::from_millis(300), load.next()).await;
        assert!(seen.is_err(), "{route}: nothing is shown of what was never read: {seen:?}");
        let start = Instant::now();
        let leaked = loader.shutdown().await.unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5), "{route}: it took {:?}", start.elapsed());
        let staged = if route == Route::Bounce { 5 * (2 << 20) } else { 0 };
        let expected = BYTES.next_multiple_of(4096) + staged;
        // Threads read from such a file: four, or as many as there are reads.
        assert_eq!(leaked.bytes, expected as u64, "{route}: {leaked}");
        assert!((4..=5).contains(&leaked.threads), "{route}: {leaked}");
        let ended = tokio::time::timeout(Duration::from_secs(5), load.finish()).await.expect("a load ends with its loader");
        assert!(matches!(ended, Err(Error::ShutDown)), "{route}: {ended:?}");
    }
}

/// What one file system holds up is its loads' part of the window, the queue, staging and threads; not the others'.
#[tokio::test]
async fn a_file_system_that_never_answers_stops_no_load_of_another_one() {
    let Some(answering) = Mounted::new(Manners::AnswersShort(BYTES)) else { return };
    let folder = folder();
    let plain = folder.path().join("plain.bin");
    std::fs::write(&plain, &*answering.bytes).unwrap();
    for (route, overlaid) in DIRECT_ROUTES.into_iter().flat_map(|route| [(route, false), (route, true)]) {
        let server = SilentServer::start(Manners::NeverAnswers);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let silent = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        let loader = shared_loader(route);
        let mut silent = [loader.load(silent).start(), loader.load(silent).start()];
        for load in &mut silent {
            assert!(tokio::time::timeout(Duration::from_millis(200), load.next()).await.is_err(), "{route}");
        }
        for path in [&plain, &answering.path] {
            let ended = tokio::time::timeout(Duration::from_secs(20), loader.load(path)).await;
            let image = ended.unwrap_or_else(|_| panic!("{route}: {} waits for what is silent", path.display())).unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &answering.bytes, &route.to_string());
        }
        loader.shutdown().await.unwrap_err();
    }
}

/// The last look at a file asks its server, which may keep a worker as long as it likes.
#[tokio::test]
async fn a_server_silent_about_attributes_holds_one_worker() {
    if !may_mount() {
        return;
    }
    let folder = folder();
    let (plain, bytes) = (folder.path().join("plain.bin"), random_bytes(BYTES, 5));
    std::fs::write(&plain, &bytes).unwrap();
    for overlaid in [false, true] {
        let server = SilentServer::start(Manners::NeverTells);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let path = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        let loader = loader().allocator_threads(2).shutdown_timeout(Duration::from_millis(300)).build().unwrap();
        let mut load = loader.load(path).start();
        for _ in 0..4 {
            load.next().await.unwrap().unwrap();
        }
        let last = tokio::time::timeout(Duration::from_millis(300), load.next()).await;
        assert!(last.is_err(), "the last segment waits for the file's check: {last:?}");
        let ended = tokio::time::timeout(Duration::from_secs(20), loader.load(&plain)).await;
        let image = ended.expect("another load waits for what is silent").unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, "another load");
        let leaked = loader.shutdown().await.unwrap_err();
        assert_eq!((leaked.bytes, leaked.threads), (0, 1), "no read is in flight, and one worker hangs");
        assert!(matches!(load.finish().await, Err(Error::ShutDown)));
    }
}
