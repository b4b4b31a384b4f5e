//! Tests for hostile clients, which try to make the server and other clients wait.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use dmaload::share::attach_blocking;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send, shutdown,
    socket_with,
};

use crate::common::{assert_same, file, random_bytes};
use crate::roles::{BOB, MALLORY, Role, STRANGER, Serving, as_user, fresh_user, is_root, open_folder};
use crate::{connect_to, default_options};

fn good_request() -> Vec<u8> {
    [&b"dmaload\0"[..], &1u32.to_le_bytes(), &1u32.to_le_bytes(), b"model"].concat()
}

/// What a hostile client does with its connection, which it keeps open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hostility {
    Silent,
    HalfClosed,
    Closed,
    NeverReceives,
    AcknowledgesAtOnce,
    AcknowledgesTooMuch,
    RequestsTwice,
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
    Hostility::RequestsTwice,
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
            Hostility::RequestsTwice => say(&good_request()),
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

/// A user other than root can have as many descriptors in flight as the sending process may open.
/// The server does not run as root and may open 128 descriptors, so at most 128 can be in flight
/// to all of its clients together.
#[test]
fn hostile_clients_do_not_stall_other_users() {
    if !is_root() {
        return;
    }
    let (folder, alice) = (open_folder(), fresh_user());
    // A client receives eleven descriptors: ten for the image's memory and one for its
    // description. Twelve clients that hoard them would exceed the kernel's limit.
    let bytes = random_bytes(10 << 21, 3);
    let model = file(folder.path(), "model.bin", &bytes);
    let mut wrong = Vec::new();
    // The last hostile user is the one that runs the server.
    for hostile in [MALLORY, STRANGER, alice] {
        for hostility in HOSTILITIES.into_iter().chain([Hostility::AllOfThem]) {
            let socket = folder.path().join(format!("socket{hostile}{hostility:?}"));
            let rounds = 16;
            let variables = vec![
                ("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()),
                ("DMALOAD_TEST_NOFILE", "128".to_owned()),
                ("DMALOAD_TEST_SERVED", rounds.to_string()),
            ];
            let role = Role { name: "the_server", user: alice, map: None, named: &[BOB, MALLORY], variables };
            let (serving, first) = Serving::start(&role, &socket);
            assert!(first.starts_with("ready"), "{first}");
            let before = serving.descriptors();
            let mut kept: Vec<OwnedFd> = Vec::new();
            let mut slowest = Duration::ZERO;
            for round in 0..rounds {
                let more = as_user(hostile, || {
                    (0..10).filter_map(|number| hostility.connect(&socket, 10 * round + number)).collect::<Vec<_>>()
                });
                kept.extend(more);
                for honest in [BOB, alice].into_iter().filter(|&honest| honest != hostile) {
                    let started = Instant::now();
                    let attached = as_user(honest, || attach_blocking(&socket, &default_options().trust_user(alice)));
                    slowest = slowest.max(started.elapsed());
                    match attached {
                        Ok(attached) => assert_eq!(attached.image.files()[0].len(), bytes.len() as u64),
                        Err(error) => wrong.push(format!("{hostility:?} by user {hostile}: {error}")),
                    }
                }
            }
            println!(
                "{hostility:?} by user {hostile}: {} connections kept, the slowest honest client took {slowest:?}",
                kept.len()
            );
            if slowest > Duration::from_secs(1) {
                wrong.push(format!("{hostility:?} by user {hostile}: the slowest honest client took {slowest:?}"));
            }
            let during = serving.descriptors();
            // A server that may open 128 descriptors accepts at most 64 connections (a half) from
            // users who may attach, and 16 more (an eighth) from users who may not. The test
            // tolerates four more descriptors.
            if during > before + 64 + 16 + 4 {
                wrong.push(format!("{hostility:?} by user {hostile}: {during} descriptors, {before} before"));
            }
            // Once the hostile clients have closed their connections, the server closes all of its
            // descriptors for them, and serves their user if that user may attach.
            for client in kept {
                // If this client is a slow reader, its thread holds a clone of the connection, so
                // dropping `client` would not close it.
                let _ = shutdown(&client, Shutdown::Both);
            }
            let deadline = Instant::now() + Duration::from_secs(10);
            while serving.descriptors() > before {
                assert!(
                    Instant::now() < deadline,
                    "{hostility:?} by user {hostile}: {} descriptors, {before} before",
                    serving.descriptors()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
            if hostile == MALLORY {
                as_user(hostile, || attach_blocking(&socket, &default_options().trust_user(alice))).unwrap();
            }
            let ended = serving.end();
            let served: usize = ended.split(' ').nth(1).unwrap().parse().unwrap();
            if served < rounds {
                wrong.push(format!("{hostility:?} by user {hostile}: {ended}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The server limits how many descriptors are in flight to each user. It also limits the user's
/// receivers, which are the clients that these descriptors were sent to.
#[test]
fn descriptors_in_flight_to_one_user_are_bounded() {
    if !is_root() {
        return;
    }
    let (folder, alice) = (open_folder(), fresh_user());
    // Each case has the number of segments, the number of users who may attach, and MALLORY's
    // limits on receivers and on descriptors in flight. The allowed users and the server's own
    // user share 64 descriptors in flight (half of 128) and 16 receivers (an eighth). No user has
    // more than four receivers.
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
        as_user(BOB, || attach_blocking(&socket, &default_options().trust_user(alice))).unwrap();
        let descriptors_sent = |client: &OwnedFd| {
            let mut message = [0; 64];
            let received = recv(client, &mut message[..], RecvFlags::DONTWAIT | RecvFlags::PEEK).map_or(0, |(bytes, _)| bytes);
            (received == 24 && message[12] == 0).then(|| usize::from(message[20]))
        };
        let seen: Vec<usize> = kept.iter().filter_map(descriptors_sent).collect();
        let all: usize = seen.iter().sum();
        assert!(seen.len() <= receivers && all <= descriptors, "segments: {segments}, users: {users}: {seen:?}");
        assert!(!seen.is_empty());
        drop(serving);
    }
}

#[test]
fn many_hostile_users_do_not_stall_others() {
    if !is_root() {
        return;
    }
    let (folder, alice) = (open_folder(), fresh_user());
    let bytes = random_bytes(10 << 21, 3);
    let model = file(folder.path(), "model.bin", &bytes);
    let socket = folder.path().join("socket");
    let variables = vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()), ("DMALOAD_TEST_NOFILE", "128".to_owned())];
    // Users 5000 to 5009 may attach; users 5010 to 5019 may not.
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
        let attached = as_user(BOB, || attach_blocking(&socket, &default_options().trust_user(alice)));
        let attached = attached.unwrap_or_else(|error| panic!("after user {user}: {error}"));
        assert!(started.elapsed() < Duration::from_secs(1), "after user {user}: {:?}", started.elapsed());
        assert_same(&attached.image.files()[0].bytes().unwrap(), &bytes, "attached");
    }
}

/// If a client stops responding, the server disconnects it after about five seconds. A client that
/// the server cannot serve for that long gets an error.
#[test]
fn clients_that_stop_responding_are_disconnected_in_time() {
    if !is_root() {
        return;
    }
    let (folder, alice) = (open_folder(), fresh_user());
    let model = file(folder.path(), "model.bin", &random_bytes(10 << 21, 3));
    let socket = folder.path().join("socket");
    let variables = vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()), ("DMALOAD_TEST_NOFILE", "128".to_owned())];
    // Seven users and the server's own user share 64 descriptors in flight, so each can have eight
    // of the image's eleven.
    let named = [BOB, MALLORY, STRANGER, 5000, 5001, 5002, 5003];
    let (_serving, first) =
        Serving::start(&Role { name: "the_server", user: alice, map: None, named: &named, variables }, &socket);
    assert!(first.starts_with("ready"), "{first}");
    let in_time = |started: Instant| (4..9).contains(&started.elapsed().as_secs());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let started = Instant::now();
            let client = as_user(BOB, || connect_to(&socket));
            assert_eq!(recv(&client, &mut [0; 64][..], RecvFlags::empty()).unwrap().0, 0, "a silent client must be disconnected");
            assert!(in_time(started), "{:?}", started.elapsed());
        });
        scope.spawn(|| {
            // This client holds all the descriptors that its user may have in flight, so other
            // clients of that user wait.
            let hoard = as_user(MALLORY, || Hostility::NeverReceives.connect(&socket, 0)).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            let started = Instant::now();
            let error = as_user(MALLORY, || attach_blocking(&socket, &default_options().trust_user(alice))).unwrap_err();
            assert!(error.to_string().contains("the server is busy"), "{error}");
            assert!(in_time(started), "{:?}", started.elapsed());
            drop(hoard);
            as_user(MALLORY, || attach_blocking(&socket, &default_options().trust_user(alice))).unwrap();
        });
        scope.spawn(|| {
            // This client receives its first message only after six seconds, and never gets a
            // second one.
            let slow = as_user(STRANGER, || Hostility::NeverReceives.connect(&socket, 0)).unwrap();
            std::thread::sleep(Duration::from_secs(6));
            assert_eq!(recv(&slow, &mut [0; 64][..], RecvFlags::empty()).unwrap().0, 24);
            let _ = send(&slow, &[0], SendFlags::NOSIGNAL);
            assert_eq!(recv(&slow, &mut [0; 64][..], RecvFlags::empty()).unwrap_or_default().0, 0);
        });
    });
}
