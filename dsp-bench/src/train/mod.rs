//! `dsp train`: models learn from real data under any strategy, on a mesh of ranks, with checkpoints to go on from.
//!
//! | file | what it is |
//! |---|---|
//! | config | [`RunConfig`]: what is trained and how |
//! | task | a model with its data, what it is measured by, how it shows what it has learnt |
//! | language, video, vit, weather | the tasks |
//! | run | the ranks' loop: steps, evaluations, checkpoints |
//! | picture | frames and maps as PNG files |
//! | watch | what happens, on stderr: a bar on a terminal, lines elsewhere |
//! | page | the run as one HTML page: curves, what was to be beaten, what was learnt |

mod config;
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

pub use config::{Change, ChangeError, RunConfig, RunConfigError};
pub use page::{PageError, render};
pub use picture::PictureError;
pub use run::{Begin, Event, Line, Outcome, TrainError, config_of, metrics_of};
pub use task::{Baseline, Measure, Shown};
pub use watch::Watch;

use crate::scenario::ModelSizes;

/// Trains what a configuration says, into a folder. `watch` is told what happens.
///
/// # Errors
/// [`TrainError`]: whatever can be known before the first step is.
pub fn train(
    config: &RunConfig,
    folder: &Path,
    begin: Begin,
    watch: Arc<dyn Fn(Event<'_>) + Send + Sync>,
) -> Result<Outcome, TrainError> {
    match &config.model {
        ModelSizes::Language(sizes) => run::run(
            language::NextByte::new(sizes)?,
            config,
            folder,
            begin,
            watch,
        ),
        ModelSizes::Video(sizes) => {
            run::run(video::Velocity::new(sizes)?, config, folder, begin, watch)
        }
        ModelSizes::Vit(sizes) => {
            run::run(vit::WhichWayUp::new(sizes)?, config, folder, begin, watch)
        }
        ModelSizes::Weather(sizes) => run::run(
            weather::NextFields::new(sizes)?,
            config,
            folder,
            begin,
            watch,
        ),
    }
}
