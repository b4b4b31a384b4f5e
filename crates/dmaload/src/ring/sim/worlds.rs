//! Runs many seeded worlds, and checks that every outcome occurs in at least one of them.

use super::world::World;
use crate::ring::message::Failure;

/// How many loads had each outcome, and how many bytes were leaked.
#[derive(Debug, Default)]
struct Outcomes {
    complete: u64,
    stepped_down: u64,
    abandoned: u64,
    read_failed: u64,
    ended_early: u64,
    refused: u64,
    rejected: u64,
    ring_broke: u64,
    no_staging: u64,
    no_memory: u64,
    from_cache: u64,
    evicted: u64,
    leaked_bytes: u64,
}

impl Outcomes {
    fn count(world: &World) -> Self {
        let mut outcomes = Outcomes { leaked_bytes: world.leaked_bytes, ..Outcomes::default() };
        for load in world.loads.values() {
            outcomes.from_cache += u64::from(load.cached_bytes > 0);
            outcomes.evicted += u64::from(load.cached_bytes < load.cacheable_bytes && load.failure.is_none());
            outcomes.stepped_down += u64::from(!load.refused.is_empty());
            *match load.failure {
                None if load.full.iter().all(|&full| full) => &mut outcomes.complete,
                None => &mut outcomes.abandoned,
                Some(Failure::Read { .. }) => &mut outcomes.read_failed,
                Some(Failure::Ended { .. }) => &mut outcomes.ended_early,
                Some(Failure::Refused { .. }) => &mut outcomes.refused,
                Some(Failure::Rejected { .. }) => &mut outcomes.rejected,
                Some(Failure::Kernel { .. }) => &mut outcomes.ring_broke,
                Some(Failure::Staging { .. }) => &mut outcomes.no_staging,
                Some(Failure::Memory { .. }) => &mut outcomes.no_memory,
            } += 1;
        }
        outcomes
    }

    fn counts(&mut self) -> [&mut u64; 13] {
        let Outcomes { complete, stepped_down, abandoned, read_failed, ended_early, .. } = self;
        let Outcomes { refused, rejected, ring_broke, no_staging, no_memory, from_cache, evicted, leaked_bytes, .. } = self;
        [
            complete,
            stepped_down,
            abandoned,
            read_failed,
            ended_early,
            refused,
            rejected,
            ring_broke,
            no_staging,
            no_memory,
            from_cache,
            evicted,
            leaked_bytes,
        ]
    }

    fn add(&mut self, mut other: Outcomes) {
        for (sum, other) in self.counts().into_iter().zip(other.counts()) {
            *sum += *other;
        }
    }

    fn all_happened(&mut self) -> bool {
        self.counts().into_iter().all(|count| *count > 0)
    }
}

fn run_world(seed: u64) -> Outcomes {
    let result = std::panic::catch_unwind(|| {
        let mut world = World::new(seed);
        world.run();
        Outcomes::count(&world)
    });
    result.unwrap_or_else(|panic| {
        eprintln!("the world with seed {seed} failed; replay it with: just simulate --seed {seed}");
        std::panic::resume_unwind(panic)
    })
}

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("the variable should hold a number"))
}

#[test]
fn every_world_loads_the_right_bytes_or_reports_failure() {
    if let Some(seed) = number_from("DMALOAD_SIM_SEED") {
        println!("the world with seed {seed}: {:?}", run_world(seed));
        return;
    }
    let (from, count) = (number_from("DMALOAD_SIM_FROM").unwrap_or(0), number_from("DMALOAD_SIM_SEEDS").unwrap_or(2_000));
    let mut outcomes = Outcomes::default();
    // In this world, a chunk waits for the only buffer slot. The slot is held by the piece of a
    // later chunk that must be read alone. Both chunks must proceed.
    run_world(222_952);
    for seed in from..from + count {
        outcomes.add(run_world(seed));
    }
    println!("{count} worlds, starting with seed {from}: {outcomes:?}");
    // If an outcome never occurs, these worlds do not test it.
    assert!(count < 2_000 || outcomes.all_happened(), "an outcome never occurred: {outcomes:?}");
}
