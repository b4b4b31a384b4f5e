//! The messages, as bytes.

use super::REQUEST_LIMIT_BYTES;

const MAGIC: [u8; 8] = *b"dmaload\0";
pub(super) const VERSION: u32 = 1;
/// A client wants an image.
const ATTACH: u32 = 1;
/// So many descriptors fit into a message; the kernel takes 253 (`SCM_MAX_FD`).
pub(super) const DESCRIPTORS_IN_A_MESSAGE: usize = 64;
/// More than any image has: as many segments of 2 MiB as make 128 GiB.
pub(super) const DESCRIPTORS_LIMIT: usize = 1 << 16;
pub(super) const REPLY_BYTES: usize = 24;

/// What a server answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    /// The request is of another version, or none.
    Malformed,
    /// It has no image of that name, or several and none was named.
    NoSuchImage,
    /// The client's user may not.
    NotAllowed,
}

impl Status {
    const ALL: [Status; 4] = [Status::Ok, Status::Malformed, Status::NoSuchImage, Status::NotAllowed];
}

/// A client's request for an image.
pub(super) fn request(name: &str) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &ATTACH.to_le_bytes(), name.as_bytes()].concat()
}

/// The name that a request asks for; `None` for anything but a request.
pub(super) fn parse_request(message: &[u8]) -> Option<&str> {
    let rest = message.strip_prefix(&MAGIC).filter(|_| message.len() <= REQUEST_LIMIT_BYTES)?;
    let (version, rest) = rest.split_first_chunk::<4>()?;
    let (kind, name) = rest.split_first_chunk::<4>()?;
    if (u32::from_le_bytes(*version), u32::from_le_bytes(*kind)) != (VERSION, ATTACH) {
        return None;
    }
    str::from_utf8(name).ok()
}

/// A part of a server's answer: how many descriptors there are in all, and in this message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: Status,
    pub(super) all: u32,
    pub(super) here: u32,
}

impl Reply {
    pub(super) fn to_bytes(self) -> [u8; REPLY_BYTES] {
        let status =
            (0..).zip(Status::ALL).find_map(|(number, status)| (status == self.status).then_some(number)).unwrap_or(u32::MAX);
        let mut bytes = [0; REPLY_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        for (field, number) in bytes[8..].chunks_exact_mut(4).zip([VERSION, status, self.all, self.here]) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        let rest = message.strip_prefix(&MAGIC).filter(|_| message.len() == REPLY_BYTES)?;
        let mut numbers = rest.as_chunks::<4>().0.iter().map(|field| u32::from_le_bytes(*field));
        let (version, status, all, here) = (numbers.next()?, numbers.next()?, numbers.next()?, numbers.next()?);
        let status = *Status::ALL.get(status as usize)?;
        (version == VERSION && here <= all && all as usize <= DESCRIPTORS_LIMIT).then_some(Reply { status, all, here })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_and_nothing_else(name in "\\PC{0,40}", all in 0u32..1000, here in 0u32..1000, noise: Vec<u8>) {
            let asked = request(&name);
            prop_assert_eq!(parse_request(&asked), Some(name.as_str()));
            for status in Status::ALL {
                let reply = Reply { status, all: all.max(here), here };
                prop_assert_eq!(Reply::parse(&reply.to_bytes()), Some(reply));
            }
            prop_assert_eq!(parse_request(&noise), None);
            prop_assert_eq!(Reply::parse(&noise), None);
        }

        #[test]
        fn a_damaged_message_is_refused_or_another_one(at in 0usize..64, byte: u8, cut in 0usize..64) {
            let mut message = request("name");
            let len = message.len();
            message[at % len] = byte;
            let _ = parse_request(&message[..cut.min(len)]);
            let mut reply = Reply { status: Status::Ok, all: 3, here: 3 }.to_bytes();
            reply[at % REPLY_BYTES] = byte;
            if let Some(reply) = Reply::parse(&reply) {
                prop_assert!(reply.here <= reply.all);
            }
        }
    }

    #[test]
    fn a_long_request_is_none() {
        assert_eq!(parse_request(&request(&"n".repeat(REQUEST_LIMIT_BYTES))), None);
    }
}
