//! The seeded simulator: runs the real driver and scheduler on a simulated kernel that does
//! anything the real one may do.
//!
//! ```text
//!   worlds     runs many seeds, and counts the outcomes of their loads
//!    └─ world      one seed: loads, faults, abandoned loads; checked during and after the run
//!        └─ kernel     what is in flight, and how it completes
//!            ├─ disk       files, and their faults
//!            ├─ faults     the kernel's faults
//!            └─ memory     buffers that record which operations use them
//!   fair, overlap, remember, scaling    test individual properties in virtual time
//! ```
//!
//! The simulator runs on one thread, and the seed determines every choice: which read completes
//! next, how short it is, what is refused, when a load is abandoned. A failing world prints its
//! seed, which reproduces the failure. Time is virtual, and is advanced by the simulator.
//!
//! Set `DMALOAD_SIM_SEEDS=50000` to run that many seeds, starting with the one in
//! `DMALOAD_SIM_FROM`. Set `DMALOAD_SIM_SEED=17` to replay a single seed.

mod disk;
mod fair;
mod faults;
mod kernel;
mod memory;
mod overlap;
mod remember;
mod scaling;
mod world;
mod worlds;

use dmaload_testing::Random;
