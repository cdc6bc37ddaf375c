//! `dsp`: compares sequence-parallel strategies, trains models under them, and verifies them against reference files.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "printing is this program's work"
)]

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dsp_bench::allocator::CountingAllocator;
use dsp_bench::launcher::{self, TransportKind};

use commands::{compare, engine, launch, train, verify};

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// Sequence-parallel strategies, head to head on real data.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// What moves data between the ranks, and what they are: threads of this process, or processes.
    #[arg(long, global = true, value_enum, default_value = "local")]
    transport: TransportKind,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a model under every strategy on every number of ranks: equality with serial first, then times,
    /// bytes and memory.
    Compare(compare::CompareArgs),
    /// Start a command's ranks, show what they say, and end them together when one fails.
    Launch(launch::LaunchArgs),
    /// One rank of what `launch` starts by mpirun.
    #[command(hide = true)]
    Rank(launch::RankArgs),
    /// Train a model on real data under any strategy, on any mesh of ranks; stop it, and go on on another mesh.
    Train(train::TrainArgs),
    /// Compare every tensor of reference files (safetensors with a `kind`) with what each strategy computes.
    Verify(verify::VerifyArgs),
}

fn main() -> ExitCode {
    MEMORY.keep_freed_pages();
    match perform(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("dsp: {}", with_causes(&error));
            ExitCode::from(2)
        }
    }
}

fn perform(cli: Cli) -> anyhow::Result<ExitCode> {
    let transport = cli.transport;
    match cli.command {
        Command::Launch(args) => return launch::run(args, transport),
        Command::Rank(args) => return launch::run_rank(&args),
        _ => {}
    }
    if std::env::var_os(launcher::TIED).is_some() {
        launcher::die_with_parent();
    }
    let engine = engine::start(transport)?;
    let outcome = match cli.command {
        Command::Compare(args) => compare::run(args, &engine),
        Command::Train(args) => train::run(&args, &engine),
        Command::Verify(args) => verify::run(&args, &engine),
        Command::Launch(_) | Command::Rank(_) => Ok(ExitCode::SUCCESS),
    };
    // Processes end together: whoever failed says so before that.
    outcome
        .inspect_err(|error| eprintln!("dsp: {}", with_causes(error)))
        .or(Ok(ExitCode::from(2)))
}

/// An error and its causes, without those that its own message already says.
fn with_causes(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if message.is_empty() {
            message = text;
        } else if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
    }
    message
}
