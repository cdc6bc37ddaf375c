//! What is trained and how: a run, read from a TOML file and checked whole before any work.
//!
//! `runs/*.toml` are compiled in, one a model. A run writes the whole of its configuration beside its results, and
//! goes on from there.

use std::num::NonZeroUsize;
use std::path::Path;

use dsp_core::session::Watch;
use dsp_models::training::{Mesh, Subject, TrainingConfig, TrainingConfigError};
use serde::{Deserialize, Serialize};

use super::data::Data;
use super::vit::TURNS;
use crate::devices::DeviceChoice;
use crate::scenario::{MOST_SAMPLES, ModelKind, ModelSizes, Precision, Rules, ScenarioError};

/// The runs that are compiled in.
const BUILT_IN: [(ModelKind, &str); 6] = [
    (ModelKind::Video, include_str!("../../runs/video.toml")),
    (ModelKind::Lm, include_str!("../../runs/lm.toml")),
    (
        ModelKind::LinearLm,
        include_str!("../../runs/linear-lm.toml"),
    ),
    (ModelKind::Hybrid, include_str!("../../runs/hybrid.toml")),
    (ModelKind::Vit, include_str!("../../runs/vit.toml")),
    (ModelKind::Weather, include_str!("../../runs/weather.toml")),
];

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The strategy by name, a mixture's parts joined by `+`.
    pub strategy: String,
    /// The type of every float.
    pub dtype: Precision,
    /// Where the ranks compute. A run may go on elsewhere.
    #[serde(default)]
    pub device: DeviceChoice,
    /// What ranks look for in all that passes them, beside the loss: `finite` names the first rank and layer that have a
    /// NaN or an infinity.
    #[serde(default)]
    pub watch: Watch,
    /// In how many parts a switch of the residual stream goes after a sub-layer, one on its way while the next is
    /// computed.
    #[serde(default = "crate::scenario::one")]
    pub switch_parts: NonZeroUsize,
    /// Steps between two evaluations of the held-out samples; there is one at the end in any case.
    pub evaluate_every: u64,
    /// Steps between two checkpoints; there is one at the end in any case.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept, the last ones.
    pub keep: usize,
    /// How long a rank waits for another inside a collective.
    pub deadline_seconds: f64,
    /// The ranks.
    pub mesh: Mesh,
    /// Steps, samples, learning rate.
    pub training: TrainingConfig,
    /// The model and its data. (Tables stand after values.)
    pub model: ModelSizes,
}

