//! One process loads, others have the same memory. Clients here are in this process and, where it
//! matters, in others.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
#![allow(clippy::print_stdout, reason = "what was measured is told")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{assert_same, file, folder, random_bytes};
use dmaload::heap::AnonHeap;
use dmaload::share::{AttachOptions, Server, ServerOptions, attach, attach_blocking};
use dmaload::{Error, Image, Loader, Shard};
use rustix::fs::{CWD, Mode, RenameFlags, renameat_with};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send, shutdown,
    socket_with,
};
use rustix::process::{Resource, Rlimit, Uid, setrlimit, umask};
use safetensors::tensor::{Dtype, TensorView, serialize};
use sha2::{Digest, Sha256};

const SEGMENT: u64 = 2 << 20;

fn model(folder: &Path) -> PathBuf {
    let data = random_bytes(3_000_000, 1);
    let view = |name: &str, shape: &[usize]| {
        let bytes = 2 * shape.iter().product::<usize>();
        (name.to_owned(), TensorView::new(Dtype::BF16, shape.to_vec(), &data[..bytes]).unwrap())
    };
    let all = serialize([view("a", &[1000, 1500]), view("b", &[30, 70]), view("empty", &[0, 3])], None).unwrap();
    file(folder, "model.safetensors", &all)
}

async fn loaded(paths: &[&Path]) -> Image {
    let loader = Loader::builder().segment_bytes(SEGMENT).build().unwrap();
    loader.load_with(paths.iter().copied(), loader.options()).await.unwrap()
}

/// A model, and a server that has it.
async fn serving(folder: &Path) -> (Image, PathBuf, Server) {
    let image = loaded(&[&model(folder)]).await;
    let socket = folder.join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    server.publish("model", image.clone()).unwrap();
    (image, socket, server)
}

fn default() -> AttachOptions {
    AttachOptions::default()
}

