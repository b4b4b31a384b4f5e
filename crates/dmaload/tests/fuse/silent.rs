//! Tests for silent servers, which do not answer. Each server runs in its own process.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dmaload::{Error, Route};
use dmaload_testing::served::{ServedFolder, folder_to_serve};

use crate::common::{assert_same, folder, random_bytes};
use crate::file_system::{Manners, Model, Mounted, Overlay, may_mount, read_only};
use crate::{BYTES, DIRECT_ROUTES, SEGMENT, loader, options, small_loader};

/// A file system whose server runs in another process and does not answer some requests.
pub(crate) struct SilentServer {
    pub(crate) path: PathBuf,
    pub(crate) served: ServedFolder,
}

/// The environment variable that passes the server process its [`Manners`].
const MANNERS: &str = "DMALOAD_TEST_MANNERS";
/// The environment variable that names the file whose bytes the server process serves.
const CONTENT: &str = "DMALOAD_TEST_CONTENT";

impl SilentServer {
    fn start(manners: Manners) -> Self {
        SilentServer::start_with(&[(MANNERS, format!("{manners:?}").as_ref())])
    }

    /// Starts a server that serves the bytes of the file `content`.
    pub(crate) fn serving(content: &Path, manners: Manners) -> Self {
        SilentServer::start_with(&[(MANNERS, format!("{manners:?}").as_ref()), (CONTENT, content.as_os_str())])
    }

    fn start_with(variables: &[(&str, &OsStr)]) -> Self {
        let served = ServedFolder::start(folder(), "silent::the_silent_server", variables.iter().copied());
        SilentServer { path: served.path().join("model.bin"), served }
    }
}

#[test]
#[ignore = "not a test: other tests run it as their server process"]
fn the_silent_server() {
    let Some(folder) = folder_to_serve() else { return };
    let wanted = std::env::var(MANNERS).unwrap();
    let all = [Manners::NeverAnswers, Manners::NeverSendsAttributes, Manners::NeverAnswersAfterSilence];
    let manners = all.into_iter().find(|manners| format!("{manners:?}") == wanted).unwrap();
    let model = match std::env::var_os(CONTENT) {
        Some(content) => Model::holding([std::fs::read(content).unwrap(), Vec::new()], manners),
        None => Model::new(BYTES, manners),
    };
    fuser::mount(model, folder, &read_only()).unwrap();
}

/// A read that was sent to a server cannot be cancelled, and keeps the reading process from
/// exiting. The server runs in another process, because a server in the reading process would keep
/// itself alive.
#[tokio::test]
async fn shutdown_with_a_silent_server_ends_and_reports_leaks() {
    if !may_mount() {
        return;
    }
    for (route, overlaid) in DIRECT_ROUTES.into_iter().flat_map(|route| [(route, false), (route, true)]) {
        let server = SilentServer::start(Manners::NeverAnswers);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let path = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        // Enough staging for all reads of the file at once.
        let loader =
            loader().staging_bytes(32 << 20).load_options(options().route(route)).shutdown_timeout(Duration::from_millis(300));
        let loader = loader.build().unwrap();
        let mut load = loader.load(path).start();
        // Wait until all of the file's reads are in flight. There are five of them, or nine if
        // they are staged, because each staged read goes into half of a slot.
        let reads = if route == Route::Bounce { 9 } else { 5 };
        while loader.metrics().reads_in_flight < reads {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let seen = tokio::time::timeout(Duration::from_millis(300), load.next()).await;
        assert!(seen.is_err(), "{route}: a segment arrived although no read completed: {seen:?}");
        let start = Instant::now();
        let leaked = loader.shutdown().await.unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5), "{route}: the shutdown took {:?}", start.elapsed());
        // Four threads read from a file system that has not answered yet. The other reads were
        // still waiting for a thread and were cancelled.
        assert_eq!(leaked.threads, 4, "{route}: {leaked}");
        let (staged, pieces) = if route == Route::Bounce { (4 * (2 << 20), 2) } else { (0, 4) };
        // Pieces are read in the order in which they were allocated, so the last piece of the
        // file, which has only one block, can be among those that are being read. It takes two
        // staged reads to cover any other piece, so four staged reads that include the last piece
        // extend over three pieces.
        let last = if route == Route::Bounce { pieces } else { pieces - 1 };
        let expected = [pieces * SEGMENT, last * SEGMENT + 4096].map(|bytes| (bytes + staged) as u64);
        assert!(expected.contains(&leaked.bytes), "{route}: {leaked}");
        let ended = tokio::time::timeout(Duration::from_secs(5), load.finish())
            .await
            .expect("a load should fail when its loader shuts down");
        assert!(matches!(ended, Err(Error::ShutDown)), "{route}: {ended:?}");
    }
}

