//! Encodes and decodes the protocol's messages.

use super::REQUEST_LIMIT_BYTES;

const MAGIC: [u8; 8] = *b"dmaload\0";
pub(super) const VERSION: u32 = 1;
/// The operation that requests an image.
const ATTACH: u32 = 1;
/// Maximum number of descriptors in a message. The kernel allows 253 (`SCM_MAX_FD`), but all of
/// them count against the server's user until the client has received them.
pub(super) const DESCRIPTORS_IN_A_MESSAGE: usize = 64;
/// Maximum number of descriptors for an image: enough for about 128 GiB in segments of 2 MiB.
pub(super) const DESCRIPTORS_LIMIT: usize = 1 << 16;
pub(super) const REPLY_BYTES: usize = 24;
/// Maximum length in bytes of the names that follow a refusal.
pub(super) const NAMES_LIMIT_BYTES: usize = 1024;

/// The status in a server's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    /// The message is not a request, or it is a request in another version of the protocol.
    Malformed,
    /// The server has no image with that name, or no longer has any image. `all` is the number of
    /// its images. Their names follow, as many as fit.
    NoSuchImage,
    /// The client's user may not attach; `all` is the user's id as the server sees it.
    NotAllowed,
    /// The server has several images, and the client did not name one. The names follow, as with
    /// `NoSuchImage`.
    Several,
    /// The server has not published an image yet.
    NotYet,
    /// The client's user has reached its limits, or the server needed the connection for another
    /// client.
    Busy,
}

impl Status {
    const ALL: [Status; 7] =
        [Status::Ok, Status::Malformed, Status::NoSuchImage, Status::NotAllowed, Status::Several, Status::NotYet, Status::Busy];
}

/// Encodes a client's request for an image.
pub(super) fn encode_request(name: &str) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &ATTACH.to_le_bytes(), name.as_bytes()].concat()
}

/// Returns the requested name; `None` if the message is not a valid request.
pub(super) fn parse_request(message: &[u8]) -> Option<&str> {
    let rest = message.strip_prefix(&MAGIC).filter(|_| message.len() <= REQUEST_LIMIT_BYTES)?;
    let (version, rest) = rest.split_first_chunk::<4>()?;
    let (kind, name) = rest.split_first_chunk::<4>()?;
    if (u32::from_le_bytes(*version), u32::from_le_bytes(*kind)) != (VERSION, ATTACH) {
        return None;
    }
    str::from_utf8(name).ok()
}

/// Encodes a refusal, followed by as many names as fit.
pub(super) fn encode_with_names<'a>(reply: Reply, names: impl IntoIterator<Item = &'a str>) -> Vec<u8> {
    let mut message = reply.to_bytes().to_vec();
    for name in names {
        if message.len() + name.len() + 1 > REPLY_BYTES + NAMES_LIMIT_BYTES {
            break;
        }
        message.extend_from_slice(name.as_bytes());
        message.push(0);
    }
    message
}

/// Parses the names that follow a refusal. They are untrusted: escape them for display.
pub(super) fn parse_names(message: &[u8]) -> Vec<String> {
    let list = message.get(REPLY_BYTES..).unwrap_or_default();
    let names = list.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8_lossy(name).into_owned()).collect()
}

/// The fixed part of a server's answer: the status, and the number of descriptors in total (`all`)
/// and in this message (`here`). In a refusal, [`Status`] says what `all` means, and `here` is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: Status,
    pub(super) all: u32,
    pub(super) here: u32,
}