/// Why a run cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunConfigError {
    /// The file cannot be read.
    #[error("{file}: cannot be read: {source}")]
    Unreadable {
        /// The file.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, a missing key, or a value of another type.
    #[error("{file}: {source}")]
    Malformed {
        /// The file.
        file: String,
        /// Line, column and what was expected.
        source: Box<toml::de::Error>,
    },
    /// A key that there is not.
    #[error("{file}: {key} is no key of a run; {table} has: {}", known.join(", "))]
    Unknown {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// Its table.
        table: &'static str,
        /// The keys that there are.
        known: Vec<String>,
    },
    /// A number of the training that breaks a rule.
    #[error("{file}: training.{source}")]
    Training {
        /// The file.
        file: String,
        /// The rule.
        source: TrainingConfigError,
    },
    /// Another value that breaks a rule.
    #[error(transparent)]
    Rule(#[from] ScenarioError),
    /// No run at all.
    #[error("what to train: name a --model, a --config or a run to --resume")]
    Unnamed,
    /// It cannot be written again.
    #[error("the configuration cannot be written: {0}")]
    Unwritable(toml::ser::Error),
}

impl RunConfig {
    /// The built-in run of a model.
    ///
    /// # Errors
    /// Never, unless a built-in run is wrong.
    pub fn of_model(kind: ModelKind) -> Result<Self, RunConfigError> {
        let built_in = BUILT_IN.iter().find(|(of, _)| *of == kind);
        Self::parse(kind.name(), built_in.map_or("", |(_, text)| text))
    }

    /// The run in a file. Its data are named relative to it.
    ///
    /// # Errors
    /// [`RunConfigError`] if the file cannot be read, is no run, or has a value that breaks a rule.
    pub fn read(path: &Path) -> Result<Self, RunConfigError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(unreadable(path))?;
        let mut run = Self::parse(&file, &text)?;
        let named = run.model.sizes_mut().file().clone();
        if let (Some(data), Some(folder)) = (named, path.parent()) {
            run.set_data(&folder.join(data))?;
        }
        Ok(run)
    }

    /// A run from TOML text; `file` names it in errors.
    ///
    /// # Errors
    /// As [`RunConfig::read`].
    pub fn parse(file: &str, text: &str) -> Result<Self, RunConfigError> {
        let malformed = |source| RunConfigError::Malformed {
            file: file.to_owned(),
            source: Box::new(source),
        };
        let run: Self = toml::from_str(text).map_err(malformed)?;
        // The library's configurations take what they know and leave the rest: a key that is not there when they are
        // written again was misspelt.
        let given: toml::Table = toml::from_str(text).map_err(malformed)?;
        // With all of them: what is not set is not written.
        let whole = TrainingConfig {
            microbatch: Some(1),
            clip_norm: Some(1.0),
            ..run.training.clone()
        };
        let known = toml::Table::try_from(&whole).unwrap_or_default();
        let training = given.get("training").and_then(toml::Value::as_table);
        let unknown = training.and_then(|table| table.keys().find(|key| !known.contains_key(*key)));
        if let Some(key) = unknown {
            return Err(RunConfigError::Unknown {
                file: file.to_owned(),
                key: key.clone(),
                table: "[training]",
                known: known.keys().cloned().collect(),
            });
        }
        run.check(file)?;
        Ok(run)
    }

    /// Checks every rule that needs no data; `file` names it in errors.
    ///
    /// # Errors
    /// [`RunConfigError`] for the first rule that is broken.
    pub fn check(&self, file: &str) -> Result<(), RunConfigError> {
        let rules = Rules { place: file };
        rules.at_least_one(&[
            ("evaluate_every", self.evaluate_every as usize),
            ("checkpoint_every", self.checkpoint_every as usize),
            ("keep", self.keep),
            ("mesh.sp", self.mesh.sp),
            ("mesh.dp", self.mesh.dp),
        ])?;
        rules.hold(
            self.mesh.check().is_ok(),
            "mesh",
            &format_args!("{}", self.mesh),
            format!("sp times dp must be at most {}", Mesh::MOST_RANKS),
        )?;
        rules.seconds("deadline_seconds", self.deadline_seconds)?;
        let checked = self.training.check();
        checked.map_err(|source| RunConfigError::Training {
            file: file.to_owned(),
            source,
        })?;
        rules.hold(
            self.training.batch >= self.mesh.dp,
            "training.batch",
            &self.training.batch,
            format!(
                "must be at least mesh.dp = {}: each replica has a sample of its own",
                self.mesh.dp
            ),
        )?;
        rules.within(MOST_SAMPLES, &[("training.batch", self.training.batch)])?;
        self.model.sizes().check(self.training.batch, &rules)?;
        match &self.model {
            ModelSizes::Vit(sizes) => {
                rules.hold(
                    sizes.height == sizes.width,
                    "model.width",
                    &sizes.width,
                    format!(
                        "must be model.height = {}: pictures are turned",
                        sizes.height
                    ),
                )?;
                rules.hold(
                    sizes.classes == TURNS,
                    "model.classes",
                    &sizes.classes,
                    format!("must be {TURNS}: the ways in which a picture is turned"),
                )?;
            }
            ModelSizes::Video(sizes) => rules.hold(
                sizes.text_lengths.is_none(),
                "model.text_lengths",
                &sizes.text_lengths,
                "has no place in a training: captions have all their tokens; leave the key out",
            )?,
            ModelSizes::Language(_) | ModelSizes::Weather(_) => {}
        }
        Ok(())
    }

    /// Another data file than the one that is named, or the built-in one. Its whole path is kept, so that the run
    /// can be gone on with from anywhere. Whether it is there is seen when it is read: it may have moved, and yet
    /// another one be named.
    ///
    /// # Errors
    /// [`RunConfigError::Unreadable`] if it is none, or is relative to a folder that is not there.
    pub fn set_data(&mut self, path: &Path) -> Result<(), RunConfigError> {
        let whole = std::path::absolute(path).map_err(unreadable(path))?;
        *self.model.sizes_mut().file() = Some(whole);
        Ok(())
    }

    /// The same with some values changed, each named by its key, as in `training.steps`. Data are named relative to the
    /// current folder, and kept as by [`set_data`](Self::set_data).
    ///
    /// # Errors
    /// [`RunConfigError`] if there is no such key, or a value breaks a rule.
    pub fn with(&self, changes: &[Change]) -> Result<Self, RunConfigError> {
        if changes.is_empty() {
            return Ok(self.clone());
        }
        let mut table = toml::Table::try_from(self).map_err(RunConfigError::Unwritable)?;
        for Change { key, value } in changes {
            let (parents, last) = match key.rsplit_once('.') {
                Some((parents, last)) => (parents.split('.').collect(), last),
                None => (vec![], key.as_str()),
            };
            let inner = parents.into_iter().try_fold(&mut table, |table, name| {
                table.get_mut(name).and_then(toml::Value::as_table_mut)
            });
            let inner = inner.ok_or_else(|| RunConfigError::Unknown {
                file: COMMAND_LINE.to_owned(),
                key: key.clone(),
                table: "a run",
                known: ["training", "model", "mesh"].map(str::to_owned).to_vec(),
            })?;
            inner.insert(last.to_owned(), value.clone());
        }
        let text = toml::to_string(&table).map_err(RunConfigError::Unwritable)?;
        let mut run = Self::parse(COMMAND_LINE, &text)?;
        if let Some(path) = run.model.sizes_mut().file().clone() {
            run.set_data(&path)?;
        }
        Ok(run)
    }

    /// The whole of it as TOML.
    ///
    /// # Errors
    /// [`RunConfigError::Unwritable`] never in practice.
    pub fn to_toml(&self) -> Result<String, RunConfigError> {
        toml::to_string(self).map_err(RunConfigError::Unwritable)
    }

    /// What a checkpoint must be of to be gone on from: the model with its sizes, and the data, wherever they are.
    pub(super) fn subject(&self, data: Option<&Data>) -> Subject {
        let mut model = self.model.clone();
        *model.sizes_mut().file() = None;
        Subject {
            // A model's sizes are numbers and names.
            model: serde_json::to_string(&model).unwrap_or_default(),
            data: Data::name(data),
        }
    }
}

