//! `dsp train`: a model learns from real data, into a folder.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, TableStyle};
use dsp_bench::devices::DeviceChoice;
use dsp_bench::scenario::ModelKind;
use dsp_bench::train::{
    self, Begin, Change, Outcome, RunConfig, Shown, Watch, config_of, metrics_of,
};
use dsp_core::Engine;
use dsp_models::training::Mesh;

use super::{engine, shown};

#[derive(Debug, clap::Args)]
pub(crate) struct TrainArgs {
    /// The model, in the sizes of its built-in run and on the built-in data.
    #[arg(long, value_enum, required_unless_present_any = ["config", "resume"])]
    model: Option<ModelKind>,
    /// A run as a TOML file, as every run writes it beside its results.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "resume"])]
    config: Option<PathBuf>,
    /// Go on with the run in this folder, from its last checkpoint. Strategy, mesh and steps may be other ones.
    #[arg(long, value_name = "FOLDER", conflicts_with = "model")]
    resume: Option<PathBuf>,
    /// Go on from the checkpoint of this step instead of the last one.
    #[arg(long, value_name = "STEP", requires = "resume")]
    from_step: Option<u64>,
    /// Where the run goes: configuration, metrics, checkpoints, what was learnt. By default dsp-run-MODEL.
    #[arg(long, value_name = "FOLDER", conflicts_with = "resume")]
    out: Option<PathBuf>,
    /// The strategy by name, a mixture's parts joined by +.
    #[arg(long, value_name = "NAME")]
    strategy: Option<String>,
    /// Where the ranks compute: flex (the processor), wgpu, cuda:0, or cuda:0,1 in turn. Under NCCL each
    /// has its GPU.
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Ranks that share a sequence: --ranks 4 is --mesh sp=4.
    #[arg(long, value_name = "N", conflicts_with = "mesh")]
    ranks: Option<usize>,
    /// Ranks that share a sequence, times replicas with samples of their own, e.g. sp=2,dp=2.
    #[arg(long)]
    mesh: Option<Mesh>,
    /// A file of one's own to learn from: y4m for video and vit, text for language models, NetCDF for weather.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Steps in all.
    #[arg(long)]
    steps: Option<u64>,
    /// What ranks look for in all that passes them: finite names the first rank and layer that have a NaN or an infinity,
    /// and reads all activations once more each way for it; nothing, if not said.
    #[arg(long, value_name = "WHAT")]
    watch: Option<String>,
    /// Of all that is random.
    #[arg(long)]
    seed: Option<u64>,
    /// Any other value of the run, e.g. training.learning_rate=0.001; may stand several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<Change>,
}

/// Trains.
pub(crate) fn run(args: &TrainArgs, engine: &Engine) -> anyhow::Result<ExitCode> {
    let config = match (&args.resume, &args.config, args.model) {
        (Some(folder), ..) => config_of(folder)?,
        (None, Some(file), _) => RunConfig::read(file)?,
        (None, None, Some(kind)) => RunConfig::of_model(kind)?,
        (None, None, None) => {
            anyhow::bail!("what to train: name a --model, a --config or a run to --resume")
        }
    };
    let mut config = config.with(&changes(args))?;
    if let Some(path) = &args.data {
        config.set_data(path)?;
    }
    let folder = match (&args.resume, &args.out) {
        (Some(folder), _) | (None, Some(folder)) => folder.clone(),
        (None, None) => PathBuf::from(format!("dsp-run-{}", config.model.kind().name())),
    };
    let begin = match (&args.resume, args.from_step) {
        (None, _) => Begin::Fresh,
        (Some(_), None) => Begin::Latest,
        (Some(_), Some(step)) => Begin::Step(step),
    };

    if !engine::shows(engine) {
        train::train(&config, &folder, begin, engine, Arc::new(|_| ()))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{}: {} steps under {} on {} into {}",
        config.model.kind().name(),
        config.training.steps,
        config.strategy,
        config.mesh,
        shown(&folder)
    );
    let watch = Arc::new(Watch::new());
    let told = watch.clone();
    let outcome = train::train(
        &config,
        &folder,
        begin,
        engine,
        Arc::new(move |event| told.tell(event)),
    );
    watch.finish();
    let outcome = outcome?;

    println!("{}", tabulate(&outcome).trim_fmt());
    for what in &outcome.shown {
        match what {
            Shown::Text(text) => println!("\n{text}\n"),
            Shown::File(path, words) => println!("{}: {words}", shown(path)),
        }
    }
    let page = folder.join("report.html");
    let text = train::render(&config, &metrics_of(&folder)?, &outcome)?;
    std::fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
    println!("report: {}", shown(&page));
    println!("{}", finding(&outcome, &folder));
    Ok(ExitCode::SUCCESS)
}

/// The values that stand on the command line.
fn changes(args: &TrainArgs) -> Vec<Change> {
    let change = |key: &str, value: toml::Value| Change {
        key: key.to_owned(),
        value,
    };
    let number = |number: u64| toml::Value::Integer(i64::try_from(number).unwrap_or(i64::MAX));
    let device = args.device.as_ref().map(ToString::to_string);
    let mesh = args.mesh.or(args.ranks.map(|sp| Mesh { sp, dp: 1 }));
    let mut changes = Vec::new();
    changes.extend((args.strategy.clone()).map(|name| change("strategy", name.into())));
    changes.extend((args.watch.clone()).map(|what| change("watch", what.into())));
    changes.extend(device.map(|device| change("device", device.into())));
    changes.extend(mesh.into_iter().flat_map(|mesh| {
        [("mesh.sp", mesh.sp), ("mesh.dp", mesh.dp)]
            .map(|(key, size)| change(key, number(size as u64)))
    }));
    changes.extend(
        args.steps
            .map(|steps| change("training.steps", number(steps))),
    );
    changes.extend(args.seed.map(|seed| change("training.seed", number(seed))));
    changes.extend(args.set.iter().cloned());
    changes
}

fn tabulate(outcome: &Outcome) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new());
    table.set_header(["", outcome.measure.unit, ""]);
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.add_row(["held out", &format!("{:.4}", outcome.error), ""]);
    for baseline in &outcome.baselines {
        let verdict = match outcome.error < baseline.error {
            true => "beaten",
            false => "NOT BEATEN",
        };
        table.add_row([baseline.name, &format!("{:.4}", baseline.error), verdict]);
    }
    table
}

fn finding(outcome: &Outcome, folder: &Path) -> String {
    let verdict = match outcome.beats_all() {
        true => "below all that was to be beaten",
        false => "not below all that was to be beaten",
    };
    format!(
        "held out {:.4} {}, {verdict}; go on with --resume {} --steps …",
        outcome.error,
        outcome.measure.unit,
        folder.display()
    )
}
