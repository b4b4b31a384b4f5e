//! Shares a loaded image with other processes without a copy, by passing descriptors over a Unix
//! socket.
//!
//! ```text
//!   Loader ── Image ──► Server::publish ──┐                   ┌─► client: Image, mapped read-only
//!                                         socket ─ SCM_RIGHTS ┤
//!                                                             └─► client: …
//! ```
//!
//! ```no_run
//! use dmaload::share::{AttachOptions, Server, ServerOptions, attach};
//!
//! # async fn example() -> dmaload::Result<()> {
//! // One process loads the model and shares it until the server is dropped.
//! let image = dmaload::Loader::new()?.load("model.safetensors").await?;
//! let server = Server::bind("/run/model.sock", ServerOptions::default())?;
//! server.publish("model", image)?;
//!
//! // Other processes map the same memory.
//! let attached = attach("/run/model.sock", AttachOptions::default()).await?;
//! println!("{} bytes", attached.image.tensor("lm_head.weight")?.bytes()?.len());
//! # Ok(())
//! # }
//! ```
//!
//! A server shares the memfds of the image's segments, sealed against writes, so the bytes stay
//! the same for all processes. A client maps them and gets an [`Image`](crate::Image) with the
//! same files, segments and tensors, but without the metadata in the files' headers. The memory
//! lives as long as any process uses it, even after the server has exited.
//!
//! Sharing **dma-bufs** lets every recipient write to them, so it must be enabled explicitly
//! ([`ServerOptions::dma_bufs`]).
//!
//! Both sides check the peer's credentials (`SO_PEERCRED`). A client must belong to the server's
//! own user or to a user that the server allows. A server must belong to the client's own user, to
//! root, or to a user that the client trusts. In a user namespace, all unmapped users share the
//! overflow id, which is accepted only if it is listed explicitly.
//!
//! A request is at most [`REQUEST_LIMIT_BYTES`] long. A client that sends an invalid request, or
//! none within [`PATIENCE`], is disconnected. One thread serves all clients and never waits for
//! any of them. The limits on descriptors in flight apply to each user separately.
//!
//! This module uses Unix sockets and the descriptors of finished images, but neither the engine's
//! threads nor model files. An image can be shared only if its segments have descriptors, so
//! anonymous memory can't be shared. A server also requires procfs or `unshare(CLONE_FS)` (see
//! `listener`). Dropping the [`Server`] stops its thread and then removes its socket. Clients that
//! have attached keep the memory.
//!
//! The protocol (version 1, `SOCK_SEQPACKET`): the client sends `dmaload\0`, the version and the
//! operation (`u32` each, little-endian), and the name of an image (empty to request the only
//! image of a server that shares just one). The server answers with `dmaload\0`, the version, a
//! status, the total number of descriptors and the number in this message. Further messages of the
//! same form follow until all descriptors are sent, each after the client has confirmed the
//! previous one with one byte. The first descriptor is a sealed memfd that describes the image in
//! JSON; the others are the image's allocations, in order.
//!
//! A refusal carries no descriptors. If the requested name is unknown or ambiguous, the names of
//! the server's images follow the refusal, each terminated by a zero byte.

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

/// Maximum length of a request in bytes.
pub const REQUEST_LIMIT_BYTES: usize = 512;

/// How long a server waits for a client's request, and for a client to receive the descriptors of
/// one message. Also how long a client can wait for the first image to be published, or while its
/// user's other clients are being served.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Maximum time for a client to receive an image.
pub const TRANSFER_LIMIT: Duration = Duration::from_secs(60);
