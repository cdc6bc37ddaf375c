//! `dsp compare`: strategies head to head, as tables, a report and a trace.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use dsp_bench::compare::{self, Meter};
use dsp_bench::devices::DeviceChoice;
use dsp_bench::progress::Progress;
use dsp_bench::scenario::{ModelKind, Passes, Scenario};
use dsp_bench::tracefile::TraceFile;
use dsp_bench::{report, table};
use dsp_core::Engine;
use dsp_models::training::Reduce;

use super::{engine, say, shown, writable, write};
use crate::MEMORY;

#[derive(Debug, clap::Args)]
pub(crate) struct CompareArgs {
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
    /// Where the ranks compute: flex (the processor), wgpu, cuda:0, or cuda:0,1 in turn. Under NCCL each
    /// has its GPU.
    #[arg(long, value_name = "DEVICE", default_value = "flex")]
    device: DeviceChoice,
    /// The compute threads of each rank; by default the ranks share the cores.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// What a repeat runs.
    #[arg(long, value_enum)]
    passes: Option<Passes>,
    /// Sum the parameters' gradients while the backward pass runs, bucket by bucket, instead of after it.
    #[arg(long)]
    overlap: bool,
    /// Send a switch that follows a sub-layer in this many parts, each on its way while the next is computed.
    #[arg(long, value_name = "N")]
    switch_parts: Option<NonZeroUsize>,
    /// Write all that was found as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the HTML report goes.
    #[arg(long, value_name = "FILE", default_value = "dsp-report.html")]
    report: PathBuf,
    /// Where the Perfetto trace of the first round goes.
    #[arg(long, value_name = "FILE", default_value = "dsp-trace.json")]
    trace: PathBuf,
}

/// Compares.
pub(crate) fn run(args: CompareArgs, engine: &Engine) -> anyhow::Result<ExitCode> {
    let mut scenario = match (&args.scenario, args.model) {
        (Some(name), _) => Scenario::load(name)?,
        (None, Some(kind)) => Scenario::of_model(kind)?,
        (None, None) => Scenario::load("default")?,
    };
    if let Some(kind) = args.model {
        scenario = scenario.with_model(kind)?;
    }
    scenario.strategies = args.strategy.or(scenario.strategies);
    // The scenario's own ranks are those that there are; who names others is told.
    let most = engine.most_ranks();
    scenario.ranks.retain(|&ranks| ranks <= most);
    scenario.ranks = args.ranks.unwrap_or(scenario.ranks);
    scenario.threads_per_rank = args.threads.or(scenario.threads_per_rank);
    scenario.passes = args.passes.unwrap_or(scenario.passes);
    scenario.switch_parts = args.switch_parts.unwrap_or(scenario.switch_parts);
    if args.overlap {
        scenario.reduce = Reduce::Overlapped;
    }
    scenario.check(&scenario.name)?;
    let devices = args.device.open(engine, scenario.dtype.dtype())?;
    let comparer = (compare::Comparer::new(scenario)?)
        .on(engine)
        .with_devices(devices);
    if !engine::shows(engine) {
        comparer.run(&Progress::lines(0, Box::new(std::io::sink())), &Unmetered)?;
        return Ok(ExitCode::SUCCESS);
    }

    args.json
        .iter()
        .chain([&args.report])
        .try_for_each(|path| writable(path))?;
    let trace = TraceFile::start(&args.trace)?;
    trace.set_recording(false);
    let progress = Progress::new(comparer.cases().len());
    let comparison = comparer.run(&progress, &TracedMemory { trace: &trace })?;
    progress.finish();
    // What was measured is kept and then shown, whatever becomes of the trace or of whoever reads.
    let trace = trace.finish();
    if let Some(path) = &args.json {
        write(path, &serde_json::to_string_pretty(&comparison)?)?;
    }
    let shown_trace = (trace.as_ref().ok()).map(|path| path.display().to_string());
    let page = report::render(&comparison, shown_trace.as_deref())?;
    write(&args.report, &page)?;

    say!("{}", table::render(&comparison));
    if engine.sent_bytes().is_some() {
        say!("{}\n", table::ledgers(&comparison));
    }
    if let Some(path) = &args.json {
        say!("json:   {}", shown(path));
    }
    if let Ok(trace) = &trace {
        say!("trace:  {} (open it at ui.perfetto.dev)", shown(trace));
    }
    say!("report: {}", shown(&args.report));
    say!("{}", comparison.finding());
    trace?;
    Ok(match comparison.all_well() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// The memory of a process that shows nothing: it counts, and is not traced.
struct Unmetered;

impl Meter for Unmetered {
    fn reset_peak(&self) -> u64 {
        MEMORY.reset_peak() as u64
    }

    fn peak(&self) -> u64 {
        MEMORY.peak_bytes() as u64
    }

    fn set_recording(&self, _recording: bool) {}
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
