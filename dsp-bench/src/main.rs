//! `dsp`: compares sequence-parallel strategies, and verifies them against reference files.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "printing is this program's work"
)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use dsp_bench::allocator::CountingAllocator;
use dsp_bench::compare::{self, Meter};
use dsp_bench::progress::Progress;
use dsp_bench::scenario::{ModelKind, Passes, Precision, Scenario};
use dsp_bench::tracefile::TraceFile;
use dsp_bench::verify::{self, Record};
use dsp_bench::{report, table};

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
    Compare(CompareArgs),
    /// Compare every tensor of reference files (safetensors with a `kind`) with what each strategy computes.
    Verify(VerifyArgs),
}

#[derive(Debug, clap::Args)]
struct CompareArgs {
    /// What to compare: a built-in scenario (default, small, or a model's name) or the path of a TOML file;
    /// without it, the model's own.
    #[arg(long)]
    scenario: Option<String>,
    /// The model, in the sizes of its built-in scenario. Beside --scenario, that one's ranks, repeats and tolerance
    /// stay.
    #[arg(long, value_enum)]
    model: Option<ModelKind>,
    /// Only these strategies, e.g. dsp,ulysses; a mixture's parts are joined by +, the first choice first, e.g.
    /// dsp+ulysses.
    #[arg(long, alias = "strategies", value_name = "NAME", value_delimiter = ',')]
    strategy: Option<Vec<String>>,
    /// Only these numbers of ranks, e.g. 1,2,4.
    #[arg(long, value_delimiter = ',')]
    ranks: Option<Vec<usize>>,
    /// The compute threads of each rank; by default the ranks share the cores.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// What a repeat runs.
    #[arg(long, value_enum)]
    passes: Option<Passes>,
    /// Write all that was found as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the HTML report goes.
    #[arg(long, value_name = "FILE", default_value = "dsp-report.html")]
    report: PathBuf,
    /// Where the Perfetto trace goes.
    #[arg(long, value_name = "FILE", default_value = "dsp-trace.json")]
    trace: PathBuf,
}

#[derive(Debug, clap::Args)]
struct VerifyArgs {
    /// The reference files.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// The float type of the run.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// The largest error allowed, relative to max(max|reference|, 1e-3); by default 2e-5 in f32 and 3e-7 in
    /// f64, for files are stored in f32.
    #[arg(long)]
    tol: Option<f64>,
    /// The numbers of ranks.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4")]
    ranks: Vec<usize>,
    /// Write one record per file, case, tensor, strategy, ranks and dtype, and one per refusal, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Dtype {
    F32,
    F64,
}

fn main() -> ExitCode {
    MEMORY.keep_freed_pages();
    let outcome = match Cli::parse().command {
        Command::Compare(args) => run_compare(args),
        Command::Verify(args) => run_verify(&args),
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

fn run_compare(args: CompareArgs) -> anyhow::Result<ExitCode> {
    let mut scenario = match (&args.scenario, args.model) {
        (Some(name), _) => Scenario::load(name)?,
        (None, Some(kind)) => Scenario::of_model(kind)?,
        (None, None) => Scenario::load("default")?,
    };
    if let Some(kind) = args.model {
        scenario = scenario.with_model(kind)?;
    }
    scenario.strategies = args.strategy.or(scenario.strategies);
    scenario.ranks = args.ranks.unwrap_or(scenario.ranks);
    scenario.threads_per_rank = args.threads.or(scenario.threads_per_rank);
    scenario.passes = args.passes.unwrap_or(scenario.passes);
    scenario.check(&scenario.name)?;
    let comparer = compare::Comparer::new(scenario)?;

    let trace = TraceFile::start(&args.trace)?;
    trace.set_recording(false);
    let progress = Progress::new(comparer.cases().len() as u64);
    let comparison = comparer.run(&progress, &TracedMemory { trace: &trace })?;
    progress.finish();
    let trace = trace.finish()?;

    println!("{}", table::render(&comparison));
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&comparison)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("json:   {}", shown(path));
    }
    let page = report::render(&comparison, Some(&trace.display().to_string()))?;
    std::fs::write(&args.report, page)
        .with_context(|| format!("cannot write {}", args.report.display()))?;
    println!("trace:  {} (open it at ui.perfetto.dev)", shown(&trace));
    println!("report: {}", shown(&args.report));
    println!("{}", comparison.finding());
    Ok(match comparison.all_well() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// The process's own memory and trace, as a comparison meters them.
struct TracedMemory<'a> {
    trace: &'a TraceFile,
}

impl Meter for TracedMemory<'_> {
    fn reset_peak(&self) -> u64 {
        MEMORY.reset_peak() as u64
    }

    fn peak(&self) -> u64 {
        MEMORY.peak_bytes() as u64
    }

    fn set_recording(&self, recording: bool) {
        self.trace.set_recording(recording);
    }
}

fn run_verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let (precision, tolerance) = match args.dtype {
        Dtype::F32 => (Precision::F32, 2e-5),
        Dtype::F64 => (Precision::F64, 3e-7),
    };
    let tolerance = args.tol.unwrap_or(tolerance);
    anyhow::ensure!(
        tolerance.is_finite() && tolerance >= 0.0,
        "--tol {tolerance}: the tolerance must be a number of at least 0"
    );
    anyhow::ensure!(
        !args.ranks.contains(&0),
        "--ranks 0: a run needs at least one rank"
    );
    let options = verify::Options {
        precision,
        tolerance,
        ranks: args.ranks.clone(),
    };
    let mut records = Vec::new();
    for file in &args.files {
        let bar = indicatif::ProgressBar::new_spinner();
        bar.enable_steady_tick(std::time::Duration::from_millis(120));
        let found = verify::verify(file, &options, &|what| bar.set_message(what.to_owned()));
        bar.finish_and_clear();
        let found = found?;
        println!(
            "{} ({}, tolerance {tolerance:e})",
            file.display(),
            precision.label()
        );
        println!("{}", verify::tabulate(&found));
        for line in verify::refusals(&found) {
            println!("{line}");
        }
        println!();
        records.extend(found);
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&records)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let compared = |passed: bool| {
        records
            .iter()
            .filter(|record| matches!(record, Record::Comparison { pass, .. } if *pass == passed))
            .count()
    };
    let (passed, failed) = (compared(true), compared(false));
    println!("{passed} comparisons within the tolerance, {failed} past it");
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn shown(path: &std::path::Path) -> String {
    std::path::absolute(path)
        .unwrap_or_else(|_| path.to_owned())
        .display()
        .to_string()
}