/// All loads from a silent file system together use no more than that file system's share of the
/// window, the queue, staging and threads.
#[tokio::test]
async fn silent_file_system_does_not_stop_other_file_systems() {
    let Some(answering) = Mounted::new(Manners::AnswersShort(BYTES)) else { return };
    let folder = folder();
    let plain = folder.path().join("plain.bin");
    std::fs::write(&plain, &*answering.bytes).unwrap();
    for (route, overlaid) in DIRECT_ROUTES.into_iter().flat_map(|route| [(route, false), (route, true)]) {
        let server = SilentServer::start(Manners::NeverAnswers);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let silent = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        let loader = small_loader(route);
        let mut silent = [loader.load(silent).start(), loader.load(silent).start()];
        for load in &mut silent {
            assert!(tokio::time::timeout(Duration::from_millis(200), load.next()).await.is_err(), "{route}");
        }
        for path in [&plain, &answering.path] {
            let ended = tokio::time::timeout(Duration::from_secs(20), loader.load(path)).await;
            let image = ended
                .unwrap_or_else(|_| panic!("{route}: the load of {} is waiting for the silent server", path.display()))
                .unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &answering.bytes, &route.to_string());
        }
        loader.shutdown().await.unwrap_err();
    }
}

/// Each file system has one share of the loader's resources, no matter how many of its loads wait
/// for a silent server.
#[tokio::test]
async fn many_silent_loads_do_not_stop_other_file_systems() {
    if !may_mount() {
        return;
    }
    let folder = folder();
    let bytes = random_bytes(BYTES, 5);
    let plain = ["a.bin", "b.bin", "c.bin"].map(|name| folder.path().join(name));
    for path in &plain {
        std::fs::write(path, &bytes).unwrap();
    }
    let routes = DIRECT_ROUTES.map(Some).into_iter().chain([None]);
    for (route, limited) in routes.map(|route| (route, false)).chain([(None, true)]) {
        let what = format!("{}, limited: {limited}", route.map_or("auto".to_owned(), |route| route.to_string()));
        let servers = [(); 2].map(|()| SilentServer::start(Manners::NeverAnswers));
        let overlay = Overlay::over(servers[1].served.path());
        let builder = loader().window_bytes(8 * SEGMENT as u64).shutdown_timeout(Duration::from_millis(300));
        let builder = route.into_iter().fold(builder, |builder, route| builder.load_options(options().route(route)));
        // Twenty of the forty silent loads would use up the limit.
        let builder = if limited { builder.memory_limit_bytes(20 * BYTES as u64) } else { builder };
        let loader = builder.build().unwrap();
        let paths = [&servers[0].path, &overlay.path].into_iter().flat_map(|path| [path; 20]);
        let mut silent: Vec<_> = paths.map(|path| loader.load(path).start()).collect();
        let mut before = u64::MAX;
        while before != loader.metrics().reads_in_flight || before == 0 {
            before = loader.metrics().reads_in_flight;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert!(tokio::time::timeout(Duration::from_millis(100), silent[0].next()).await.is_err(), "{what}");
        let others = plain.each_ref().map(|path| loader.load(path).start());
        for load in others {
            let ended = tokio::time::timeout(Duration::from_secs(20), load).await;
            let image = ended.unwrap_or_else(|_| panic!("{what}: a load is waiting for the silent servers")).unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &bytes, &what);
        }
        // Dropped loads with reads in flight do not stop other loads, either.
        silent.truncate(1);
        for path in &plain {
            let ended = tokio::time::timeout(Duration::from_secs(20), loader.load(path)).await;
            let image = ended.unwrap_or_else(|_| panic!("{what}: a load is waiting for dropped loads")).unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &bytes, &what);
        }
        loader.shutdown().await.unwrap_err();
    }
}

