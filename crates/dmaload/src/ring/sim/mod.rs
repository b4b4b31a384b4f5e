//! The seeded simulator: runs the real driver and scheduler on a simulated kernel that does
//! anything the real one may do.
//!
//! ```text
//!   worlds     many seeds, and the outcomes of their loads
//!    └─ world      one seed: loads, faults, abandoned loads; checked during and after the run
//!        └─ kernel     what is in flight, and how it completes
//!            ├─ disk       files, and their faults
//!            ├─ faults     the kernel's faults
//!            └─ memory     buffers that record which operations use them
//!   fair, overlap, remember, scaling    single properties, in virtual time
//! ```
//!
//! The simulator runs on one thread, and the seed determines every choice: which read completes
//! next, how short it is, what is refused, when a load is abandoned. A failure prints its seed,
//! which reproduces it. Time is a number that the simulator advances.
//!
//! `DMALOAD_SIM_SEEDS=50000` runs more seeds, from `DMALOAD_SIM_FROM` on; `DMALOAD_SIM_SEED=17`
//! replays one.

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
