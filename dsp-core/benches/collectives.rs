//! What moving costs: each collective beside a plain copy of the bytes that it reads, by all ranks at once, in the
//! same run: one of those that `cargo xtask bench --kernels` runs. The last column is the share of the copy's bandwidth
//! that the collective reaches.
#![allow(
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark's output is what it is run for"
)]

use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor};
use dsp_core::collective::{all_gather, all_reduce, all_to_all, reduce_scatter};
use dsp_core::{CommError, Group, Launch, Partition};

/// Pages that are freed stay with the process, as in the binary `dsp`: else page faults are what is measured.
#[global_allocator]
static MEMORY: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What each rank holds: 4 million f32, 16 MiB. As a video it is `[1, 64, 128, 1, 512]`, whatever the ranks.
const TIME: usize = 64;
const SPACE: usize = 128;
const CHANNELS: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Move {
    /// The floor: every rank copies, into memory that it has, as much as the collective reads.
    Copy {
        blocks: usize,
    },
    /// The switch of Dynamic Sequence Parallelism.
    AllToAll,
    AllGather,
    ReduceScatter,
    AllReduce,
}

impl Move {
    fn name(self) -> &'static str {
        match self {
            Self::Copy { .. } => "copy",
            Self::AllToAll => "all-to-all",
            Self::AllGather => "all-gather",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllReduce => "all-reduce",
        }
    }

    /// How many times its own 16 MiB a rank reads.
    fn blocks(self, ranks: usize) -> usize {
        match self {
            Self::Copy { blocks } => blocks,
            Self::AllToAll => 1,
            // Of a block of 16 MiB from each rank.
            Self::AllGather => ranks,
            // Of a tensor of N times 16 MiB, of which 16 MiB from each rank are summed.
            Self::ReduceScatter => ranks,
            // Of 16 MiB a rank, N times an Nth, and then the sums.
            Self::AllReduce => 2,
        }
    }

    /// Runs it `iterations` times on a rank.
    fn run(self, group: &Group, iterations: u64) -> Result<Duration, CommError> {
        let (rank, ranks) = (group.rank(), group.size());
        let (time, space) = (
            Partition::balanced(TIME * ranks, ranks),
            Partition::balanced(SPACE, ranks),
        );
        let tensor = |frames| {
            let shape = [1, frames, SPACE, 1, CHANNELS];
            Tensor::<5>::full(shape, rank as f64, (&Device::flex(), DType::F32))
        };
        let barrier = || all_reduce(Tensor::<1>::zeros([1], &Device::flex()), group).map(drop);
        let timed = |work: &mut dyn FnMut() -> Result<(), CommError>| {
            work()?;
            barrier()?;
            let start = Instant::now();
            for _ in 0..iterations {
                work()?;
            }
            Ok(start.elapsed())
        };
        let x = tensor(TIME);
        match self {
            Self::Copy { blocks } => {
                let source = vec![1.0f32; blocks * TIME * SPACE * CHANNELS];
                let mut target = source.clone();
                timed(&mut || {
                    target.copy_from_slice(std::hint::black_box(&source));
                    std::hint::black_box(&mut target);
                    Ok(())
                })
            }
            Self::AllToAll => {
                timed(&mut || all_to_all(x.clone(), (1, &time), (2, &space), group).map(drop))
            }
            Self::AllGather => timed(&mut || all_gather(x.clone(), 1, &time, group).map(drop)),
            Self::ReduceScatter => {
                let whole = tensor(TIME * ranks);
                timed(&mut || reduce_scatter(whole.clone(), 1, &time, group).map(drop))
            }
            Self::AllReduce => timed(&mut || all_reduce(x.clone(), group).map(drop)),
        }
    }
}

/// The slowest rank's time.
fn measure(what: Move, ranks: usize, iterations: u64) -> Duration {
    let launch = Launch::new(ranks).run(move |group| what.run(&group, iterations));
    match launch {
        Ok(times) => times.into_iter().max().unwrap_or_default(),
        Err(error) => panic!("{} on {ranks} ranks: {error}", what.name()),
    }
}

/// Seconds a run, the median of several launches.
fn median(what: Move, ranks: usize) -> f64 {
    const LAUNCHES: usize = 7;
    const ITERATIONS: u64 = 8;
    let seconds = |_| measure(what, ranks, ITERATIONS).as_secs_f64() / ITERATIONS as f64;
    let mut seconds: Vec<f64> = (0..LAUNCHES).map(seconds).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[LAUNCHES / 2]
}

fn main() {
    println!("collective         ranks       ms   copy, ms   share of the copy's bandwidth");
    for ranks in [2, 4] {
        let moves = [
            Move::AllToAll,
            Move::AllGather,
            Move::ReduceScatter,
            Move::AllReduce,
        ];
        for what in moves {
            let blocks = what.blocks(ranks);
            let [time, floor] = [what, Move::Copy { blocks }].map(|what| median(what, ranks));
            println!(
                "{:<17} {ranks:>6} {:>8.2} {:>10.2} {:>7.0} %",
                what.name(),
                1e3 * time,
                1e3 * floor,
                1e2 * floor / time
            );
        }
    }
}