/// Loads from a silent server use up `max_open_loads`. After 5 to 10 s without data, they no
/// longer count as open while another load is waiting.
#[tokio::test]
async fn silent_loads_do_not_keep_all_open_load_places() {
    if !may_mount() {
        return;
    }
    let folder = folder();
    let (plain, bytes) = (folder.path().join("plain.bin"), random_bytes(BYTES, 5));
    std::fs::write(&plain, &bytes).unwrap();
    let server = SilentServer::start(Manners::NeverAnswers);
    let loader = loader().max_open_loads(20).shutdown_timeout(Duration::from_millis(300)).build().unwrap();
    let silent: Vec<_> = (0..20).map(|_| loader.load(&server.path).start()).collect();
    let ended = tokio::time::timeout(Duration::from_secs(40), loader.load(&plain)).await;
    let image = ended.expect("loads from a silent server should not count towards the limit on open loads").unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &bytes, "a load next to silent loads");
    // Dropped loads with reads in flight do not count as open, either.
    drop(silent);
    let ended = tokio::time::timeout(Duration::from_secs(40), loader.load(&plain)).await;
    assert_same(&ended.unwrap().unwrap().files()[0].bytes().unwrap(), &bytes, "a load after silent loads were dropped");
    loader.shutdown().await.unwrap_err();
}

/// A read that was sent to a server cannot be cancelled. A read that is still waiting for a thread
/// can and must be cancelled, because all of the load's threads hang.
#[tokio::test]
async fn dropped_silent_load_cancels_reads_that_have_not_started() {
    if !may_mount() {
        return;
    }
    let server = SilentServer::start(Manners::NeverAnswers);
    let options = options().route(Route::PreadDirect).chunk_bytes(256 << 10);
    let loader = loader().load_options(options).shutdown_timeout(Duration::from_millis(300)).build().unwrap();
    let load = loader.load(&server.path).start();
    let wait_for = async |reads: std::ops::RangeInclusive<u64>| {
        let start = Instant::now();
        while !reads.contains(&loader.metrics().reads_in_flight) {
            assert!(start.elapsed() < Duration::from_secs(20), "{reads:?}: {:?}", loader.metrics());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // Wait until the load has as many of the file's 33 reads in flight as it may have. That is
    // about 32, because it leaves room for one read by other loads from its file system.
    wait_for(30..=33).await;
    drop(load);
    // Only the reads of the four reading threads remain.
    wait_for(1..=4).await;
    let leaked = loader.shutdown().await.unwrap_err();
    assert_eq!(leaked.threads, 4, "{leaked}");
    assert!(leaked.bytes <= SEGMENT as u64, "only the piece that the four reads belong to should be leaked: {leaked}");
}

/// The final check of a file requests its attributes from the server. This can block a worker
/// indefinitely.
#[tokio::test]
async fn server_silent_about_attributes_holds_one_worker() {
    if !may_mount() {
        return;
    }
    let folder = folder();
    let (plain, bytes) = (folder.path().join("plain.bin"), random_bytes(BYTES, 5));
    std::fs::write(&plain, &bytes).unwrap();
    for overlaid in [false, true] {
        let server = SilentServer::start(Manners::NeverSendsAttributes);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let path = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        let loader = loader().allocator_threads(2).shutdown_timeout(Duration::from_millis(300)).build().unwrap();
        let mut load = loader.load(path).start();
        for _ in 0..4 {
            load.next().await.unwrap().unwrap();
        }
        let last = tokio::time::timeout(Duration::from_millis(300), load.next()).await;
        assert!(last.is_err(), "the last segment arrived before the file was checked: {last:?}");
        let ended = tokio::time::timeout(Duration::from_secs(20), loader.load(&plain)).await;
        let image = ended.expect("another load is waiting for the silent server").unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, "another load");
        let leaked = loader.shutdown().await.unwrap_err();
        assert_eq!((leaked.bytes, leaked.threads), (0, 1), "no memory should be leaked, and only one worker should hang");
        assert!(matches!(load.finish().await, Err(Error::ShutDown)));
    }
}
