//! `dsp launch`: a job's ranks, started, shown and ended together.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use dsp_bench::launcher::{self, Environment, Job, TransportKind};

#[derive(Debug, clap::Args)]
pub(crate) struct LaunchArgs {
    /// The ranks.
    #[arg(short = 'n', long, value_name = "N")]
    ranks: usize,
    /// How often a training is started again from its last checkpoint after a rank has failed.
    #[arg(long, value_name = "K", default_value_t = 0)]
    restarts: usize,
    /// How many ranks fewer there are each time.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "restarts")]
    fewer: usize,
    /// How many seconds the ranks may go on after the first has failed, to find that out and to say so.
    #[arg(long, value_name = "SECONDS", default_value_t = 90.0)]
    grace: f64,
    /// More words for mpirun, e.g. "--hostfile hosts --bind-to socket".
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    mpirun: String,
    /// What each rank does: a command of dsp with its arguments, e.g. train --model lm.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RankArgs {
    /// What the rank does.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Runs a job.
pub(crate) fn run(args: LaunchArgs, transport: TransportKind) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(args.ranks > 0, "-n 0: a job needs at least one rank");
    let grace = Duration::try_from_secs_f64(args.grace)
        .with_context(|| format!("--grace {}", args.grace))?;
    let job = Job {
        program: std::env::current_exe().context("finding this program")?,
        arguments: args.command,
        ranks: args.ranks,
        transport,
        mpirun: args.mpirun.split_whitespace().map(OsString::from).collect(),
        grace,
        restarts: args.restarts,
        fewer: args.fewer,
    };
    exit(launcher::run(&job, &Environment::new(std::env::vars_os()))?)
}

/// Runs a rank of a job that `mpirun` started.
pub(crate) fn run_rank(args: &RankArgs) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("finding this program")?;
    let environment = Environment::new(std::env::vars_os());
    exit(launcher::run_rank(&program, &args.command, &environment).context("starting the rank")?)
}

fn exit(code: i32) -> anyhow::Result<ExitCode> {
    // What does not fit into a byte is a failure all the same.
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
