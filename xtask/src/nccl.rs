//! The tests on NCCL: the same test binaries, a process for each rank, on the GPUs that are named.
//!
//! A GPU that is named twice holds two ranks. NCCL has one rank on each GPU of a host, so each process is then told that it
//! is a host of its own, and what they exchange goes through a socket: slow, but one GPU is enough to run all of it.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::command::{SEED, cargo, test_binaries};

/// The tests whose launches run on NCCL where there is one, with how often a property of each is tried at most.
const TESTS: [(&str, u32); 3] = [("collectives", 10), ("overlap", 10), ("equivalence", 4)];

/// Runs the tests, with as many ranks as there are GPUs in `gpus`, by their numbers; builds what is missing.
pub(crate) fn test(build: &[&str], gpus: &[usize]) -> Result<()> {
    let mut command = cargo();
    command.arg("test").args(build).arg("--tests");
    let binaries = test_binaries(&mut command, &TESTS.map(|(name, _)| name))?;
    for (test, binary) in binaries {
        let (name, tries) = TESTS[test];
        let start = Instant::now();
        let ranks = processes(&binary, tries, gpus)?;
        for (rank, output) in ranks.iter().enumerate() {
            if !output.status.success() {
                let (said, errors) = (&output.stdout, &output.stderr);
                bail!(
                    "{name}, rank {rank} of {}: {}\n{}\n{}",
                    gpus.len(),
                    output.status,
                    String::from_utf8_lossy(said),
                    String::from_utf8_lossy(errors)
                );
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{name} on {} ranks of NCCL: passed in {seconds:.1} s",
            gpus.len()
        );
    }
    Ok(())
}

/// Runs a process for each rank, and waits for all of them.
fn processes(binary: &Path, tries: u32, gpus: &[usize]) -> Result<Vec<Output>> {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let shared = (1..gpus.len()).any(|rank| gpus[..rank].contains(&gpus[rank]));
    let started: Vec<_> = (gpus.iter().enumerate())
        .map(|(rank, gpu)| {
            let mut process = Command::new(binary);
            process
                .args(["--test-threads", "1", "--color", "never"])
                .env("CUDA_VISIBLE_DEVICES", gpu.to_string())
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", gpus.len().to_string())
                .env("LOCAL_RANK", "0")
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .env("PROPTEST_CASES", tries.to_string())
                .env("PROPTEST_RNG_SEED", SEED);
            if shared {
                process
                    .env("NCCL_HOSTID", format!("rank{rank}"))
                    .env("NCCL_SOCKET_IFNAME", "lo");
            }
            process.stdin(Stdio::null());
            process.stdout(Stdio::piped()).stderr(Stdio::piped());
            let child = process.spawn().context("starting a rank")?;
            // Each is read by a thread, so that none waits for its output to be taken.
            Ok(std::thread::spawn(move || child.wait_with_output()))
        })
        .collect::<Result<_>>()?;
    (started.into_iter())
        .map(|rank| match rank.join() {
            Ok(output) => output.context("waiting for a rank"),
            Err(_) => bail!("a thread that waits for a rank panicked"),
        })
        .collect()
}
