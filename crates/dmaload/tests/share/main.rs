//! Tests for shared images: one process loads a model, and others map the same memory. Most
//! clients run in the test's process. Clients that are killed, run as other users, or need their
//! own address space run in other processes.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(clippy::print_stdout, reason = "measurements are printed")]

#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod messages;
mod roles;
mod users;

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dmaload::heap::AnonHeap;
use dmaload::model::TensorMap;
use dmaload::share::{AttachOptions, Server, ServerOptions, attach, attach_blocking};
use dmaload::{Error, Image, LoadOptions, Loader, Shard, Source};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with};
use rustix::process::{Resource, Rlimit, setrlimit, umask};
use safetensors::tensor::{Dtype, TensorView, serialize};
use sha2::{Digest, Sha256};

use common::{assert_same, file, folder, random_bytes};

const SEGMENT: u64 = 2 << 20;

fn write_model(folder: &Path) -> PathBuf {
    let data = random_bytes(3_000_000, 1);
    let view = |name: &str, shape: &[usize]| {
        let bytes = 2 * shape.iter().product::<usize>();
        (name.to_owned(), TensorView::new(Dtype::BF16, shape.to_vec(), &data[..bytes]).unwrap())
    };
    let all = serialize([view("a", &[1000, 1500]), view("b", &[30, 70]), view("empty", &[0, 3])], None).unwrap();
    file(folder, "model.safetensors", &all)
}

/// Returns a GGUF file with one tensor, `i`, which is the I8 number 7.
fn gguf_of_one_byte() -> Vec<u8> {
    let counts = [1_u64, 0].map(u64::to_le_bytes).concat();
    let tensor = [&1_u64.to_le_bytes()[..], b"i", &0_u32.to_le_bytes(), &24_u32.to_le_bytes(), &0_u64.to_le_bytes()].concat();
    let mut bytes = [&b"GGUF"[..], &3_u32.to_le_bytes(), &counts, &tensor].concat();
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.push(7);
    bytes
}

async fn load(paths: &[&Path]) -> Image {
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT)).build().unwrap();
    loader.load(Source::paths(paths.iter().copied())).await.unwrap()
}

/// Loads a model and starts a server that shares it. Returns the image, the server's socket, and
/// the server.
async fn serve_model(folder: &Path) -> (Image, PathBuf, Server) {
    let image = load(&[&write_model(folder)]).await;
    let socket = folder.join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    server.publish("model", image.clone()).unwrap();
    (image, socket, server)
}

fn default_options() -> AttachOptions {
    AttachOptions::default()
}

fn assert_same_image(ours: &Image, theirs: &Image) {
    assert_eq!(ours.files().len(), theirs.files().len());
    for (ours, theirs) in ours.files().iter().zip(theirs.files()) {
        assert_eq!((ours.path(), ours.len()), (theirs.path(), theirs.len()));
        assert_eq!(ours.tensor_map().map(TensorMap::format), theirs.tensor_map().map(TensorMap::format));
        assert_same(&ours.bytes().unwrap(), &theirs.bytes().unwrap(), "file");
    }
    let names = |image: &Image| image.tensors().map(|tensor| tensor.name().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs));
    for tensor in ours.tensors() {
        let other = theirs.tensor(tensor.name()).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape(), tensor.file_range()), (other.dtype(), other.shape(), other.file_range()));
        assert_same(&tensor.bytes().unwrap(), &other.bytes().unwrap(), tensor.name());
    }
}

