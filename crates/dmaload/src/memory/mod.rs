//! Memory for segments, from allocation to release.
//!
//! ```text
//!   heap ─► allocation ─► Backing (mapped) ─► pieces, filled by the ring ─► Segment ─► dropped
//!                                                                                         │
//!            the reaper's pool      ◄── may be reused ◄───────────────────────────────────┤
//!            unmapped and freed     ◄── by the reaper's thread ◄──────────────────────────┘
//! ```
//!
//! - [`heap`] allocates memory. [`backing`] is one mapped allocation, both while it is being
//!   filled and afterwards. [`buffer`] defines the contract between memory and its writers.
//! - [`segment`] presents filled memory to the caller. [`lent`] ensures that memory is handed out
//!   for writing only while no view of its bytes exists, and that it can't be viewed afterwards.
//! - [`private`] provides filled memory to code that may write to it.
//! - [`reaper`] frees dropped memory or keeps it in a pool.
//! - The other modules limit how much memory is used. [`window`] limits what is allocated but not
//!   yet filled. [`budget`] limits what all loads of a loader hold, and [`charge`] accounts for
//!   one allocation. [`headroom`] checks how much memory the machine and the process's cgroups
//!   have left, and [`pressure`] reports when processes have to wait for memory. A permit reserves
//!   part of a limit before memory is allocated, and returns that part when it is dropped.
//!
//! This module allocates and maps memory through the `dmabuf` crate. It reads the amount of
//! available memory from procfs and cgroups; if neither can be read, only the loader's own limits
//! apply. It opens no model files and does not depend on the ring.
//!
//! Memory that the kernel may still write to is never freed: its owner either waits for the reads
//! in flight or leaks the memory. Dropped memory goes to the reaper, whose thread runs until the
//! loader and its last allocation are dropped.

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