impl Reply {
    pub(super) fn to_bytes(self) -> [u8; REPLY_BYTES] {
        let status = (0..)
            .zip(Status::ALL)
            .find_map(|(number, status)| (status == self.status).then_some(number))
            .expect("`Status::ALL` should contain every status");
        let mut bytes = [0; REPLY_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        for (field, number) in bytes[8..].chunks_exact_mut(4).zip([VERSION, status, self.all, self.here]) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        let (fields, names) = message.strip_prefix(&MAGIC)?.split_at_checked(REPLY_BYTES - MAGIC.len())?;
        let mut numbers = fields.as_chunks::<4>().0.iter().map(|field| u32::from_le_bytes(*field));
        let (version, status, all, here) = (numbers.next()?, numbers.next()?, numbers.next()?, numbers.next()?);
        let status = *Status::ALL.get(status as usize)?;
        let is_valid = match status {
            Status::Ok => names.is_empty() && here <= all && all as usize <= DESCRIPTORS_LIMIT,
            _ => names.len() <= NAMES_LIMIT_BYTES && here == 0,
        };
        (version == VERSION && is_valid).then_some(Reply { status, all, here })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn messages_round_trip_and_noise_is_refused(name in "\\PC{0,40}", all in 0u32..1000, here in 0u32..1000, noise: Vec<u8>) {
            let request = encode_request(&name);
            prop_assert_eq!(parse_request(&request), Some(name.as_str()));
            for status in Status::ALL {
                let here = if status == Status::Ok { here } else { 0 };
                let reply = Reply { status, all: all.max(here), here };
                prop_assert_eq!(Reply::parse(&reply.to_bytes()), Some(reply));
                let long = [&reply.to_bytes()[..], name.as_bytes(), b"\0"].concat();
                let expected = (status != Status::Ok).then_some(reply);
                prop_assert_eq!(Reply::parse(&long), expected);
            }
            prop_assert_eq!(parse_request(&noise), None);
            prop_assert_eq!(Reply::parse(&noise), None);
        }

        #[test]
        fn damaged_message_is_refused_or_consistent(at in 0usize..64, byte: u8, cut in 0usize..64) {
            let mut message = encode_request("name");
            let len = message.len();
            message[at % len] = byte;
            let _ = parse_request(&message[..cut.min(len)]);
            let mut reply = Reply { status: Status::Ok, all: 3, here: 3 }.to_bytes();
            reply[at % REPLY_BYTES] = byte;
            if let Some(reply) = Reply::parse(&reply) {
                prop_assert!(reply.here <= reply.all || reply.status != Status::Ok);
            }
        }

        #[test]
        fn names_after_a_refusal_are_parsed(names in proptest::collection::vec("[^\0]{1,40}", 0..50)) {
            let reply = Reply { status: Status::Several, all: 50, here: 0 };
            let message = encode_with_names(reply, names.iter().map(String::as_str));
            prop_assert_eq!(Reply::parse(&message), Some(reply));
            let read = parse_names(&message);
            prop_assert_eq!(&read[..], &names[..read.len()]);
            prop_assert!(read.len() == names.len() || message.len() > NAMES_LIMIT_BYTES - 200);
        }
    }

    #[test]
    fn each_field_of_a_reply_is_checked() {
        let good = Reply { status: Status::Ok, all: 3, here: 2 };
        assert_eq!(Reply::parse(&good.to_bytes()), Some(good));
        for (at, number, what) in [
            (8, 2, "another version"),
            (12, 7, "an unknown status"),
            (16, 1, "more descriptors in this message than in total"),
            (20, 4, "more descriptors in this message than in total"),
            (16, 1 + (1 << 16), "too many descriptors"),
        ] {
            let mut bytes = good.to_bytes();
            bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(number));
            assert_eq!(Reply::parse(&bytes), None, "{what}");
        }
        let mut other = good.to_bytes();
        other[0] = b'D';
        assert_eq!(Reply::parse(&other), None, "other magic bytes");
        assert_eq!(Reply::parse(&good.to_bytes()[..23]), None, "cut off");
        assert_eq!(Reply::parse(&[&good.to_bytes()[..], b"x"].concat()), None, "too long");
        let refusal = Reply { status: Status::NoSuchImage, all: 1, here: 0 };
        assert_eq!(Reply::parse(&[&refusal.to_bytes()[..], &[b'n'; 1025]].concat()), None, "too many names");
        assert_eq!(Reply::parse(&Reply { here: 1, ..refusal }.to_bytes()), None, "a refusal with descriptors");
    }

    #[test]
    fn each_field_of_a_request_is_checked() {
        let good = encode_request("name");
        assert_eq!(parse_request(&good), Some("name"));
        for at in 0..16 {
            let mut damaged = good.clone();
            damaged[at] ^= 1;
            assert_eq!(parse_request(&damaged), None, "byte {at}");
            assert_eq!(parse_request(&good[..at]), None, "{at} bytes");
        }
        assert_eq!(parse_request(&encode_request("")), Some(""));
        assert_eq!(parse_request(&[&good[..], &[0xff]].concat()), None, "a name that is not UTF-8");
    }

    #[test]
    fn overlong_request_is_refused() {
        assert_eq!(parse_request(&encode_request(&"n".repeat(REQUEST_LIMIT_BYTES))), None);
    }
}
