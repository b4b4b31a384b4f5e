//! One process loads, others have the same memory: by a Unix socket that hands out descriptors,
//! without a copy.
//!
//! ```text
//!   Loader ── Image ──► Server::publish ──┐                    ┌──► client: Image, mapped read-only
//!                                         socket ── SCM_RIGHTS ┤
//!                                                              └──► client: …
//! ```
//!
//! What is shared is the memory files of the image's segments, sealed: nobody can write to them
//! any more, so the bytes stay what they are, here and there. A client maps them and has an
//! [`Image`](crate::Image) like the server's, with its tensors. The memory lives as long as any
//! process has it: longer than the server.
//!
//! Sharing **dma-bufs** gives whoever has them the right to write, so it must be asked for
//! ([`ServerOptions::dma_bufs`]).
//!
//! The kernel is asked who the other side is (`SO_PEERCRED`): clients must be of the server's own
//! user or one that it allows, servers of the client's own user, root's, or one that it trusts.
//! In a user namespace, the overflow id stands for all users that are not mapped, and is trusted
//! only where it is named. What clients send is one message of at most [`REQUEST_LIMIT_BYTES`]; a
//! client that sends anything else, or nothing for [`PATIENCE`], is let go. One thread serves all
//! of them, and never waits for one; what clients of a user hold concerns no other user.
//!
//! It touches Unix sockets and the descriptors of finished images, and neither the engine's
//! threads nor model files. Requires segments with descriptors, which anonymous memory has none
//! of, and procfs (see `listener`). A server ends with its [`Server`]: the socket goes, then its
//! thread; clients that have attached keep their memory.
//!
//! The protocol (version 1, `SOCK_SEQPACKET`): the client sends `dmaload\0`, the version and what
//! it wants (`u32` each, little-endian), and the name of an image (empty for the only one). The
//! server answers `dmaload\0`, the version, a status, the number of all descriptors and of those
//! in this message; then messages of the same form until all have come, each when the client has
//! said by one byte that it has the one before. The first descriptor is a sealed memory file that
//! describes the image in JSON, the others are its memories in order. A refusal has no
//! descriptors; the names of the server's images follow where they help, each with a zero byte
//! behind it.

mod client;
mod clients;
mod connection;
mod description;
mod limits;
mod listener;
mod peer;
mod protocol;
mod published;
mod queue;
mod server;

use std::time::Duration;

pub use client::{AttachOptions, Attached, attach, attach_blocking};
pub use published::ServerOptions;
pub use server::Server;

/// The longest request, in bytes.
pub const REQUEST_LIMIT_BYTES: usize = 512;

/// How long a server waits for a client's request, or for it to take its descriptors; and how
/// long it lets a client wait that came before the first image, or whose user's other clients are
/// being served.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How long a client may take to receive an image.
pub const TRANSFER_LIMIT: Duration = Duration::from_secs(60);