/// What errors call a value that was given beside a file.
const COMMAND_LINE: &str = "the command line";

pub(super) fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> RunConfigError {
    let file = path.display().to_string();
    move |source| RunConfigError::Unreadable { file, source }
}

/// A value that is other than a run's file has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Its key, the table's before it, as in `training.steps`.
    pub key: String,
    /// What it is.
    pub value: toml::Value,
}

/// A text that describes no [`Change`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no change: it must be KEY=VALUE, as in training.learning_rate=0.001")]
pub struct ChangeError {
    /// The text.
    pub text: String,
}

impl std::str::FromStr for Change {
    type Err = ChangeError;

    /// The value is read as TOML, and what is no TOML is a text: quotes may be left out.
    fn from_str(text: &str) -> Result<Self, ChangeError> {
        let wrong = || ChangeError {
            text: text.to_owned(),
        };
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        let (key, value) = (key.trim(), value.trim());
        if key.is_empty() || value.is_empty() {
            return Err(wrong());
        }
        let read = toml::from_str::<toml::Table>(&format!("value = {value}"));
        let read = read.ok().and_then(|mut table| table.remove("value"));
        Ok(Self {
            key: key.to_owned(),
            value: read.unwrap_or_else(|| toml::Value::String(value.to_owned())),
        })
    }
}
