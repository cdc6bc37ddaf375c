//! The project's tasks, as `cargo xtask <task>`: `bench`, `test`, `gpu`, `ci`, `architecture`.
//!
//! A task only says which cargo commands are run, in which order. This crate depends on no other
//! of the workspace, so that it is built in seconds and works while they do not compile.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a task's output is what it is run for"
)]

mod architecture;
mod ci;
mod command;
mod gpu;
mod mpi;
mod nccl;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use command::{cargo, installed, run};

/// The project's tasks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Strategies head to head on the clip: builds `dsp` and runs `dsp compare ARGS…`
    Bench {
        /// Instead, what kernels and collectives reach of this machine: every benchmark
        #[arg(long)]
        kernels: bool,
        /// Passed on to `dsp compare`, or to the benchmarks
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Every test and doc test; with arguments, only the tests that they select
    Test {
        /// Passed on to `cargo nextest run`, or to `cargo test` where nextest is not installed
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// What computes on a GPU, and a small head-to-head: on a GPU, or on Mesa's software device
    Gpu {
        /// lavapipe (Mesa's software device), wgpu (the system's GPU), cuda:0 and cuda:0,1 (NVIDIA's), or nccl:0,1 (a
        /// process on each; nccl:0,0 is two on one)
        #[arg(default_value = "lavapipe")]
        device: gpu::Gpu,
    },
    /// Everything that must hold before a change lands, from cheap to dear
    Ci {
        /// Leaves out the tests, for a caller that runs `cargo xtask test` itself
        #[arg(long)]
        skip_tests: bool,
    },
    /// Which crate may depend on which, and what a model may not know
    Architecture,
}

fn main() -> ExitCode {
    match perform(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            // Not `main() -> Result`: its output would close on a backtrace where those are on.
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Performs `task` in the workspace's root, wherever it was called.
fn perform(task: Task) -> Result<ExitCode> {
    let caller = std::env::current_dir().context("finding the folder that this was called in")?;
    std::env::set_current_dir(workspace_root()?).context("entering the workspace's folder")?;
    match task {
        Task::Bench {
            kernels: true,
            args,
        } => benchmarks(&args)?,
        Task::Bench {
            kernels: false,
            args,
        } => return bench(&args, &caller),
        Task::Test { args } => test(&args)?,
        Task::Gpu { device } => gpu::gpu(&device)?,
        Task::Ci { skip_tests } => ci::ci(skip_tests)?,
        Task::Architecture => architecture::check()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// `xtask/` stands in the workspace's root.
fn workspace_root() -> Result<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent()
        .map(Path::to_path_buf)
        .with_context(|| format!("{} has no parent", own.display()))
}

/// Runs `dsp compare ARGS…` where it was called, as paths among them are meant, and passes its exit code on.
fn bench(args: &[OsString], caller: &Path) -> Result<ExitCode> {
    let dsp = build_dsp()?;
    let status = std::process::Command::new(&dsp)
        .current_dir(caller)
        .arg("compare")
        .args(args)
        .status()
        .with_context(|| format!("starting {}", dsp.display()))?;
    match status.code() {
        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
        None => bail!("`dsp compare` was ended by a signal: {status}"),
    }
}

/// Runs every benchmark of the workspace, in the release profile, which the tests share.
fn benchmarks(args: &[OsString]) -> Result<()> {
    let mut benches = cargo();
    benches.args([
        "bench",
        "--profile",
        "release",
        "--workspace",
        "--bench",
        "*",
    ]);
    // As in the binary `dsp`, freed pages stay with the process: else page faults are part of what is measured.
    benches.env("MIMALLOC_PURGE_DELAY", "-1");
    run(benches.arg("--").args(args))
}

/// Builds `dsp` in the release profile and returns its path.
///
/// The command names the workspace and its examples because cargo then settles the dependencies'
/// features as it does for the tests, so that one build of Burn serves both. With `-p dsp-bench`
/// the tests' own dependencies would not count, and much of Burn would be compiled twice.
fn build_dsp() -> Result<PathBuf> {
    run(cargo()
        .args([
            "build",
            "--release",
            "--workspace",
            "--bin",
            "dsp",
            "--examples",
        ])
        .args(mpi::features()))?;
    let binary = format!("dsp{}", std::env::consts::EXE_SUFFIX);
    Ok(command::target_directory()?.join("release").join(binary))
}

/// Runs the tests, in the release profile, which `bench` shares.
///
/// The test runner comes last, so that the output closes with its summary; a doc test that fails
/// does not keep it from running. Examples are compiled with the tests.
fn test(args: &[OsString]) -> Result<()> {
    let nextest = installed("nextest");
    let runner: &[&str] = if nextest {
        &["nextest", "run"]
    } else {
        &["test"]
    };
    let mut tests = cargo();
    tests.args(runner).arg("--release");
    if !selects_packages(args) {
        tests.arg("--workspace").args(mpi::features());
    }
    if !nextest {
        println!(
            "cargo-nextest is not installed: `cargo test` runs the tests, without time limits"
        );
    }
    if !args.is_empty() {
        return run(tests.args(args));
    }
    // `cargo test` would run the doc tests too, unless its targets are named.
    if !nextest {
        tests.args(["--lib", "--bins", "--tests", "--examples"]);
    }
    let mut doc_tests = cargo();
    doc_tests.args(["test", "--release", "--workspace", "--doc"]);
    let doc_tests = run(doc_tests.args(mpi::features()));
    run(&mut tests)?;
    mpi::test()?;
    doc_tests
}

/// Whether a package is chosen in `args`, which cargo overrules if `--workspace` stands beside it.
fn selects_packages(args: &[OsString]) -> bool {
    args.iter().filter_map(|arg| arg.to_str()).any(|arg| {
        arg == "--package"
            || arg.starts_with("--package=")
            || (arg.starts_with("-p") && !arg.starts_with("--"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn arguments_after_the_task_are_passed_on_with_and_without_two_dashes() {
        for line in [
            &["xtask", "bench", "--ranks", "1,2", "x"][..],
            &["xtask", "bench", "--", "--ranks", "1,2", "x"],
        ] {
            let Task::Bench { kernels, args } = Arguments::try_parse_from(line).unwrap().task
            else {
                panic!("not bench: {line:?}");
            };
            assert_eq!((kernels, args.len()), (false, 3));
            assert_eq!(args, ["--ranks", "1,2", "x"]);
        }
    }

    #[test]
    fn kernels_are_asked_for_before_what_is_passed_on() {
        let line = ["xtask", "bench", "--kernels", "switch"];
        let Task::Bench { kernels, args } = Arguments::try_parse_from(line).unwrap().task else {
            panic!("not bench");
        };
        assert_eq!((kernels, args), (true, vec![OsString::from("switch")]));
    }

    #[test]
    fn a_chosen_package_replaces_the_workspace() {
        let chosen =
            |args: &[&str]| selects_packages(&args.iter().map(OsString::from).collect::<Vec<_>>());
        assert!(chosen(&["-p", "dsp-core"]));
        assert!(chosen(&["-pdsp-core"]));
        assert!(chosen(&["--package=dsp-core", "ring"]));
        assert!(!chosen(&["ring", "--profile", "ci"]));
    }
}
