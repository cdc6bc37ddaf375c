//! The MPI transport's all-to-all beside `MPI_Alltoallv` on the same bytes:
//! `cargo run --release --features mpi --example mpi_alltoall -- 2`, with the number of processes.
//!
//! The switch of DSP on an activation of STDiT's width: from a split of time to one of space. Raw MPI gets the
//! same counts in buffers that lie ready; the transport also packs, allocates and announces. Both run in turn, as
//! jobs of this same program.
#![allow(clippy::print_stdout, reason = "printing is this program's work")]

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor};
use dsp_bench::allocator::CountingAllocator;
use dsp_core::transport::mpi::Mpi;
use dsp_core::{CommError, Engine, Launch, Partition, collective};

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// Time, space, channels.
const SHAPE: [usize; 3] = [112, 256, 1152];
const REPEATS: usize = 50;
const ROUNDS: usize = 8;

fn main() -> anyhow::Result<()> {
    MEMORY.keep_freed_pages();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("raw") => raw(),
        Some("transport") => transport(),
        Some(processes) => compare(processes),
        None => compare("2"),
    }
}

/// Runs both in turn, and compares the medians.
fn compare(processes: &str) -> anyhow::Result<()> {
    let job = |which: &str| -> anyhow::Result<Vec<f64>> {
        let output = Command::new("mpirun")
            .args([
                "-n",
                processes,
                "--oversubscribe",
                "--bind-to",
                "none",
                "--allow-run-as-root",
            ])
            .arg(std::env::current_exe()?)
            .arg(which)
            .output()
            .context("starting mpirun")?;
        if !output.status.success() {
            bail!("{which}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let text = String::from_utf8(output.stdout)?;
        let times = text.split_whitespace().map(str::parse);
        Ok(times.collect::<Result<_, _>>()?)
    };
    let (mut raws, mut ours) = (vec![], vec![]);
    for round in 1..=ROUNDS {
        raws.extend(job("raw")?);
        ours.extend(job("transport")?);
        println!(
            "round {round}: raw {:.1} ms, transport {:.1} ms",
            median(&mut raws.clone()),
            median(&mut ours.clone())
        );
    }
    let (raw, own) = (median(&mut raws), median(&mut ours));
    let bytes: usize = SHAPE.iter().product::<usize>() * 4;
    println!(
        "{processes} processes, {:.1} MB in all: MPI_Alltoallv {raw:.1} ms, the transport {own:.1} ms, {:.0} % of its rate",
        bytes as f64 / 1e6,
        100.0 * raw / own
    );
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn raw() -> anyhow::Result<()> {
    let mpi = ferrompi::Mpi::init()?;
    let world = mpi.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    let [time, space, channels] = SHAPE;
    let (rows, columns) = (
        Partition::balanced(time, size),
        Partition::balanced(space, size),
    );
    let count = |a: usize, b: usize| i32::try_from(a * b * channels).context("a count");
    let counts = |own: &Partition, other: &Partition| -> anyhow::Result<(Vec<i32>, Vec<i32>)> {
        let counts = (0..size).map(|peer| count(own.count(rank), other.count(peer)));
        let counts: Vec<i32> = counts.collect::<Result<_, _>>()?;
        let mut start = 0;
        let starts = counts.iter().map(|count| {
            let end = start + count;
            std::mem::replace(&mut start, end)
        });
        let starts = starts.collect();
        Ok((counts, starts))
    };
    let (send_counts, send_starts) = counts(&rows, &columns)?;
    let (receive_counts, receive_starts) = counts(&columns, &rows)?;
    let send = vec![1.0_f32; rows.count(rank) * space * channels];
    let mut receive = vec![0.0_f32; columns.count(rank) * time * channels];
    for _ in 0..REPEATS {
        world.barrier()?;
        let start = Instant::now();
        world.alltoallv(
            &send,
            &send_counts,
            &send_starts,
            &mut receive,
            &receive_counts,
            &receive_starts,
        )?;
        let took = start.elapsed().as_secs_f64() * 1e3;
        let slowest = world.allreduce_scalar(took, ferrompi::ReduceOp::Max)?;
        if rank == 0 {
            println!("{slowest}");
        }
    }
    Ok(())
}

fn transport() -> anyhow::Result<()> {
    let mpi = Mpi::start()?;
    let (first, ranks) = (mpi.rank() == 0, mpi.size());
    let launch = Launch::new(ranks).on(&Engine::Mpi(mpi));
    let times = launch.run_shared(|group| -> Result<Vec<f64>, CommError> {
        let [time, space, channels] = SHAPE;
        let device = Device::flex();
        let (rows, columns) = (
            Partition::balanced(time, group.size()),
            Partition::balanced(space, group.size()),
        );
        let x = Tensor::<3>::ones([rows.count(group.rank()), space, channels], &device);
        (0..REPEATS)
            .map(|_| {
                collective::all_reduce(Tensor::<1>::zeros([1], &device), &group)?;
                let start = Instant::now();
                collective::all_to_all(x.clone(), (0, &rows), (1, &columns), &group)?;
                Ok(start.elapsed().as_secs_f64() * 1e3)
            })
            .collect()
    })?;
    if first {
        for repeat in 0..REPEATS {
            println!(
                "{}",
                times.iter().map(|rank| rank[repeat]).fold(0.0, f64::max)
            );
        }
    }
    Ok(())
}
