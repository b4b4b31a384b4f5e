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

/// Random numbers for the simulator (xorshift64*): the same seed, the same world.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Random((seed ^ 0x5DEE_CE66_D1CE_4E5B).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit.max(1)
    }

    /// True in `per_mille` of 1000 cases.
    fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let index = self.below(from.len() as u64);
        &from[usize::try_from(index).unwrap()]
    }
}
