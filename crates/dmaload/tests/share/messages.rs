//! Tests for malformed messages from clients, and for malformed or false messages from servers.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use dmaload::share::{attach, attach_blocking};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recv, send, socket_with};

use crate::common::{folder, random_bytes};
use crate::{assert_same_image, connect_to, count_descriptors, default_options, serve_model};

#[tokio::test]
async fn malformed_messages_and_silent_clients_do_no_harm() {
    let folder = folder();
    let (image, socket, _server) = serve_model(folder.path()).await;
    let before = count_descriptors();
    let noise = random_bytes(1 << 16, 7);
    let good = [&b"dmaload\0"[..], &1u32.to_le_bytes(), &1u32.to_le_bytes(), b"model"].concat();
    let mut stuck = Vec::new();
    for number in 0..10_000_usize {
        let client = connect_to(&socket);
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
        let _ = send(&client, &message, SendFlags::NOSIGNAL);
        if number % 40 == 0 {
            // A client that connects and sends nothing.
            stuck.push(connect_to(&socket));
        }
    }
    let started = Instant::now();
    let attached = attach(&socket, default_options()).await.unwrap();
    println!("10,000 malformed messages, {} silent clients; attached in {:?}", stuck.len(), started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(2), "attaching took {:?}", started.elapsed());
    assert_same_image(&image, &attached.image);
    drop((attached, stuck));
    let deadline = Instant::now() + Duration::from_secs(20);
    while count_descriptors() > before {
        assert!(Instant::now() < deadline, "{} descriptors are open, {before} before", count_descriptors());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A lying server sends descriptors of the wrong kind, or descriptions that do not match the
/// descriptors.
#[tokio::test]
async fn lying_server_cannot_cause_out_of_bounds_access() {
    let folder = folder();
    let two_pages = |sealed: bool| {
        let memfd = dmaload::heap::Memfd::create("test", 8192).unwrap();
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
        let memfd = dmaload::heap::Memfd::create("test", text.len()).unwrap();
        rustix::io::pwrite(memfd.as_fd(), text.as_bytes(), 0).unwrap();
        memfd.seal_against_writes().unwrap();
        memfd.as_fd().try_clone_to_owned().unwrap()
    };
    let good = "[[0,0,0,0,8192,0,8192],[0,0,1,0,8192,8192,16384]]";
    let file = || fs::File::open("/proc/self/exe").unwrap().into();
    let huge = || {
        let memfd = dmaload::heap::Memfd::create("test", 300 << 20).unwrap();
        memfd.seal_against_writes().unwrap();
        memfd.as_fd().try_clone_to_owned().unwrap()
    };
    let cases: Vec<(Vec<OwnedFd>, Option<&str>)> = vec![
        (vec![description(&describe(good, 2)), two_pages(true), two_pages(true)], None),
        (vec![description(&describe(good, 2)), two_pages(true), two_pages(false)], Some("an allocation is not a sealed memfd")),
        (vec![description(&describe(good, 2)), two_pages(true), file()], Some("an allocation is not a sealed memfd")),
        (vec![description(&describe(good, 2)), two_pages(true)], Some("allocations received: 1, but")),
        (vec![description("[]")], Some("invalid description")),
        (vec![description("{")], Some("not JSON")),
        (vec![two_pages(false)], Some("the image's description")),
        (vec![file()], Some("the image's description")),
        (
            vec![description(&describe(good, 2).replace("buffered", "unheard of")), two_pages(true), two_pages(true)],
            Some("unknown route"),
        ),
        (
            vec![
                description(&describe(good, 2).replace("\"dma_bufs\":false", "\"dma_bufs\":true")),
                two_pages(true),
                two_pages(true),
            ],
            Some("an allocation is not a dma-buf"),
        ),
        (vec![huge()], Some("the image's description is 314572800 bytes long")),
        // A segment that is larger than its memory, and one that would leave a gap in the loaded
        // range, because it does not use the end of its memory.
        (vec![description(&describe("[[0,0,0,0,12288,0,12288]]", 1)), two_pages(true)], Some("don't fit their memory")),
        (
            vec![
                description(&describe("[[0,0,0,0,4096,0,4096],[0,0,1,0,8192,4096,12288]]", 2)),
                two_pages(true),
                two_pages(true),
            ],
            Some("don't fit their memory"),
        ),
    ];
    for (number, (descriptors, expected)) in cases.into_iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let count = u32::try_from(descriptors.len()).unwrap();
        let answer = start_lying_server(&socket, vec![(reply(1, 0, count, count), descriptors)]);
        let seen = attach(&socket, default_options()).await;
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

/// A message and its descriptors.
type Message = (Vec<u8>, Vec<OwnedFd>);

/// Starts a server that sends these messages to its only client: the first message after the
/// request, and each further message after the client has confirmed the previous one.
fn start_lying_server(socket: &Path, messages: Vec<Message>) -> std::thread::JoinHandle<()> {
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
fn messages_of_a_lying_server_are_refused() {
    let folder = folder();
    let null_files = |count: usize| (0..count).map(|_| fs::File::open("/dev/null").unwrap().into()).collect::<Vec<OwnedFd>>();
    let (other, lost, closed) =
        ("another version of the protocol, or is not dmaload", "descriptors were lost", "closed the connection");
    let names = [&reply(1, 4, 2, 0)[..], b"\x1b]0;title\x07\0\xff\0"].concat();
    let cases: Vec<(Vec<Message>, &str)> = vec![
        (vec![(reply(2, 0, 1, 1), null_files(1))], other),
        (vec![(reply(1, 99, 1, 1), null_files(1))], other),
        (vec![(b"hello".to_vec(), null_files(1))], other),
        (vec![([&reply(1, 0, 1, 1)[..], b"x"].concat(), null_files(1))], other),
        (vec![(reply(1, 0, 1, 2), null_files(2))], other),
        (vec![(reply(1, 0, 1 << 20, 1), null_files(1))], other),
        (vec![(reply(1, 0, 3, 3), null_files(2))], lost),
        (vec![(reply(1, 0, 3, 1), null_files(2))], lost),
        (vec![(reply(1, 0, 1, 0), null_files(0))], lost),
        (vec![(reply(1, 0, 3, 2), null_files(2)), (reply(1, 0, 3, 2), null_files(2))], lost),
        (vec![(reply(1, 0, 3, 2), null_files(2))], closed),
        (vec![], closed),
        (vec![(reply(1, 1, 0, 0), null_files(0))], "does not understand the request"),
        (vec![(reply(1, 2, 0, 0), null_files(0))], "no longer shares any image"),
        (vec![(reply(1, 3, 1234, 0), null_files(0))], "(ServerOptions::allow_user(1234))"),
        (vec![(reply(1, 6, 0, 0), null_files(0))], "the server is busy"),
        (vec![(names, null_files(0))], r#"choose one of "\u{1b}]0;title\u{7}", "\u{fffd}""#),
    ];
    for (number, (messages, expected)) in cases.into_iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let server = start_lying_server(&socket, messages);
        let error = attach_blocking(&socket, &default_options()).unwrap_err().to_string();
        server.join().unwrap();
        let expected = expected.replace("\\u{fffd}", "\u{fffd}");
        assert!(error.contains(&expected), "case {number}: {error}");
    }
}

/// If a server closes the connection without having read the request, the kernel resets the
/// connection. The client still receives any answer that the server sent before that.
#[test]
fn answer_of_a_server_that_does_not_read_is_received() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let server = std::thread::spawn(move || {
        let client = rustix::net::accept(&listener).unwrap();
        // Wait for the request without consuming it.
        recv(&client, &mut [0; 1][..], RecvFlags::PEEK).unwrap();
        send(&client, &reply(1, 6, 0, 0), SendFlags::empty()).unwrap();
    });
    let error = attach_blocking(&socket, &default_options()).unwrap_err().to_string();
    assert!(error.contains("the server is busy"), "{error}");
    server.join().unwrap();
}

#[test]
fn client_gives_up_on_a_silent_server_in_time() {
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
    let error = attach_blocking(&socket, &default_options()).unwrap_err().to_string();
    assert!(error.ends_with("the server did not answer within 10s"), "{error}");
    assert!((9..18).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    drop(listener);
}
