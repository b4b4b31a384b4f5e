//! The seeded simulator: the driver and the scheduler with a kernel that does everything a kernel may do.
//!
//! Everything runs on one thread, and every choice (which read completes next, how short it is, what is refused, who is
//! cancelled when) comes from one seed: a failure prints it, and the same seed fails in the same way again. Time is a
//! number that the simulator moves.
//!
//! `DMALOAD_SIM_SEEDS=50000` runs more seeds, from `DMALOAD_SIM_FROM` on; `DMALOAD_SIM_SEED=17` replays one.

mod fair;
mod kernel;
mod overlap;
mod remember;
mod scaling;
mod world;

use dmaload_testing::Random;
