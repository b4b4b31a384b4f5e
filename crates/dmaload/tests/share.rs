//! One process loads, others have the same memory. Clients here are in this process and, where it matters, in others.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
#![allow(clippy::print_stdout, reason = "what was measured is told")]

mod common;

use std::fs;
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
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with};
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
    assert!(refused(default()).contains("no image, or several"));
    server.publish("a", image.clone()).unwrap();
    server.publish("b", image.clone()).unwrap();
    assert_eq!(server.names(), ["a", "b"]);
    assert!(refused(default()).contains("no image, or several"));
    assert!(refused(default().name("c")).contains("no image \"c\""));
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
    let error = attach(folder.path().join("nobody"), default()).await.unwrap_err();
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
    let image = attach_blocking(socket, &AttachOptions::default()).unwrap().image;
    let mut digest = Sha256::new();
    image.segments().iter().for_each(|segment| digest.update(segment.bytes().unwrap()));
    println!("digest {}", hex(&digest.finalize()));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn shared_memory_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Shmem:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
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
    server.publish("model", image).unwrap();
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
    }
    let taken = (most - before) >> 20;
    println!("ten processes attached to {mib} MiB: {taken} MiB of shared memory in all");
    assert!(most - before < ((mib as u64) << 20) + (32 << 20), "{taken} MiB");
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
    let cases: Vec<(Vec<OwnedFd>, Option<&str>)> = vec![
        (vec![description(&describe(good, 2)), page(true), page(true)], None),
        (vec![description(&describe(good, 2)), page(true), page(false)], Some("a memory is not what it should be")),
        (vec![description(&describe(good, 2)), page(true), file()], Some("a memory is not what it should be")),
        (vec![description(&describe(good, 2)), page(true)], Some("1 memories came")),
        (vec![description("[]")], Some("its description is wrong")),
        (vec![description("{")], Some("no JSON")),
        (vec![page(false)], Some("its description")),
        (vec![file()], Some("its description")),
        // Larger than its memory, and with a gap between two segments of one span.
        (vec![description(&describe("[[0,0,0,0,12288,0,12288]]", 1)), page(true)], Some("do not fit their memory")),
        (
            vec![description(&describe("[[0,0,0,0,4096,0,4096],[0,0,1,0,8192,4096,12288]]", 2)), page(true), page(true)],
            Some("do not fit their memory"),
        ),
    ];
    for (number, (descriptors, expected)) in cases.into_iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let count = u32::try_from(descriptors.len()).unwrap();
        let answer = std::thread::spawn(move || {
            let client = rustix::net::accept(&listener).unwrap();
            rustix::net::recv(&client, &mut [0; 512][..], rustix::net::RecvFlags::empty()).unwrap();
            let reply = [&b"dmaload\0"[..], &1u32.to_le_bytes(), &0u32.to_le_bytes(), &count.to_le_bytes(), &count.to_le_bytes()]
                .concat();
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&borrowed)));
            rustix::net::sendmsg(&client, &[std::io::IoSlice::new(&reply)], &mut control, SendFlags::empty()).unwrap();
        });
        let seen = attach(&socket, default()).await;
        answer.join().unwrap();
        match (seen, expected) {
            (Ok(attached), None) => assert_eq!(attached.image.files()[0].bytes().unwrap().len(), 16384),
            (Err(error), Some(expected)) => assert!(error.to_string().contains(expected), "case {number}: {error}"),
            (seen, _) => panic!("case {number}: {seen:?}"),
        }
    }
}

/// Descriptors on their way count against the server's user: a client that takes none of them holds up its own user alone, and no more
/// than a few of them are on their way.
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
