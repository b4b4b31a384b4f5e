//! Where bytes live, from allocation to release.
//!
//! ```text
//!   heap ─► allocation ─► Backing (mapped) ─► pieces, filled by the ring ─► Segment ─► dropped
//!                                                                                         │
//!            the pool of the reaper ◄── may be reused ◄───────────────────────────────────┤
//!            unmapped and freed     ◄── by the reaper's thread ◄──────────────────────────┘
//! ```
//!
//! - [`heap`]: sources of memory; [`backing`]: one mapped allocation, while it is being filled and
//!   afterwards. [`buffer`] is the contract between memory and its writers.
//! - [`segment`]: filled memory, as a caller holds it. [`lent`] makes views of its bytes and
//!   handing out its descriptor exclude each other.
//! - [`private`]: filled memory for code that writes to it, of which no views are lent any more.
//! - [`reaper`]: releases or pools dropped memory.
//! - Limits: [`window`] (allocated and not yet filled), [`budget`] (held by all loads of a loader;
//!   with [`charge`], which accounts for one allocation), and [`headroom`] (what the machine and
//!   its cgroups have left; [`pressure`] reports when other processes lack memory). What is taken
//!   from a limit ahead of memory is a permit, which is returned when it is dropped.
//!
//! Makes the kernel's memory calls, through `dmabuf`, and reads figures from procfs, sysfs and
//! cgroups; without these, only the loader's own limits apply, and nothing else is refused. Opens
//! no model files and knows nothing of rings. Memory that the kernel may still write to is leaked,
//! never freed; all other memory is freed by the reaper's thread, which ends with the last
//! allocation.

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
