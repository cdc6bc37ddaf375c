//! `dsp train`: a model learns from real data, into a folder.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use comfy_table::{CellAlignment, Table, TableStyle};
use dsp_bench::train::{self, Outcome, Shown, Watch, metrics_of};
use dsp_core::Engine;

pub(crate) use dsp_bench::train::TrainArgs;

use super::{engine, say, shown};

/// Trains.
pub(crate) fn run(args: &TrainArgs, engine: &Engine) -> anyhow::Result<ExitCode> {
    let config = args.run()?;
    let (folder, begin) = (args.folder(&config), args.begin());

    if !engine::shows(engine) {
        train::train(&config, &folder, begin, engine, Arc::new(|_| ()))?;
        return Ok(ExitCode::SUCCESS);
    }
    say!(
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
    let page = train::render(&config, &metrics_of(&folder)?, &outcome)?;
    let report = train::write_report(&folder, &page)?;

    say!("{}", tabulate(&outcome).trim_fmt());
    for what in &outcome.shown {
        match what {
            Shown::Text(text) => say!("\n{text}\n"),
            Shown::File(path, words) => say!("{}: {words}", shown(path)),
        }
    }
    say!("report: {}", shown(&report));
    say!("{}", finding(&outcome, &folder));
    Ok(ExitCode::SUCCESS)
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