#[tokio::test]
async fn client_keeps_its_image_after_the_server_ends() {
    let folder = folder();
    let path = write_model(folder.path());
    // Small files share memory, and a raw file has no tensors.
    let raw = file(folder.path(), "raw.bin", &random_bytes(5 << 20, 2));
    let small = [1, 2, 3].map(|n| file(folder.path(), &format!("small{n}"), &random_bytes(1000 * n, 5)));
    let gguf = file(folder.path(), "model.gguf", &gguf_of_one_byte());
    let paths: Vec<&Path> = [&path, &raw, &gguf].into_iter().chain(&small).map(PathBuf::as_path).collect();
    let image = load(&paths).await;
    let formats: Vec<_> = image.files()[..3].iter().map(|file| file.tensor_map().map(TensorMap::format)).collect();
    assert_eq!(formats, [Some("safetensors"), None, Some("gguf")]);
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    server.publish("model", image.clone()).unwrap();
    let attached = attach(&socket, default_options()).await.unwrap();
    assert_eq!((attached.process, attached.dma_bufs), (std::process::id(), false));
    assert!(attached.image.report().notes[0].contains("attached to"));
    drop(server);
    assert!(!socket.exists());
    assert_same_image(&image, &attached.image);
    drop(image);
    assert_same(&attached.image.files()[1].bytes().unwrap(), &fs::read(&raw).unwrap(), "after the server's image was dropped");
    // Clients cannot write to shared memory.
    let memfd = attached.image.segments()[0].hand_out_memfd().unwrap();
    assert!(rustix::io::pwrite(memfd, b"x", 0).is_err());
}

