//! The memory of segments, from allocation to release.
//!
//! ```text
//!   heap ─► allocation ─► Backing (mapped) ─► pieces, filled by the ring ─► Segment ─► dropped
//!                                                                                         │
//!            the reaper's pool      ◄── may be reused ◄───────────────────────────────────┤
//!            unmapped and freed     ◄── by the reaper's thread ◄──────────────────────────┘
//! ```
//!
//! - [`heap`]: sources of memory; [`backing`]: one mapped allocation, while it is being filled and
//!   afterwards. [`buffer`] is the contract between memory and its writers.
//! - [`segment`]: filled memory, as a caller holds it. [`lent`] ensures that views of the bytes
//!   and handing out the memory for writing exclude each other.
//! - [`private`]: filled memory for code that may write to it.
//! - [`reaper`]: releases or pools dropped memory.
//! - Limits: [`window`] (allocated and not yet filled), [`budget`] (held by all loads of a loader;
//!   with [`charge`], which accounts for one allocation), and [`headroom`] (what the machine and
//!   its cgroups have left; [`pressure`] reports when processes wait for memory). A permit
//!   reserves part of a limit before memory is allocated; dropping it returns that part.
//!
//! This module allocates and maps memory through `dmabuf`, and reads the available memory from
//! procfs and cgroups; if neither can be read, only the loader's own limits apply. It opens no
//! model files and does not depend on the ring.
//!
//! Memory that the kernel may still write to is never freed: its owner either waits for the reads
//! or leaks it. Dropped memory goes to the reaper, whose thread runs until the loader and its last
//! allocation are dropped.

pub(crate) mod backing;
pub(crate) mod budget;
pub(crate) mod buffer;
pub(crate) mod charge;
pub(crate) mod headroom;
pub mod heap;
pub(crate) mod lent;
pub(crate) mod pressure;
pub(crate) mod private;
pub(crate) mod reaper;
pub(crate) mod segment;
pub(crate) mod window;