fn assert_same_image(ours: &Image, theirs: &Image) {
    assert_eq!(ours.files().len(), theirs.files().len());
    for (ours, theirs) in ours.files().iter().zip(theirs.files()) {
        assert_eq!((ours.path(), ours.len()), (theirs.path(), theirs.len()));
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
async fn a_client_has_the_same_image_and_keeps_it_when_the_server_is_gone() {
    let folder = folder();
    let path = model(folder.path());
    // Small files share a memory, and a raw one has no tensors.
    let raw = file(folder.path(), "raw.bin", &random_bytes(5 << 20, 2));
    let small = [1, 2, 3].map(|n| file(folder.path(), &format!("small{n}"), &random_bytes(1000 * n, 5)));
    let paths: Vec<&Path> = [&path, &raw].into_iter().chain(&small).map(PathBuf::as_path).collect();
    let image = loaded(&paths).await;
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    server.publish("model", image.clone()).unwrap();
    let attached = attach(&socket, default()).await.unwrap();
    assert_eq!((attached.process, attached.dma_bufs), (std::process::id(), false));
    assert!(attached.image.report().notes[0].contains("attached to"));
    drop(server);
    assert!(!socket.exists());
    assert_same_image(&image, &attached.image);
    drop(image);
    assert_same(&attached.image.files()[1].bytes().unwrap(), &fs::read(&raw).unwrap(), "after the loader");
    // What is shared can't be written to, by anybody.
    let memfd = attached.image.segments()[0].memfd().unwrap();
    assert!(rustix::io::pwrite(memfd, b"x", 0).is_err());
}

#[tokio::test]
async fn images_have_names_and_come_and_go() {
    let folder = folder();
    let path = model(folder.path());
    let image = loaded(&[&path]).await;
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    let refused = |options: AttachOptions| attach_blocking(&socket, &options).unwrap_err().to_string();
    server.publish("a", image.clone()).unwrap();
    server.publish("b", image.clone()).unwrap();
    assert_eq!(server.names(), ["a", "b"]);
    let reason = refused(default());
    assert!(reason.ends_with(r#"the server shares several images: name one of "a", "b""#), "{reason}");
    let reason = refused(default().name("c"));
    assert!(reason.ends_with(r#"the server has no image "c", but "a", "b""#), "{reason}");
    assert!(refused(default().name("n".repeat(1000))).contains("too long"));
    attach_blocking(&socket, &default().name("b")).unwrap();
    assert!(server.withdraw("a").is_some() && server.withdraw("a").is_none());
    attach_blocking(&socket, &default()).unwrap();
    // The server counts when it has sent all, the client goes on when it has received it.
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.served().0 < 2 {
        assert!(Instant::now() < deadline, "{:?} served", server.served());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(server.served().0, 2);
    assert!(
        matches!(Server::bind(&socket, ServerOptions::default()), Err(Error::Share { reason, .. }) if reason.contains("listens"))
    );
    // A part of a model is shared as it is.
    let loader = Loader::builder().segment_bytes(SEGMENT).build().unwrap();
    let options = loader.options().tensors(["b", "a"]).shard(Shard { rank: 1, world_size: 4, dim: Some(1) });
    let part = loader.load_with([&path], options).await.unwrap();
    server.publish("part", part.clone()).unwrap();
    let theirs = attach_blocking(&socket, &default().name("part")).unwrap().image;
    assert_eq!(theirs.tensors().map(|tensor| tensor.name().to_owned()).collect::<Vec<_>>(), ["b", "a"]);
    for tensor in part.tensors() {
        assert_same(&tensor.to_vec().unwrap(), &theirs.tensor(tensor.name()).unwrap().to_vec().unwrap(), tensor.name());
    }
    // Names are somebody else's.
    server.publish("\u{1b}]0;title\u{7}", image.clone()).unwrap();
    let reason = refused(default());
    assert!(!reason.contains(|char: char| char.is_control()) && reason.contains(r"\u{1b}]0;title\u{7}"), "{reason:?}");
    for number in 0..200 {
        server.publish(&format!("image number {number}"), image.clone()).unwrap();
    }
    let reason = refused(default().name("c"));
    assert!(reason.contains(" more") && reason.len() < 2000, "{reason}");
    for name in server.names() {
        server.withdraw(&name);
    }
    assert!(refused(default()).contains("shares no image any more"));
    assert!(refused(default().name("a")).contains("shares no image any more"));
    let anon = Loader::builder().heap(AnonHeap::default()).build().unwrap().load(&path).await.unwrap();
    assert!(matches!(server.publish("anon", anon), Err(Error::NoDescriptor { .. })));
}

#[tokio::test]
async fn a_socket_that_was_left_behind_is_replaced_and_what_is_none_stays() {
    let folder = folder();
    let socket = folder.path().join("socket");
    // As a process leaves it that was killed.
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(Server::bind(&socket, ServerOptions::default()).is_err(), "somebody listens there, though for something else");
    drop(listener);
    drop(Server::bind(&socket, ServerOptions::default()).unwrap());
    let raw = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&raw, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
    drop(raw);
    drop(Server::bind(&socket, ServerOptions::default()).unwrap());
    let other = file(folder.path(), "file", b"kept");
    assert!(Server::bind(&other, ServerOptions::default()).is_err());
    assert_eq!(fs::read(&other).unwrap(), b"kept");
    let error = attach(folder.path().join("missing"), default()).await.unwrap_err();
    assert!(error.to_string().contains("ENOENT"), "{error}");
}

fn connected(socket: &Path) -> OwnedFd {
    let own = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    connect(&own, &SocketAddrUnix::new(socket).unwrap()).unwrap();
    own
}

/// Descriptors of this process.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn ten_thousand_malformed_messages_and_clients_that_stop_harm_nobody() {
    let folder = folder();
    let (image, socket, _server) = serving(folder.path()).await;
    let before = descriptors();
    let noise = random_bytes(1 << 16, 7);
    let good = [&b"dmaload\0"[..], &1u32.to_le_bytes(), &1u32.to_le_bytes(), b"model"].concat();
    let mut stuck = Vec::new();
    for number in 0..10_000_usize {
        let client = connected(&socket);
        let message = match number % 5 {
            0 => noise[number..number + number % 600].to_vec(),
            1 => good[..number % good.len()].to_vec(),
            2 => {
                let mut damaged = good.clone();
                damaged[number % good.len()] ^= 1 << (number % 8);
                damaged
            }
            3 => [&good[..], &noise[..number % 5000]].concat(),
            _ => Vec::new(),
        };
        // With descriptors that nobody asked for, too: they are not taken.
        let _ = send(&client, &message, SendFlags::NOSIGNAL);
        if number % 40 == 0 {
            // Connected, and then nothing.
            stuck.push(connected(&socket));
        }
    }
    let started = Instant::now();
    let attached = attach(&socket, default()).await.unwrap();
    println!("10,000 malformed messages, {} silent clients; attached in {:?}", stuck.len(), started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(2), "it was held up for {:?}", started.elapsed());
    assert_same_image(&image, &attached.image);
    drop((attached, stuck));
    let deadline = Instant::now() + Duration::from_secs(20);
    while descriptors() > before {
        assert!(Instant::now() < deadline, "{} descriptors are left of {before}", descriptors());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A client in a process of its own, which prints the digest of what it has mapped.
fn client(socket: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "the_client", "--nocapture", "--quiet"])
        .env("DMALOAD_TEST_SOCKET", socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "no test: the client of another one, in its own process"]
fn the_client() {
    let Some(socket) = std::env::var_os("DMALOAD_TEST_SOCKET") else { return };
    let options = users_of("DMALOAD_TEST_TRUST").fold(AttachOptions::default(), AttachOptions::trust_user);
    let image = match attach_blocking(socket, &options) {
        Ok(attached) => attached.image,
        Err(error) => {
            println!("error {error}");
            return;
        }
    };
    let mut digest = Sha256::new();
    image.segments().iter().for_each(|segment| digest.update(segment.bytes().unwrap()));
    let inodes = image.segments().iter().map(|segment| rustix::fs::fstat(segment.memfd().unwrap()).unwrap().st_ino);
    println!("memories {:?}", inodes.collect::<Vec<_>>());
    println!("digest {}", hex(&digest.finalize()));
}

fn users_of(variable: &str) -> impl Iterator<Item = u32> {
    let text = std::env::var(variable).unwrap_or_default();
    text.split(',').filter(|user| !user.is_empty()).map(|user| user.parse().unwrap()).collect::<Vec<_>>().into_iter()
}

#[test]
#[ignore = "no test: the server of another one, in its own process"]
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
    let image = runtime.block_on(loaded(&[Path::new(&std::env::var_os("DMALOAD_TEST_MODEL").unwrap())]));
    let options = users_of("DMALOAD_TEST_ALLOW").fold(ServerOptions::default(), ServerOptions::allow_user);
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
async fn ten_processes_have_one_image_in_one_memory_and_one_that_is_killed_harms_nobody() {
    let folder = folder();
    // The issue's GiB by DMALOAD_SHARE_MIB=1024.
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
    let inodes = image.segments().iter().map(|segment| rustix::fs::fstat(segment.memfd().unwrap()).unwrap().st_ino);
    let memories = format!("memories {:?}", inodes.collect::<Vec<_>>());
    for delay in 0..8 {
        let mut killed = client(&socket);
        std::thread::sleep(Duration::from_millis(3 * delay));
        killed.kill().unwrap();
        killed.wait().unwrap();
    }
    let clients: Vec<_> = (0..10).map(|_| client(&socket)).collect();
    let mut most = 0;
    for client in clients {
        most = most.max(shared_memory_bytes());
        let output = client.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(&format!("digest {expected}")), "{text}");
        // The same memory, not a copy.
        assert!(text.contains(&memories), "{text} {memories}");
    }
    // Of the whole machine, other tests included.
    let taken = most.saturating_sub(before) >> 20;
    println!("ten processes attached to {mib} MiB: {taken} MiB of shared memory in all");
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.served().0 < 10 {
        assert!(Instant::now() < deadline, "{:?} served", server.served());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test]
async fn other_users_are_refused_unless_they_are_allowed() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be somebody else");
        return;
    }
    let folder = folder();
    let path = model(folder.path());
    let image = loaded(&[&path]).await;
    // Where others may go.
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let run_as = |user: u32, socket: &Path| {
        let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET)\ns.connect(sys.argv[1])\ns.send(b'dmaload\\0\\1\\0\\0\\0\\1\\0\\0\\0')\nm=s.recvmsg(64,4096)\nprint(m[0][12], len(m[1]))";
        let mut command = Command::new("python3");
        command.args(["-c", script]).arg(socket);
        command.uid(user);
        let output = command.output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let closed = place.path().join("closed");
    let server = Server::bind(&closed, ServerOptions::default()).unwrap();
    server.publish("model", image.clone()).unwrap();
    assert_eq!(run_as(65534, &closed), "", "the socket is the owner's");
    let open = place.path().join("open");
    let server = Server::bind(&open, ServerOptions::default().allow_user(65533)).unwrap();
    server.publish("model", image).unwrap();
    assert_eq!(run_as(65534, &open), "3 0", "not allowed, and no descriptors");
    assert_eq!(run_as(65533, &open), "0 1", "allowed");
    assert_eq!(fs::metadata(&closed).unwrap().permissions().mode() & 0o777, 0o600);
}

/// A server that lies: descriptors of other things, and descriptions that do not fit them.
#[tokio::test]
async fn a_server_that_lies_leads_nobody_out_of_memory() {
    let folder = folder();
    let page = |sealed: bool| {
        let memfd = dmaload::dmabuf::Memfd::create("test", 8192).unwrap();
        if sealed {
            memfd.seal_against_writes().unwrap();
        }
        memfd.as_fd().try_clone_to_owned().unwrap()
    };
    let describe = |segments: &str, memories: u32| {
        format!(
            r#"{{"process":1,"route":"buffered","dma_bufs":false,"memories":{memories},"segments":{segments},"files":[{{"path":"a","bytes":16384,"part":[0,16384],"tensors":null}}]}}"#
        )
    };
    let description = |text: &str| {
        let memfd = dmaload::dmabuf::Memfd::create("test", text.len()).unwrap();
        rustix::io::pwrite(memfd.as_fd(), text.as_bytes(), 0).unwrap();
        memfd.seal_against_writes().unwrap();
        memfd.as_fd().try_clone_to_owned().unwrap()
    };
    let good = "[[0,0,0,0,8192,0,8192],[0,0,1,0,8192,8192,16384]]";
    let file = || fs::File::open("/proc/self/exe").unwrap().into();
    let huge = || {
        let memfd = dmaload::dmabuf::Memfd::create("test", 300 << 20).unwrap();
        memfd.seal_against_writes().unwrap();
        memfd.as_fd().try_clone_to_owned().unwrap()
    };
    let cases: Vec<(Vec<OwnedFd>, Option<&str>)> = vec![
        (vec![description(&describe(good, 2)), page(true), page(true)], None),
        (vec![description(&describe(good, 2)), page(true), page(false)], Some("a memory is not what it should be")),
        (vec![description(&describe(good, 2)), page(true), file()], Some("a memory is not what it should be")),
        (vec![description(&describe(good, 2)), page(true)], Some("1 memories came")),
        (vec![description("[]")], Some("its description is wrong")),
        (vec![description("{")], Some("no JSON")),
        (vec![page(false)], Some("its description")),
        (vec![file()], Some("its description")),
        (vec![description(&describe(good, 2).replace("buffered", "unheard of")), page(true), page(true)], Some("unknown route")),
        (
            vec![description(&describe(good, 2).replace("\"dma_bufs\":false", "\"dma_bufs\":true")), page(true), page(true)],
            Some("a memory is not what it should be"),
        ),
        (vec![huge()], Some("its description has 314572800 bytes")),
        // Larger than its memory, and with a gap between two segments of one span.
        (vec![description(&describe("[[0,0,0,0,12288,0,12288]]", 1)), page(true)], Some("do not fit their memory")),
        (
            vec![description(&describe("[[0,0,0,0,4096,0,4096],[0,0,1,0,8192,4096,12288]]", 2)), page(true), page(true)],
            Some("do not fit their memory"),
        ),
    ];
    for (number, (descriptors, expected)) in cases.into_iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let count = u32::try_from(descriptors.len()).unwrap();
        let answer = lying_server(&socket, vec![(reply(1, 0, count, count), descriptors)]);
        let seen = attach(&socket, default()).await;
        answer.join().unwrap();
        match (seen, expected) {
            (Ok(attached), None) => assert_eq!(attached.image.files()[0].bytes().unwrap().len(), 16384),
            (Err(error), Some(expected)) => assert!(error.to_string().contains(expected), "case {number}: {error}"),
            (seen, _) => panic!("case {number}: {seen:?}"),
        }
    }
}

fn reply(version: u32, status: u32, all: u32, here: u32) -> Vec<u8> {
    [&b"dmaload\0"[..], &version.to_le_bytes(), &status.to_le_bytes(), &all.to_le_bytes(), &here.to_le_bytes()].concat()
}

/// A message, and the descriptors that go with it.
type Message = (Vec<u8>, Vec<OwnedFd>);

/// A server that gives these messages to its only client, each when the one before was
/// acknowledged.
fn lying_server(socket: &Path, messages: Vec<Message>) -> std::thread::JoinHandle<()> {
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(socket).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    std::thread::spawn(move || {
        let client = rustix::net::accept(&listener).unwrap();
        for (message, descriptors) in messages {
            recv(&client, &mut [0; 512][..], RecvFlags::empty()).unwrap();
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            if !borrowed.is_empty() {
                assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&borrowed)));
            }
            rustix::net::sendmsg(&client, &[std::io::IoSlice::new(&message)], &mut control, SendFlags::empty()).unwrap();
        }
    })
}

#[test]
fn messages_of_a_server_that_lies_are_refused() {
    let folder = folder();
    let some = |count: usize| (0..count).map(|_| fs::File::open("/dev/null").unwrap().into()).collect::<Vec<OwnedFd>>();
    let (other, lost, closed) =
        ("of another version, or is none of dmaload", "descriptors were lost", "has closed the connection");
    let names = [&reply(1, 4, 2, 0)[..], b"\x1b]0;title\x07\0\xff\0"].concat();
    let cases: Vec<(Vec<Message>, &str)> = vec![
        (vec![(reply(2, 0, 1, 1), some(1))], other),
        (vec![(reply(1, 99, 1, 1), some(1))], other),
        (vec![(b"hello".to_vec(), some(1))], other),
        (vec![([&reply(1, 0, 1, 1)[..], b"x"].concat(), some(1))], other),
        (vec![(reply(1, 0, 1, 2), some(2))], other),
        (vec![(reply(1, 0, 1 << 20, 1), some(1))], other),
        (vec![(reply(1, 0, 3, 3), some(2))], lost),
        (vec![(reply(1, 0, 3, 1), some(2))], lost),
        (vec![(reply(1, 0, 1, 0), some(0))], lost),
        (vec![(reply(1, 0, 3, 2), some(2)), (reply(1, 0, 3, 2), some(2))], lost),
        (vec![(reply(1, 0, 3, 2), some(2))], closed),
        (vec![], closed),
        (vec![(reply(1, 1, 0, 0), some(0))], "does not understand the request"),
        (vec![(reply(1, 2, 0, 0), some(0))], "shares no image any more"),
        (vec![(reply(1, 3, 1234, 0), some(0))], "(ServerOptions::allow_user(1234))"),
        (vec![(reply(1, 6, 0, 0), some(0))], "the server is busy"),
        (vec![(names, some(0))], r#"name one of "\u{1b}]0;title\u{7}", "\u{fffd}""#),
    ];
    for (number, (messages, expected)) in cases.into_iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let server = lying_server(&socket, messages);
        let error = attach_blocking(&socket, &default()).unwrap_err().to_string();
        server.join().unwrap();
        let expected = expected.replace("\\u{fffd}", "\u{fffd}");
        assert!(error.contains(&expected), "case {number}: {error}");
    }
}

/// It closes with the request unread, which resets the connection, but the answer counts.
#[test]
fn answer_of_a_server_that_does_not_read_is_received() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let server = std::thread::spawn(move || {
        let client = rustix::net::accept(&listener).unwrap();
        // The request has come.
        recv(&client, &mut [0; 1][..], RecvFlags::PEEK).unwrap();
        send(&client, &reply(1, 6, 0, 0), SendFlags::empty()).unwrap();
    });
    let error = attach_blocking(&socket, &default()).unwrap_err().to_string();
    assert!(error.contains("the server is busy"), "{error}");
    server.join().unwrap();
}

