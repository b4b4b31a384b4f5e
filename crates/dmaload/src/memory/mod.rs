//! Where bytes live, from the moment that memory is asked for until it is freed.
//!
//! ```text
//!   heap ──► allocation ──► Backing (mapped) ──► pieces, filled by the ring ──► Segment ──► dropped
//!                                                                                           │
//!            the pool of the reaper ◄── may be used again ◄──────────────────────────────────┤
//!            unmapped and freed     ◄── by the reaper's thread ◄────────────────────────────┘
//! ```
//!
//! - [`heap`]: where memory comes from, and [`backing`]: one allocation, mapped, while it is being
//!   filled and after. [`buffer`] is the contract between memory and whoever writes to it.
//! - [`segment`]: filled memory, as a caller holds it. [`lent`] keeps views of its bytes and handing
//!   out its descriptor apart.
//! - [`reaper`]: where dropped memory goes.
//! - Limits: [`window`] (allocated and not yet filled), [`budget`] (held by all loads of a loader, with
//!   [`charge`] for one allocation's part of it), and [`headroom`] (what the machine and its cgroups
//!   have left; [`pressure`] tells when others lack it). What is taken of a limit ahead of memory is a
//!   permit of it, which goes back when it is dropped.
//!
//! It makes the kernel's memory calls, through `dmabuf`, and reads figures from procfs, sysfs and
//! cgroups; without these no limit but the loader's own is known, and nothing is refused. It opens no
//! model file and knows no ring. Whatever the kernel may still write to is leaked, never freed; all
//! else is freed by the reaper's thread, which ends with the last allocation.

pub(crate) mod backing;
pub(crate) mod budget;
pub(crate) mod buffer;
pub(crate) mod charge;
pub(crate) mod headroom;
pub mod heap;
pub(crate) mod lent;
pub(crate) mod pressure;
pub(crate) mod reaper;
pub(crate) mod segment;
pub(crate) mod window;
