//! `dsp train`: models learn from real data under any strategy, on a mesh of ranks, with checkpoints to go on from.
//!
//! | file | what it is |
//! |---|---|
//! | config | [`RunConfig`]: what is trained and how |
//! | arguments | [`TrainArgs`]: what a command line says of it |
//! | data | the file that it learns from, if it names one, and that file's digest |
//! | task | a model with its data, what it is measured by, how it shows what it has learnt |
//! | language, video, vit, weather | the tasks |
//! | run | the ranks' loop: steps, evaluations, checkpoints |
//! | folder | where it writes: its lock, its configuration, its metrics |
//! | picture | frames and maps as PNG files |
//! | watch | what happens, on stderr: a bar on a terminal, lines elsewhere |
//! | page | the run as one HTML page: curves, what was to be beaten, what was learnt |

mod arguments;
mod config;
mod data;
mod folder;
mod language;
mod page;
mod picture;
mod run;
mod task;
mod video;
mod vit;
mod watch;
mod weather;

use std::path::Path;
use std::sync::Arc;

pub use arguments::TrainArgs;
pub use config::{Change, ChangeError, RunConfig, RunConfigError};
pub(crate) use folder::CHECKPOINTS;
pub use folder::{config_of, metrics_of, write_report};
pub use page::{PageError, render};
pub use picture::PictureError;
pub use run::{Begin, Event, Line, Outcome, TrainError};
pub use task::{Baseline, Measure, Shown};
pub use watch::Watch;

use data::Data;
use dsp_core::Engine;

use crate::scenario::ModelSizes;

/// Trains what a configuration says, into a folder, on an engine. `watch` is told what happens. Where ranks are
/// processes, all call this, and the one that holds rank 0 writes.
///
/// # Errors
/// [`TrainError`]: whatever can be known before the first step is.
pub fn train(
    config: &RunConfig,
    folder: &Path,
    begin: Begin,
    engine: &Engine,
    watch: Arc<dyn Fn(Event<'_>) + Send + Sync>,
) -> Result<Outcome, TrainError> {
    let data = Data::of(config)?;
    let subject = config.subject(data.as_ref());
    let run = run::Run {
        config,
        subject,
        folder,
        begin,
        engine,
        watch,
    };
    match &config.model {
        ModelSizes::Language(sizes) => run.of(language::NextByte::new(sizes, data)?),
        ModelSizes::Video(sizes) => run.of(video::Velocity::new(sizes, data)?),
        ModelSizes::Vit(sizes) => run.of(vit::WhichWayUp::new(sizes, data)?),
        ModelSizes::Weather(sizes) => run.of(weather::NextFields::new(sizes, data)?),
    }
}
