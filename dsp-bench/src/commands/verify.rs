//! `dsp verify`: reference files against every strategy.

use std::path::PathBuf;
use std::process::ExitCode;

use dsp_bench::devices::DeviceChoice;
use dsp_bench::scenario::Precision;
use dsp_bench::verify::{self, Record};
use dsp_core::Engine;

use super::{engine, say, writable, write};

#[derive(Debug, clap::Args)]
#[command(after_long_help = format())]
pub(crate) struct VerifyArgs {
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
    /// The numbers of ranks; by default 1, 2, 3 and 4.
    #[arg(long, value_delimiter = ',')]
    ranks: Option<Vec<usize>>,
    /// Where the ranks compute: flex (the processor), wgpu, cuda:0, or cuda:0,1 in turn. Under NCCL each
    /// has its GPU.
    #[arg(long, value_name = "DEVICE", default_value = "flex")]
    device: DeviceChoice,
    /// Write one record per file, case, tensor, strategy, ranks and dtype, and one per refusal, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Dtype {
    F32,
    F64,
}

/// What a reference file is.
fn format() -> String {
    let kinds: Vec<&str> = verify::kinds().collect();
    format!(
        "A reference file is a safetensors file in f32 whose metadata holds its `kind` and the model's configuration. \
         Kinds:\n  {}\n\n\
         Tensors are named after what they are: `param.X` is a weight by its original name and `grad.X` its gradient, `dx` the \
         gradient of an input `x`, `dout` what was fed to the backward pass. What a kind needs and a file lacks is named. \
         Examples are in dsp-models/tests/fixtures.",
        kinds.join("\n  ")
    )
}

/// Verifies.
pub(crate) fn run(args: &VerifyArgs, engine: &Engine) -> anyhow::Result<ExitCode> {
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
        !args.ranks.iter().flatten().any(|&ranks| ranks == 0),
        "--ranks 0: a run needs at least one rank"
    );
    let devices = args.device.open(engine, precision.dtype())?;
    // By default on as many as there are; who names more is told.
    let most = match args.ranks {
        Some(_) => usize::MAX,
        None => engine.most_ranks(),
    };
    let ranks = args
        .ranks
        .clone()
        .unwrap_or_else(|| (1..=4.min(most)).collect());
    let options = verify::Options {
        precision,
        tolerance,
        ranks,
        engine: engine.clone(),
        devices,
    };
    if engine::shows(engine) {
        args.json.iter().try_for_each(|path| writable(path))?;
    }
    let mut records = Vec::new();
    for file in &args.files {
        let bar = indicatif::ProgressBar::new_spinner();
        bar.enable_steady_tick(std::time::Duration::from_millis(120));
        let found = verify::verify(file, &options, &|what| bar.set_message(what.to_owned()));
        bar.finish_and_clear();
        let found = found?;
        if !engine::shows(engine) {
            continue;
        }
        say!(
            "{} ({}, tolerance {tolerance:e})",
            file.display(),
            precision.label()
        );
        say!("{}", verify::tabulate(&found));
        for line in verify::refusals(&found) {
            say!("{line}");
        }
        say!();
        records.extend(found);
    }
    if !engine::shows(engine) {
        return Ok(ExitCode::SUCCESS);
    }
    let (ledgers, equal) = verify::ledgers(&records);
    for line in ledgers {
        say!("{line}");
    }
    if let Some(path) = &args.json {
        write(path, &serde_json::to_string_pretty(&records)?)?;
    }
    let compared = |passed: bool| {
        records
            .iter()
            .filter(|record| matches!(record, Record::Comparison { pass, .. } if *pass == passed))
            .count()
    };
    let (passed, failed) = (compared(true), compared(false));
    say!("{passed} comparisons within the tolerance, {failed} past it");
    Ok(match failed {
        0 if equal => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