#[test]
fn server_that_never_answers_is_left_in_time() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let listener = std::thread::spawn({
        let own = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&own, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
        rustix::net::listen(&own, 1).unwrap();
        move || {
            std::thread::sleep(Duration::from_secs(20));
            drop(own);
        }
    });
    let started = Instant::now();
    let error = attach_blocking(&socket, &default()).unwrap_err().to_string();
    assert!(error.ends_with("the server has not answered in 10s"), "{error}");
    assert!((9..18).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    drop(listener);
}

/// Descriptors on their way count against the server's user: a client that takes none of them
/// holds up its own user alone, and no more than a few of them are on their way.
#[tokio::test]
async fn a_client_that_does_not_take_its_descriptors_is_waited_for_by_nobody() {
    let folder = folder();
    let (image, socket, _server) = serving(folder.path()).await;
    let request = [&b"dmaload\0"[..], &1u32.to_le_bytes(), &1u32.to_le_bytes(), b"model"].concat();
    let hoards: Vec<_> = (0..20)
        .map(|_| {
            let client = connected(&socket);
            send(&client, &request, SendFlags::NOSIGNAL).unwrap();
            client
        })
        .collect();
    // Of the same user nobody gets through before they let go; of another one it would.
    let waiting = tokio::time::timeout(Duration::from_millis(300), attach(&socket, default())).await;
    assert!(waiting.is_err(), "four are on their way already");
    drop(hoards);
    assert_same_image(&image, &attach(&socket, default()).await.unwrap().image);
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root can be another user");
    }
    root
}