#[tokio::test]
async fn images_are_published_and_withdrawn_by_name() {
    let folder = folder();
    let path = write_model(folder.path());
    let image = load(&[&path]).await;
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    let refused = |options: AttachOptions| attach_blocking(&socket, &options).unwrap_err().to_string();
    server.publish("a", image.clone()).unwrap();
    server.publish("b", image.clone()).unwrap();
    assert_eq!(server.names(), ["a", "b"]);
    let reason = refused(default_options());
    assert!(reason.ends_with(r#"the server shares several images: choose one of "a", "b""#), "{reason}");
    let reason = refused(default_options().name("c"));
    assert!(reason.ends_with(r#"the server does not share an image "c", but "a", "b""#), "{reason}");
    assert!(refused(default_options().name("n".repeat(1000))).ends_with("is 1000 bytes long, more than the limit of 496"));
    attach_blocking(&socket, &default_options().name("b")).unwrap();
    assert!(server.withdraw("a").is_some() && server.withdraw("a").is_none());
    attach_blocking(&socket, &default_options()).unwrap();
    // The client can continue before the server has counted it.
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.served().0 < 2 {
        assert!(Instant::now() < deadline, "{:?} served", server.served());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(server.served().0, 2);
    assert!(
        matches!(Server::bind(&socket, ServerOptions::default()), Err(Error::Share { reason, .. }) if reason.contains("is listening there"))
    );
    // Selected and sharded tensors can be shared as well.
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT)).build().unwrap();
    let options = loader.load_options().tensors(["b", "a"]).shard(Shard { rank: 1, world_size: 4, dim: Some(1) });
    let part = loader.load(&path).options(options).await.unwrap();
    server.publish("part", part.clone()).unwrap();
    let theirs = attach_blocking(&socket, &default_options().name("part")).unwrap().image;
    assert_eq!(theirs.tensors().map(|tensor| tensor.name().to_owned()).collect::<Vec<_>>(), ["b", "a"]);
    for tensor in part.tensors() {
        assert_same(&tensor.to_vec().unwrap(), &theirs.tensor(tensor.name()).unwrap().to_vec().unwrap(), tensor.name());
    }
    // Names are untrusted, so errors escape control characters.
    server.publish("\u{1b}]0;title\u{7}", image.clone()).unwrap();
    let reason = refused(default_options());
    assert!(!reason.contains(|char: char| char.is_control()) && reason.contains(r"\u{1b}]0;title\u{7}"), "{reason:?}");
    for number in 0..200 {
        server.publish(&format!("image number {number}"), image.clone()).unwrap();
    }
    let reason = refused(default_options().name("c"));
    assert!(reason.contains(" more") && reason.len() < 2000, "{reason}");
    for name in server.names() {
        server.withdraw(&name);
    }
    assert!(refused(default_options()).contains("no longer shares any image"));
    assert!(refused(default_options().name("a")).contains("no longer shares any image"));
    let anon = Loader::builder().heap(AnonHeap::default()).build().unwrap().load(&path).await.unwrap();
    assert!(matches!(server.publish("anon", anon), Err(Error::NoDescriptor { .. })));
}

#[tokio::test]
async fn stale_socket_is_replaced_and_other_files_stay() {
    let folder = folder();
    let socket = folder.path().join("socket");
    // The socket of another program is kept while the program listens, and replaced afterwards.
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(Server::bind(&socket, ServerOptions::default()).is_err(), "the socket of a running program must not be replaced");
    drop(listener);
    drop(Server::bind(&socket, ServerOptions::default()).unwrap());
    let raw = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&raw, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
    drop(raw);
    drop(Server::bind(&socket, ServerOptions::default()).unwrap());
    let other = file(folder.path(), "file", b"kept");
    assert!(Server::bind(&other, ServerOptions::default()).is_err());
    assert_eq!(fs::read(&other).unwrap(), b"kept");
    let error = attach(folder.path().join("missing"), default_options()).await.unwrap_err();
    assert!(error.to_string().contains("ENOENT"), "{error}");
}

fn connect_to(socket: &Path) -> OwnedFd {
    let own = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    connect(&own, &SocketAddrUnix::new(socket).unwrap()).unwrap();
    own
}

fn count_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Starts a client process, which prints the memfds that it maps and the digest of their bytes.
fn spawn_client(socket: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "the_client", "--nocapture", "--quiet"])
        .env("DMALOAD_TEST_SOCKET", socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "not a test: other tests run it as their client process"]
fn the_client() {
    let Some(socket) = std::env::var_os("DMALOAD_TEST_SOCKET") else { return };
    let options = parse_users("DMALOAD_TEST_TRUST").fold(AttachOptions::default(), AttachOptions::trust_user);
    let image = match attach_blocking(socket, &options) {
        Ok(attached) => attached.image,
        Err(error) => {
            println!("error {error}");
            return;
        }
    };
    let mut digest = Sha256::new();
    image.segments().iter().for_each(|segment| digest.update(segment.bytes().unwrap()));
    let inodes = image.segments().iter().map(|segment| rustix::fs::fstat(segment.hand_out_memfd().unwrap()).unwrap().st_ino);
    println!("memfds {:?}", inodes.collect::<Vec<_>>());
    println!("digest {}", hex(&digest.finalize()));
}

fn parse_users(variable: &str) -> impl Iterator<Item = u32> {
    let text = std::env::var(variable).unwrap_or_default();
    text.split(',').filter(|user| !user.is_empty()).map(|user| user.parse().unwrap()).collect::<Vec<_>>().into_iter()
}

#[test]
#[ignore = "not a test: other tests run it as their server process"]
fn the_server() {
    let Some(socket) = std::env::var_os("DMALOAD_TEST_SOCKET") else { return };
    if let Ok(limit) = std::env::var("DMALOAD_TEST_NOFILE") {
        let limit = Rlimit { current: limit.parse().ok(), maximum: limit.parse().ok() };
        setrlimit(Resource::Nofile, limit).unwrap();
    }
    if let Ok(mask) = std::env::var("DMALOAD_TEST_UMASK") {
        umask(Mode::from_raw_mode(u32::from_str_radix(&mask, 8).unwrap()));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let image = runtime.block_on(load(&[Path::new(&std::env::var_os("DMALOAD_TEST_MODEL").unwrap())]));
    let options = parse_users("DMALOAD_TEST_ALLOW").fold(ServerOptions::default(), ServerOptions::allow_user);
    let server = match Server::bind(socket, options) {
        Ok(server) => server,
        Err(error) => {
            println!("error {error}");
            return;
        }
    };
    server.publish("model", image).unwrap();
    println!("ready {:o}", umask(Mode::empty()).as_raw_mode());
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    // A client can have its image before the server has counted the client, so wait until the last
    // client is counted.
    let expected: u64 = std::env::var("DMALOAD_TEST_SERVED").map_or(0, |count| count.parse().unwrap());
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while server.served().0 < expected && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (served, refused) = server.served();
    println!("ended {served} {refused}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn shared_memory_bytes() -> u64 {
    dmaload_testing::meminfo_bytes("Shmem")
}

#[tokio::test]
async fn processes_share_memory_even_if_others_are_killed() {
    let folder = folder();
    // DMALOAD_SHARE_MIB=1024 shares 1 GiB.
    let mib: usize = std::env::var("DMALOAD_SHARE_MIB").map_or(256, |mib| mib.parse().unwrap());
    let bytes = random_bytes(mib << 20, 3);
    let expected = hex(&Sha256::digest(&bytes));
    let path = file(folder.path(), "model.bin", &bytes);
    drop(bytes);
    let before = shared_memory_bytes();
    let image = Loader::new().unwrap().load(&path).await.unwrap();
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    server.publish("model", image.clone()).unwrap();
    let inodes = image.segments().iter().map(|segment| rustix::fs::fstat(segment.hand_out_memfd().unwrap()).unwrap().st_ino);
    let memfds = format!("memfds {:?}", inodes.collect::<Vec<_>>());
    for delay in 0..8 {
        let mut killed = spawn_client(&socket);
        std::thread::sleep(Duration::from_millis(3 * delay));
        killed.kill().unwrap();
        killed.wait().unwrap();
    }
    let clients: Vec<_> = (0..10).map(|_| spawn_client(&socket)).collect();
    let mut most = 0;
    for client in clients {
        most = most.max(shared_memory_bytes());
        let output = client.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(&format!("digest {expected}")), "{text}");
        // The client mapped the same memory, not a copy.
        assert!(text.contains(&memfds), "{text} {memfds}");
    }
    // This number is only printed, because it includes memory that other processes on this machine
    // use.
    let taken = most.saturating_sub(before) >> 20;
    println!("ten processes attached to {mib} MiB: {taken} MiB of shared memory in all");
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.served().0 < 10 {
        assert!(Instant::now() < deadline, "{:?} served", server.served());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Descriptors in flight count against a limit on the server's user. The server therefore sends
/// descriptors to only a few clients of one user at a time. If these clients do not receive the
/// descriptors, other clients of that user wait.
#[tokio::test]
async fn hoarding_clients_delay_others_only_until_they_leave() {
    let folder = folder();
    let (image, socket, _server) = serve_model(folder.path()).await;
    let request = [&b"dmaload\0"[..], &1u32.to_le_bytes(), &1u32.to_le_bytes(), b"model"].concat();
    let hoards: Vec<_> = (0..20)
        .map(|_| {
            let client = connect_to(&socket);
            send(&client, &request, SendFlags::NOSIGNAL).unwrap();
            client
        })
        .collect();
    // Other clients of this user wait until these clients close their connections. Clients of
    // other users would not have to wait.
    let waiting = tokio::time::timeout(Duration::from_millis(300), attach(&socket, default_options())).await;
    assert!(waiting.is_err(), "the client must wait, because its user has as many receivers as allowed");
    drop(hoards);
    assert_same_image(&image, &attach(&socket, default_options()).await.unwrap().image);
}

#[tokio::test]
async fn server_leaves_the_socket_of_its_replacement() {
    let folder = folder();
    let (image, socket, first) = serve_model(folder.path()).await;
    fs::remove_file(&socket).unwrap();
    let second = Server::bind(&socket, ServerOptions::default()).unwrap();
    second.publish("model", image).unwrap();
    drop(first);
    attach(&socket, default_options()).await.unwrap();
    drop(second);
    assert!(!socket.exists());
    assert!(fs::read_dir(folder.path()).unwrap().all(|entry| entry.unwrap().file_name() == "model.safetensors"));
}

#[tokio::test]
async fn client_waits_for_the_first_image() {
    let folder = folder();
    let image = load(&[&write_model(folder.path())]).await;
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    let clients: Vec<_> = [default_options(), default_options().name("model")]
        .into_iter()
        .map(|options| {
            let socket = socket.clone();
            std::thread::spawn(move || attach_blocking(socket, &options))
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let started = Instant::now();
    server.publish("model", image.clone()).unwrap();
    for client in clients {
        assert_same_image(&image, &client.join().unwrap().unwrap().image);
    }
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    // A client fails if no image is published within 5 s.
    drop(server);
    let _server = Server::bind(&socket, ServerOptions::default()).unwrap();
    let started = Instant::now();
    let error = attach(&socket, default_options()).await.unwrap_err();
    assert!(error.to_string().contains("the server still has no image after 5s"), "{error}");
    assert!((4..9).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
}
