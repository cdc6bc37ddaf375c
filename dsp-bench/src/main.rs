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

use commands::{compare, train, verify};

#[global_allocator]
static MEMORY: CountingAllocator = CountingAllocator::new();

/// Sequence-parallel strategies, head to head on real data.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a model under every strategy on every number of ranks: equality with serial first, then times,
    /// bytes and memory.
    Compare(compare::CompareArgs),
    /// Train a model on real data under any strategy, on any mesh of ranks; stop it, and go on on another mesh.
    Train(train::TrainArgs),
    /// Compare every tensor of reference files (safetensors with a `kind`) with what each strategy computes.
    Verify(verify::VerifyArgs),
}

fn main() -> ExitCode {
    MEMORY.keep_freed_pages();
    let outcome = match Cli::parse().command {
        Command::Compare(args) => compare::run(args),
        Command::Train(args) => train::run(&args),
        Command::Verify(args) => verify::run(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("dsp: {}", with_causes(&error));
            ExitCode::from(2)
        }
    }
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