#[test]
fn client_that_cannot_connect_learns_what_helps() {
    let folder = open_folder();
    let refused = |name: &str| attach_blocking(folder.path().join(name), &default()).unwrap_err().to_string();
    let _server = Server::bind(folder.path().join("own"), ServerOptions::default()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(folder.path().join("dead")).unwrap());
    let _other = std::os::unix::net::UnixListener::bind(folder.path().join("other")).unwrap();
    assert!(refused("missing").contains("ENOENT") && refused("missing").contains("appears with the image"));
    assert!(refused("dead").contains("the server that made this socket has ended"), "{}", refused("dead"));
    assert!(refused("other").contains("the socket of another program"), "{}", refused("other"));
    if is_root() {
        let error = as_user(BOB, || refused("own"));
        assert!(error.contains("EACCES") && error.contains("(ServerOptions::allow_user)"), "{error}");
    }
}

/// Does this as another user: on Linux each thread has its own.
fn as_user<T: Send>(user: u32, task: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let body = || {
            let user = Uid::from_raw(user);
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
            task()
        };
        scope.spawn(body).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A folder that every user can use.
fn open_folder() -> tempfile::TempDir {
    let folder = folder();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    folder
}

/// The role of a process of its own.
struct Role<'a> {
    name: &'a str,
    user: u32,
    /// `Some` for a user namespace of its own, with this map; an empty one maps no user.
    map: Option<&'a str>,
    /// Users to be allowed, or trusted.
    named: &'a [u32],
    variables: Vec<(&'a str, String)>,
}

impl Role<'_> {
    fn start(&self, socket: &Path) -> Child {
        let exe = std::env::current_exe().unwrap();
        let mut command = match self.map {
            Some(_) => {
                let mut command = Command::new("unshare");
                command.args(["--user", "--", "sh", "-c", r#"read go; exec "$@""#, "sh"]).arg(exe);
                command
            }
            None => Command::new(exe),
        };
        let named = self.named.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        command.args(["--ignored", "--exact", self.name, "--nocapture", "--quiet"]).uid(self.user);
        command.env("DMALOAD_TEST_SOCKET", socket).env("DMALOAD_TEST_TRUST", &named).env("DMALOAD_TEST_ALLOW", &named);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        if let Some(map) = self.map {
            let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/user")).unwrap();
            let process = child.id().to_string();
            let deadline = Instant::now() + Duration::from_secs(10);
            while namespace(&process) == namespace("self") {
                assert!(Instant::now() < deadline, "no user namespace");
                std::thread::sleep(Duration::from_millis(1));
            }
            if !map.is_empty() {
                fs::write(format!("/proc/{process}/uid_map"), map).unwrap();
            }
            child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        }
        child
    }

    /// What it has printed in the end: a digest or an error.
    fn outcome(&self, socket: &Path) -> String {
        let output = self.start(socket).wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let outcome = text.lines().rfind(|line| line.starts_with("digest") || line.starts_with("error"));
        outcome.unwrap_or_else(|| panic!("{} as {}: {text:?} {:?}", self.name, self.user, output.status)).to_owned()
    }
}

/// A server in a process of its own, which ends with this.
struct Serving {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Serving {
    fn start(role: &Role<'_>, socket: &Path) -> (Self, String) {
        let mut child = role.start(socket);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines.by_ref().map(|line| line.unwrap()).find(|line| line.starts_with("ready") || line.starts_with("error"));
        (Serving { child, lines }, first.unwrap_or_else(|| panic!("the server as {} has ended", role.user)))
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// How many were served and refused.
    fn end(mut self) -> String {
        drop(self.child.stdin.take());
        let last = self.lines.by_ref().map(|line| line.unwrap()).find(|line| line.starts_with("ended"));
        assert!(self.child.wait().unwrap().success());
        last.unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// A user that no other test has: what is on its way counts for all servers of a user.
fn fresh_user() -> u32 {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    100_000 + 16 * std::process::id() + COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

const ALICE: u32 = 4001;
const BOB: u32 = 4002;
const MALLORY: u32 = 4003;
const STRANGER: u32 = 4004;
const NOBODY: u32 = 65534;
const ALL: &str = "0 0 4294967295";

/// Who is whom is decided by the kernel's word, also in user namespaces, where all users that are
/// not mapped have one number.
#[test]
fn clients_trust_their_own_user_and_those_they_name() {
    if !is_root() {
        return;
    }
    let folder = open_folder();
    let model = file(folder.path(), "model.bin", &random_bytes(5_000_000, 3));
    let expected = format!("digest {}", hex(&Sha256::digest(fs::read(&model).unwrap())));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let image = runtime.block_on(loaded(&[&model]));
    // The server's user, the client's, its map, whom it trusts; and whether it attaches, or which
    // user it names in its error.
    type Case<'a> = (u32, u32, Option<&'a str>, &'a [u32], Result<(), u32>);
    let cases: &[Case<'_>] = &[
        (ALICE, ALICE, None, &[], Ok(())),
        (BOB, ALICE, None, &[], Err(BOB)),
        (BOB, ALICE, None, &[MALLORY], Err(BOB)),
        (BOB, ALICE, None, &[BOB], Ok(())),
        (0, ALICE, None, &[], Ok(())),
        (BOB, 0, None, &[], Err(BOB)),
        (NOBODY, NOBODY, None, &[], Ok(())),
        (NOBODY, ALICE, None, &[], Err(NOBODY)),
        // No user is mapped: it sees itself and all others as nobody.
        (BOB, ALICE, Some(""), &[], Err(NOBODY)),
        (ALICE, ALICE, Some(""), &[], Err(NOBODY)),
        (0, ALICE, Some(""), &[], Err(NOBODY)),
        (BOB, ALICE, Some(""), &[BOB], Err(NOBODY)),
        (BOB, ALICE, Some(""), &[NOBODY], Ok(())),
        // It is nobody by its map, others are because they have none.
        (BOB, ALICE, Some("65534 4001 1"), &[], Err(NOBODY)),
        (BOB, ALICE, Some("65534 4001 1"), &[NOBODY], Ok(())),
        (BOB, ALICE, Some("0 0 4001\n65534 4001 1"), &[], Err(NOBODY)),
        // Some are mapped.
        (ALICE, ALICE, Some("1000 4001 1"), &[], Ok(())),
        (BOB, ALICE, Some("1000 4001 1"), &[], Err(NOBODY)),
        (BOB, ALICE, Some("1000 4001 2"), &[], Err(1001)),
        (BOB, ALICE, Some("1000 4001 2"), &[1001], Ok(())),
        (BOB, ALICE, Some("0 4002 1\n1000 4001 1"), &[], Ok(())),
        // All are: nobody is a user like others, as in many pods.
        (NOBODY, NOBODY, Some(ALL), &[], Ok(())),
        (BOB, NOBODY, Some(ALL), &[], Err(BOB)),
        (ALICE, ALICE, Some(ALL), &[], Ok(())),
    ];
    let mut wrong = Vec::new();
    for (number, &(server, client, map, named, expectation)) in cases.iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let options = ServerOptions::default().allow_user(client);
        let served = as_user(server, || Server::bind(&socket, options)).unwrap();
        served.publish("model", image.clone()).unwrap();
        let role = Role { name: "the_client", user: client, map, named, variables: Vec::new() };
        let outcome = role.outcome(&socket);
        let case = format!("server {server}, client {client}, map {map:?}, trusts {named:?}: {outcome}");
        let as_expected = match expectation {
            Ok(()) => outcome == expected,
            Err(user) => outcome.contains(&format!("AttachOptions::trust_user({user}))")),
        };
        if !as_expected {
            wrong.push(case);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn servers_serve_their_own_user_and_those_they_allow() {
    if !is_root() {
        return;
    }
    let folder = open_folder();
    let model = file(folder.path(), "model.bin", &random_bytes(5_000_000, 3));
    // The server's user, its map, whom it allows, the client's user; and whether it attaches, or
    // as which user it is refused. That somebody is allowed (here user 9) opens the socket for
    // connections.
    type Case<'a> = (u32, Option<&'a str>, &'a [u32], u32, Result<(), u32>);
    let cases: &[Case<'_>] = &[
        (ALICE, None, &[9], ALICE, Ok(())),
        (ALICE, None, &[9], BOB, Err(BOB)),
        (ALICE, None, &[BOB], BOB, Ok(())),
        (ALICE, None, &[BOB], MALLORY, Err(MALLORY)),
        (ALICE, None, &[9], 0, Err(0)),
        (NOBODY, None, &[9], NOBODY, Ok(())),
        (ALICE, Some(""), &[9], BOB, Err(NOBODY)),
        (ALICE, Some(""), &[9], ALICE, Err(NOBODY)),
        (ALICE, Some(""), &[NOBODY], BOB, Ok(())),
        (ALICE, Some("65534 4001 1"), &[9], BOB, Err(NOBODY)),
        (ALICE, Some("65534 4001 1"), &[NOBODY], BOB, Ok(())),
        (ALICE, Some("1000 4001 1"), &[9], ALICE, Ok(())),
        (ALICE, Some("1000 4001 1"), &[9], BOB, Err(NOBODY)),
        (ALICE, Some("1000 4001 2"), &[9], BOB, Err(1001)),
        (ALICE, Some("1000 4001 2"), &[1001], BOB, Ok(())),
        (NOBODY, Some(ALL), &[9], NOBODY, Ok(())),
        (NOBODY, Some(ALL), &[9], BOB, Err(BOB)),
    ];
    let mut wrong = Vec::new();
    for (number, &(server, map, named, client, expectation)) in cases.iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let variables = vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned())];
        let (serving, first) = Serving::start(&Role { name: "the_server", user: server, map, named, variables }, &socket);
        let case = format!("server {server}, map {map:?}, allows {named:?}, client {client}");
        assert!(first.starts_with("ready"), "{case}: {first}");
        let attached = as_user(client, || attach_blocking(&socket, &default().trust_user(server)));
        match (attached, expectation) {
            (Ok(attached), Ok(())) => {
                assert_same(&attached.image.files()[0].bytes().unwrap(), &fs::read(&model).unwrap(), &case);
            }
            (Err(error), Err(user)) if error.to_string().contains(&format!("ServerOptions::allow_user({user}))")) => {}
            (attached, _) => wrong.push(format!("{case}: {:?}", attached.map(|_| "attached"))),
        }
        drop(serving);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn socket_has_its_mode_whatever_the_umask_which_stays() {
    if !is_root() {
        return;
    }
    let folder = open_folder();
    let model = file(folder.path(), "model.bin", &random_bytes(100_000, 3));
    for mask in ["0", "22", "77", "777"] {
        for (named, mode) in [(&[][..], 0o600), (&[BOB], 0o666)] {
            let socket = folder.path().join(format!("socket{mask}{mode}"));
            let variables =
                vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()), ("DMALOAD_TEST_UMASK", mask.to_owned())];
            let role = Role { name: "the_server", user: 0, map: None, named, variables };
            let (serving, first) = Serving::start(&role, &socket);
            assert_eq!(first, format!("ready {mask}"));
            assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, mode, "umask {mask}");
            attach_blocking(&socket, &default()).unwrap();
            drop(serving);
            assert!(!socket.exists());
        }
    }
}

#[test]
fn servers_and_clients_work_without_procfs() {
    if !is_root() {
        return;
    }
    let folder = open_folder();
    let model = file(folder.path(), "model.bin", &random_bytes(100_000, 3));
    let socket = folder.path().join("socket");
    let run = |role: &str, socket: &Path| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", r#"mount -t tmpfs none /proc && exec "$@""#, "sh"]);
        command.arg(std::env::current_exe().unwrap()).args(["--ignored", "--exact", role, "--nocapture", "--quiet"]);
        command.env("DMALOAD_TEST_SOCKET", socket).env("DMALOAD_TEST_MODEL", &model).env("DMALOAD_TEST_ALLOW", "4002");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    };
    for _ in 0..2 {
        let mut server = run("the_server", &socket);
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        assert!(lines.by_ref().any(|line| line.unwrap().starts_with("ready")), "it ended before it served");
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o666);
        let client = run("the_client", &socket).wait_with_output().unwrap();
        assert!(String::from_utf8_lossy(&client.stdout).contains("digest"), "{client:?}");
        // Leaves its socket behind, for the next round to replace.
        server.kill().unwrap();
        server.wait().unwrap();
        assert!(socket.exists());
    }
}

/// The owner of the folder replaces whatever appears in it, as fast as it can, by a link to a
/// file of root's.
#[test]
fn owner_of_the_folder_cannot_redirect_a_server_of_root() {
    if !is_root() {
        return;
    }
    let place = open_folder();
    let (folder, victim) = (place.path().join("thief's"), place.path().join("victim"));
    fs::create_dir(&folder).unwrap();
    std::os::unix::fs::chown(&folder, Some(MALLORY), None).unwrap();
    fs::write(&victim, "secret").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let socket = folder.join("socket");
    let (until, done) = (Instant::now() + Duration::from_secs(3), std::sync::atomic::AtomicBool::new(false));
    let (mut bound, mut refused) = (0, 0);
    let steal = |name: &str| {
        let (link, name) = (folder.join(format!("link for {name}")), folder.join(name));
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            std::os::unix::fs::symlink(&victim, &link).unwrap();
            // In one system call, as soon as there is something.
            while renameat_with(CWD, &link, CWD, &name, RenameFlags::EXCHANGE).is_err() {
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
            }
            std::thread::sleep(Duration::from_micros(300));
            // So that the next server can begin.
            let _ = fs::remove_file(&name);
            let _ = fs::remove_file(&link);
            let _ = fs::rename(&link, folder.join("away"));
        }
    };
    std::thread::scope(|scope| {
        for name in ["socket", ".socket.dmaload"] {
            scope.spawn(move || as_user(MALLORY, || steal(name)));
        }
        while Instant::now() < until {
            match Server::bind(&socket, ServerOptions::default().allow_user(MALLORY)) {
                Ok(_) => bound += 1,
                Err(_) => refused += 1,
            }
            if fs::metadata(&victim).unwrap().permissions().mode() & 0o7777 != 0o600 {
                break;
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    println!("{bound} servers bound, {refused} refused");
    assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o7777, 0o600, "after {bound} servers, {refused} refused");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "secret");
    assert!(bound > 0 && refused > 0, "{bound} servers bound, {refused} refused");
}

#[tokio::test]
async fn server_that_ends_leaves_the_socket_of_the_one_that_replaced_it() {
    let folder = folder();
    let (image, socket, first) = serving(folder.path()).await;
    fs::remove_file(&socket).unwrap();
    let second = Server::bind(&socket, ServerOptions::default()).unwrap();
    second.publish("model", image).unwrap();
    drop(first);
    attach(&socket, default()).await.unwrap();
    drop(second);
    assert!(!socket.exists());
    assert!(fs::read_dir(folder.path()).unwrap().all(|entry| entry.unwrap().file_name() == "model.safetensors"));
}

#[tokio::test]
async fn client_that_comes_before_the_first_image_waits_for_it() {
    let folder = folder();
    let image = loaded(&[&model(folder.path())]).await;
    let socket = folder.path().join("socket");
    let server = Server::bind(&socket, ServerOptions::default()).unwrap();
    let clients: Vec<_> = [default(), default().name("model")]
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
    // Not for ever.
    drop(server);
    let _server = Server::bind(&socket, ServerOptions::default()).unwrap();
    let started = Instant::now();
    let error = attach(&socket, default()).await.unwrap_err();
    assert!(error.to_string().contains("the server has no image yet, after 5s"), "{error}");
    assert!((4..9).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
}

fn good_request() -> Vec<u8> {
    [&b"dmaload\0"[..], &1u32.to_le_bytes(), &1u32.to_le_bytes(), b"model"].concat()
}

/// What hostile clients do with a connection, which they keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hostility {
    Silent,
    HalfClosed,
    Closed,
    NeverReceives,
    AcknowledgesAtOnce,
    AcknowledgesTooMuch,
    AsksTwice,
    SlowReader,
    AllOfThem,
}

const HOSTILITIES: [Hostility; 8] = [
    Hostility::Silent,
    Hostility::HalfClosed,
    Hostility::Closed,
    Hostility::NeverReceives,
    Hostility::AcknowledgesAtOnce,
    Hostility::AcknowledgesTooMuch,
    Hostility::AsksTwice,
    Hostility::SlowReader,
];

impl Hostility {
    fn connect(self, socket: &Path, number: usize) -> Option<OwnedFd> {
        let client = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&client, &SocketAddrUnix::new(socket).unwrap()).ok()?;
        let say = |message: &[u8]| {
            let _ = send(&client, message, SendFlags::NOSIGNAL);
        };
        match self {
            Hostility::AllOfThem => return HOSTILITIES[number % HOSTILITIES.len()].connect(socket, number),
            Hostility::Silent => return Some(client),
            _ => say(&good_request()),
        }
        match self {
            Hostility::HalfClosed => shutdown(&client, Shutdown::Write).unwrap(),
            Hostility::Closed => shutdown(&client, Shutdown::Both).unwrap(),
            Hostility::AcknowledgesAtOnce => say(&[0]),
            Hostility::AcknowledgesTooMuch => (0..20).for_each(|_| say(&[0])),
            Hostility::AsksTwice => say(&good_request()),
            Hostility::SlowReader => {
                let reader = client.try_clone().unwrap();
                std::thread::spawn(move || {
                    while recv(&reader, &mut [0; 64][..], RecvFlags::empty()).is_ok_and(|(bytes, _)| bytes > 0) {
                        std::thread::sleep(Duration::from_millis(300));
                        if send(&reader, &[0], SendFlags::NOSIGNAL).is_err() {
                            return;
                        }
                    }
                });
            }
            Hostility::Silent | Hostility::NeverReceives | Hostility::AllOfThem => {}
        }
        Some(client)
    }
}

/// A server with 128 descriptors, of a user who is not root, and so may have no more than these
/// on their way to clients.
#[test]
fn hostile_clients_stall_no_other_user() {
    if !is_root() {
        return;
    }
    let (folder, alice) = (open_folder(), fresh_user());
    // With the description, 11 descriptors: twelve who hoard them are more than the kernel allows.
    let bytes = random_bytes(10 << 21, 3);
    let model = file(folder.path(), "model.bin", &bytes);
    let mut wrong = Vec::new();
    // Of the server's own user, too.
    for hostile in [MALLORY, STRANGER, alice] {
        for hostility in HOSTILITIES.into_iter().chain([Hostility::AllOfThem]) {
            let socket = folder.path().join(format!("socket{hostile}{hostility:?}"));
            let variables =
                vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()), ("DMALOAD_TEST_NOFILE", "128".to_owned())];
            let role = Role { name: "the_server", user: alice, map: None, named: &[BOB, MALLORY], variables };
            let (serving, first) = Serving::start(&role, &socket);
            assert!(first.starts_with("ready"), "{first}");
            let before = serving.descriptors();
            let mut kept: Vec<OwnedFd> = Vec::new();
            let mut slowest = Duration::ZERO;
            for round in 0..16 {
                let more = as_user(hostile, || {
                    (0..10).filter_map(|number| hostility.connect(&socket, 10 * round + number)).collect::<Vec<_>>()
                });
                kept.extend(more);
                for honest in [BOB, alice].into_iter().filter(|&honest| honest != hostile) {
                    let started = Instant::now();
                    let attached = as_user(honest, || attach_blocking(&socket, &default().trust_user(alice)));
                    slowest = slowest.max(started.elapsed());
                    match attached {
                        Ok(attached) => assert_eq!(attached.image.files()[0].len(), bytes.len() as u64),
                        Err(error) => wrong.push(format!("{hostility:?} of {hostile}: {error}")),
                    }
                }
            }
            println!("{hostility:?} of {hostile}: {} kept, the slowest honest client took {slowest:?}", kept.len());
            if slowest > Duration::from_secs(1) {
                wrong.push(format!("{hostility:?} of {hostile}: the slowest took {slowest:?}"));
            }
            let during = serving.descriptors();
            if during > before + 64 + 16 + 4 {
                wrong.push(format!("{hostility:?} of {hostile}: {during} descriptors, {before} before"));
            }
            // When they have let go, all is as before, and their user is served.
            for client in kept {
                // Those that read slowly have it, too.
                let _ = shutdown(&client, Shutdown::Both);
            }
            let deadline = Instant::now() + Duration::from_secs(10);
            while serving.descriptors() > before {
                assert!(Instant::now() < deadline, "{hostility:?} of {hostile}: {} of {before}", serving.descriptors());
                std::thread::sleep(Duration::from_millis(5));
            }
            if hostile == MALLORY {
                as_user(hostile, || attach_blocking(&socket, &default().trust_user(alice))).unwrap();
            }
            let ended = serving.end();
            let served: u64 = ended.split(' ').nth(1).unwrap().parse().unwrap();
            if served < 16 {
                wrong.push(format!("{hostility:?} of {hostile}: {ended}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Clients of one user have a bounded number of descriptors on their way, to a bounded number of
/// them.
#[test]
fn what_is_on_its_way_to_one_user_is_bounded() {
    if !is_root() {
        return;
    }
    let (folder, alice) = (open_folder(), fresh_user());
    // The descriptors of the image, the users who may attach, and what MALLORY's clients have on
    // their way then: of 128 descriptors, half are shared by all users, and each has four
    // receivers at most.
    for (segments, users, receivers, descriptors) in [(1, 2, 4, 8), (10, 2, 2, 21), (10, 7, 1, 8), (10, 63, 1, 1)] {
        let model = file(folder.path(), "model.bin", &random_bytes(segments << 21, 3));
        let socket = folder.path().join(format!("socket{segments}{users}"));
        let variables =
            vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()), ("DMALOAD_TEST_NOFILE", "128".to_owned())];
        let named: Vec<u32> = [MALLORY, BOB].into_iter().chain(5000..5000 + users - 2).collect();
        let (serving, first) =
            Serving::start(&Role { name: "the_server", user: alice, map: None, named: &named, variables }, &socket);
        assert!(first.starts_with("ready"), "{first}");
        let kept: Vec<_> =
            as_user(MALLORY, || (0..30).filter_map(|number| Hostility::HalfClosed.connect(&socket, number)).collect());
        std::thread::sleep(Duration::from_millis(100));
        as_user(BOB, || attach_blocking(&socket, &default().trust_user(alice))).unwrap();
        let here = |client: &OwnedFd| {
            let mut message = [0; 64];
            let received = recv(client, &mut message[..], RecvFlags::DONTWAIT | RecvFlags::PEEK).map_or(0, |(bytes, _)| bytes);
            (received == 24 && message[12] == 0).then(|| usize::from(message[20]))
        };
        let seen: Vec<usize> = kept.iter().filter_map(here).collect();
        let all: usize = seen.iter().sum();
        assert!(seen.len() <= receivers && all <= descriptors, "{segments} segments, {users} users: {seen:?}");
        assert!(!seen.is_empty());
        drop(serving);
    }
}

#[test]
fn many_hostile_users_stall_no_other() {
    if !is_root() {
        return;
    }
    let (folder, alice) = (open_folder(), fresh_user());
    let bytes = random_bytes(10 << 21, 3);
    let model = file(folder.path(), "model.bin", &bytes);
    let socket = folder.path().join("socket");
    let variables = vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()), ("DMALOAD_TEST_NOFILE", "128".to_owned())];
    // Ten who may attach, and ten who may not.
    let named: Vec<u32> = (5000..5010).chain([BOB]).collect();
    let (_serving, first) =
        Serving::start(&Role { name: "the_server", user: alice, map: None, named: &named, variables }, &socket);
    assert!(first.starts_with("ready"), "{first}");
    let mut kept = Vec::new();
    for user in 5000..5020 {
        kept.extend(as_user(user, || {
            (0..20).filter_map(|number| Hostility::AllOfThem.connect(&socket, number)).collect::<Vec<_>>()
        }));
        let started = Instant::now();
        let attached = as_user(BOB, || attach_blocking(&socket, &default().trust_user(alice)));
        let attached = attached.unwrap_or_else(|error| panic!("after user {user}: {error}"));
        assert!(started.elapsed() < Duration::from_secs(1), "after user {user}: {:?}", started.elapsed());
        assert_same(&attached.image.files()[0].bytes().unwrap(), &bytes, "attached");
    }
}

/// What waits for a client, or lets it wait, ends in time, and the client learns why.
#[test]
fn clients_that_stop_are_let_go_in_time() {
    if !is_root() {
        return;
    }
    let (folder, alice) = (open_folder(), fresh_user());
    let model = file(folder.path(), "model.bin", &random_bytes(10 << 21, 3));
    let socket = folder.path().join("socket");
    let variables = vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()), ("DMALOAD_TEST_NOFILE", "128".to_owned())];
    // Eight descriptors at once for each user, of eleven.
    let named = [BOB, MALLORY, STRANGER, 5000, 5001, 5002, 5003];
    let (_serving, first) =
        Serving::start(&Role { name: "the_server", user: alice, map: None, named: &named, variables }, &socket);
    assert!(first.starts_with("ready"), "{first}");
    let in_time = |started: Instant| (4..9).contains(&started.elapsed().as_secs());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let started = Instant::now();
            let client = as_user(BOB, || connected(&socket));
            assert_eq!(recv(&client, &mut [0; 64][..], RecvFlags::empty()).unwrap().0, 0, "a silent client");
            assert!(in_time(started), "{:?}", started.elapsed());
        });
        scope.spawn(|| {
            // It has all that its user may, and others of its user wait.
            let hoard = as_user(MALLORY, || Hostility::NeverReceives.connect(&socket, 0)).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            let started = Instant::now();
            let error = as_user(MALLORY, || attach_blocking(&socket, &default().trust_user(alice))).unwrap_err();
            assert!(error.to_string().contains("the server is busy"), "{error}");
            assert!(in_time(started), "{:?}", started.elapsed());
            drop(hoard);
            as_user(MALLORY, || attach_blocking(&socket, &default().trust_user(alice))).unwrap();
        });
        scope.spawn(|| {
            // It takes six seconds for the first part, and is given no second one.
            let slow = as_user(STRANGER, || Hostility::NeverReceives.connect(&socket, 0)).unwrap();
            std::thread::sleep(Duration::from_secs(6));
            assert_eq!(recv(&slow, &mut [0; 64][..], RecvFlags::empty()).unwrap().0, 24);
            let _ = send(&slow, &[0], SendFlags::NOSIGNAL);
            assert_eq!(recv(&slow, &mut [0; 64][..], RecvFlags::empty()).unwrap_or_default().0, 0);
        });
    });
}
