//! The tests on MPI: the same test binaries, started by `mpirun` on one to four processes.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::command::{SEED, answers, cargo, test_binaries};

/// The tests whose launches run on MPI where there is one: collectives, what ends a sub-layer, the ways of failing,
/// gradients that are summed on the way, and every strategy against serial; and how often a property of each is tried
/// at most, on each number of processes. (Those of strategies take long, and are tried more often on threads.)
const TESTS: [(&str, u32); 5] = [
    ("collectives", 60),
    ("ending", 60),
    ("ranks", 60),
    ("overlap", 60),
    ("equivalence", 12),
];

/// A job that takes longer hangs.
const LIMIT_SECONDS: &str = "600";

/// Whether MPI can be compiled against and run.
pub(crate) fn installed() -> bool {
    ["mpicc", "mpirun"]
        .iter()
        .all(|program| answers(Command::new(program).arg("--version")))
}

/// The features to build with: one build serves the tests on threads, those on MPI and `dsp`.
pub(crate) fn features() -> &'static [&'static str] {
    match installed() {
        true => &["--features", "mpi"],
        false => &[],
    }
}

/// Runs the tests of [`TESTS`] on one to four processes; builds what is missing.
pub(crate) fn test() -> Result<()> {
    if !installed() {
        println!(
            "MPI is not installed (Debian: libopenmpi-dev openmpi-bin): its tests are left out"
        );
        return Ok(());
    }
    for (test, binary) in binaries()? {
        let (name, tries) = TESTS[test];
        for processes in 1..=4 {
            let start = Instant::now();
            let job = mpirun(processes)
                .env("PROPTEST_CASES", tries.to_string())
                .arg(&binary)
                // A process of mpirun's writes to a terminal of its own, in colours.
                .args(["--test-threads", "1", "--color", "never"])
                .stdin(Stdio::null())
                .output()
                .context("starting mpirun")?;
            let output = String::from_utf8_lossy(&job.stdout);
            // The words before are written one by one, and those of several processes may run into each other.
            let passed = output.matches(" passed; 0 failed;").count();
            if !job.status.success() || passed != processes {
                let errors = String::from_utf8_lossy(&job.stderr);
                bail!(
                    "{name} on {processes} processes: {}\n{output}\n{errors}",
                    job.status
                );
            }
            let seconds = start.elapsed().as_secs_f64();
            println!("{name} on {processes} processes: passed in {seconds:.1} s");
        }
    }
    Ok(())
}

fn mpirun(processes: usize) -> Command {
    let mut mpirun = Command::new("mpirun");
    mpirun
        .args([
            "-n",
            &processes.to_string(),
            "--oversubscribe",
            "--allow-run-as-root",
        ])
        .args(["--timeout", LIMIT_SECONDS])
        // A test binary ends without a word to MPI.
        .args(["--mca", "orte_allowed_exit_without_sync", "1"])
        .env("PROPTEST_RNG_SEED", SEED);
    mpirun
}

/// The test binaries, built as the tests on threads are.
fn binaries() -> Result<Vec<(usize, PathBuf)>> {
    let mut build = cargo();
    build.args(["test", "--release", "--workspace"]);
    build
        .args(features())
        .args(["--lib", "--bins", "--tests", "--examples"]);
    test_binaries(&mut build, &TESTS.map(|(name, _)| name))
}
