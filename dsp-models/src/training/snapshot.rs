//! All that a training is at a step, in whole tensors: what a checkpoint holds.
//!
//! The tensors are under the models' public names and in their public layouts, moments under the names of their
//! parameters, so that other programs read them too and any mesh and strategy can go on from them. Everything
//! random follows from the seed and a number (see [`crate::random`]), so the generator's state is the seed, and the
//! place in the data is the number of steps.

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::adamw::Moments;
use super::store::{Loaded, StoreError};
use crate::weights::{OriginalNames, Weights, WeightsError, load, to_bytes};

/// The name of the file that says what the others are.
pub const MANIFEST: &str = "manifest.json";

const MODEL: &str = "model.safetensors";
const FIRST: &str = "adamw.first-moment.safetensors";
const SECOND: &str = "adamw.second-moment.safetensors";

/// The version of the files' form.
const FORMAT: u32 = 1;

/// A training at a step.
#[derive(Debug, Clone)]
pub struct Snapshot<M> {
    /// The weights.
    pub model: M,
    /// The optimizer's moments.
    pub moments: Moments<M>,
    /// The steps that were made.
    pub step: u64,
}

/// What is trained: whatever must be the same to go on from a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The model with its sizes, in words or as JSON.
    pub model: String,
    /// What it learns from, such as the digest of a file.
    pub data: String,
}

/// What a checkpoint says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of the files' form.
    pub format: u32,
    /// What was trained: the model with its sizes.
    pub subject: String,
    /// What it learns from, such as the digest of a file.
    pub data: String,
    /// The steps that were made.
    pub step: u64,
    /// Samples that were seen: the place in the data.
    pub samples: u64,
    /// The generator: every random number follows from it and the step.
    pub seed: u64,
}

/// Why a checkpoint does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// It cannot be read or written, or is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its manifest cannot be understood.
    #[error("{}: {MANIFEST}: {message}", place.display())]
    Manifest {
        /// The checkpoint.
        place: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// It is of another version.
    #[error("{}: its files have form {found}, and this program reads form {FORMAT}", place.display())]
    Format {
        /// The checkpoint.
        place: PathBuf,
        /// Its form.
        found: u32,
    },
    /// It is of another training.
    #[error("{}: {what} is {found} there and {expected} here: it is of another training", place.display())]
    Foreign {
        /// The checkpoint.
        place: PathBuf,
        /// What differs.
        what: &'static str,
        /// What it is there.
        found: String,
        /// What it is here.
        expected: String,
    },
    /// Its tensors are not the model's.
    #[error("{}: {file}: {source}", place.display())]
    Weights {
        /// The checkpoint.
        place: PathBuf,
        /// The file.
        file: &'static str,
        /// What is wrong.
        source: WeightsError,
    },
}

impl Manifest {
    /// Of a training after `step` steps of `batch` samples.
    pub fn new(subject: &Subject, step: u64, batch: usize, seed: u64) -> Self {
        Self {
            format: FORMAT,
            subject: subject.model.clone(),
            data: subject.data.clone(),
            step,
            samples: step * batch as u64,
            seed,
        }
    }

    /// The one of a checkpoint.
    ///
    /// # Errors
    /// [`SnapshotError`] if there is none, it cannot be understood, or it is of another version.
    pub fn of(loaded: &Loaded) -> Result<Self, SnapshotError> {
        let place = || loaded.place().to_owned();
        let wrong = |message: String| SnapshotError::Manifest {
            place: place(),
            message,
        };
        let bytes = loaded.get(MANIFEST)?;
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version =
            serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if version.format != FORMAT {
            return Err(SnapshotError::Format {
                place: place(),
                found: version.format,
            });
        }
        serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))
    }

    /// Holds this checkpoint's training against the one that is to go on from it.
    ///
    /// # Errors
    /// [`SnapshotError::Foreign`] for the first difference. Whatever else may differ: ranks, strategy, rates.
    pub fn check(&self, here: &Self, loaded: &Loaded) -> Result<(), SnapshotError> {
        let pair = |what, there: &dyn ToString, here: &dyn ToString| {
            (what, there.to_string(), here.to_string())
        };
        let pairs = [
            pair("the model", &self.subject, &here.subject),
            pair("the data", &self.data, &here.data),
            pair("the seed", &self.seed, &here.seed),
            pair("the step", &self.step, &here.step),
            // With another batch, other samples would have been seen by now.
            pair("the number of samples seen", &self.samples, &here.samples),
        ];
        match pairs.into_iter().find(|(_, there, here)| there != here) {
            Some((what, found, expected)) => Err(SnapshotError::Foreign {
                place: loaded.place().to_owned(),
                what,
                found,
                expected,
            }),
            None => Ok(()),
        }
    }
}

impl<M: Module + OriginalNames> Snapshot<M> {
    /// The files of a checkpoint: weights, moments, manifest.
    ///
    /// # Errors
    /// [`WeightsError`] if a tensor cannot be read back from its device.
    pub fn to_files(
        &self,
        manifest: &Manifest,
    ) -> Result<Vec<(&'static str, Vec<u8>)>, WeightsError> {
        let text = serde_json::to_vec_pretty(manifest).map_err(|error| WeightsError::File {
            place: MANIFEST.to_owned(),
            message: error.to_string(),
        })?;
        Ok(vec![
            (MODEL, to_bytes(&self.model)?),
            (FIRST, to_bytes(&self.moments.first)?),
            (SECOND, to_bytes(&self.moments.second)?),
            (MANIFEST, text),
        ])
    }

    /// The snapshot in a checkpoint of `template`'s model.
    ///
    /// # Errors
    /// [`SnapshotError`] if a file is missing or its tensors are not the model's.
    pub fn from_files(template: &M, loaded: &Loaded, dtype: DType) -> Result<Self, SnapshotError> {
        let read = |file: &'static str| {
            let weights = Weights::bytes(loaded.get(file)?.to_vec());
            load(template.clone(), &weights, dtype).map_err(|source| SnapshotError::Weights {
                place: loaded.place().to_owned(),
                file,
                source,
            })
        };
        Ok(Self {
            model: read(MODEL)?,
            moments: Moments {
                first: read(FIRST)?,
                second: read(SECOND)?,
            },
            step: Manifest::of(loaded)?.step,
        })
    }
}
