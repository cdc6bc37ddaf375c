//! What is trained: a model, what it learns from, what it is measured by, and how it shows what it has learnt.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use dsp_core::strategy::Part;
use dsp_core::{Loss, ModelShape, Session};
use dsp_models::weights::OriginalNames;

use crate::subject::SubjectError;

/// Samples of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Samples {
    /// Some of the endless sequence of samples that a seed draws from what there is to learn from.
    Drawn {
        /// The run's seed.
        seed: u64,
        /// Their numbers.
        numbers: Range<u64>,
    },
    /// Some of those that are held out: never learnt from, and always the same.
    HeldOut(Range<usize>),
}

/// An error that does not count on having learnt anything.
#[derive(Debug, Clone, PartialEq)]
pub struct Baseline {
    /// What it is the error of.
    pub name: &'static str,
    /// The error on the held-out samples, in the task's unit.
    pub error: f64,
}

/// What a task's error is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measure {
    /// In words, as in "bits a byte".
    pub unit: &'static str,
    /// By what the mean of a task's errors is multiplied for it.
    pub factor: f64,
}

/// Where samples are computed: the float type, and the device, with a graph for training or without.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// The device.
    pub device: Device,
    /// The type of every float.
    pub dtype: DType,
}

/// A shown result: a file that was written, or some text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// A file, and what is in it.
    File(PathBuf, String),
    /// Text, as it was generated.
    Text(String),
}

/// A model with its data. Everything in it is the same on every rank.
pub(super) trait Task: fmt::Debug + Send + Sync + 'static {
    /// The model.
    type Module: OriginalNames + Sync;

    /// The model's first weights.
    ///
    /// # Errors
    /// [`SubjectError`] if the sizes describe no model.
    fn template(&self, seed: u64) -> Result<Self::Module, SubjectError>;

    /// What the model declares for so many samples.
    fn shape(&self, samples: usize) -> ModelShape;

    /// The role of the parameter at a path.
    fn role(&self, path: &str) -> Part;

    /// Tokens of a sample, for the speed that is shown.
    fn tokens(&self) -> usize;

    /// How many samples are held out.
    fn held_out(&self) -> usize;

    /// What the error is.
    fn measure(&self) -> Measure;

    /// Errors to beat, on the held-out samples.
    ///
    /// # Errors
    /// [`SubjectError`] if the samples cannot be made.
    fn baselines(&self) -> Result<Vec<Baseline>, SubjectError>;

    /// The loss: the mean over the samples.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    fn loss(
        &self,
        module: &Self::Module,
        samples: &Samples,
        place: &Place,
        session: &Session,
    ) -> Result<Loss, SubjectError>;

    /// This rank's terms of the error, the mean over the samples: the ranks' terms add up to it. The loss, unless
    /// the model is to be measured by something else.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    fn error(
        &self,
        module: &Self::Module,
        samples: &Samples,
        place: &Place,
        session: &Session,
    ) -> Result<f64, SubjectError> {
        Ok(match self.loss(module, samples, place, session)? {
            Loss::OfShard(loss) => loss.into_scalar::<f64>(),
            Loss::OfWhole(loss) => loss.into_scalar::<f64>() / session.group().size() as f64,
        })
    }

    /// Shows what was learnt: every rank takes part, the first one writes into `folder`.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail or a file cannot be written.
    fn show(&self, module: &Self::Module, stage: &Stage<'_>) -> Result<Vec<Shown>, SubjectError>;
}

/// Where a task shows what it has learnt.
#[derive(Debug)]
pub(super) struct Stage<'a> {
    /// Where it is computed.
    pub place: Place,
    /// A session for one sample, with the replicas, if there are any.
    pub session: &'a Session,
    /// The run's seed.
    pub seed: u64,
    /// Where files go.
    pub folder: &'a Path,
}

impl Stage<'_> {
    /// Whether this rank writes: the first one of the first replica.
    pub(super) fn writes(&self) -> bool {
        let replica = self.session.replicas().map_or(0, dsp_core::Group::rank);
        self.session.group().rank() == 0 && replica == 0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use burn::tensor::DType;
    use dsp_core::Group;

    use super::*;

    /// That the held-out error of a model which says the first baseline is that baseline's, in passes of bfloat16.
    pub(in crate::train) fn assert_first_baseline<T: Task>(task: &T, module: &T::Module) {
        let samples = task.held_out();
        let serial = Arc::new(dsp_strategies::Serial);
        let session = Session::new(serial, Group::alone(), task.shape(samples)).unwrap();
        let place = Place {
            device: Device::flex(),
            dtype: DType::BF16,
        };
        let samples = Samples::HeldOut(0..samples);
        let found = task.error(module, &samples, &place, &session).unwrap();
        let expected = task.baselines().unwrap()[0].error;
        assert!(
            (found - expected).abs() < 2e-6 * expected,
            "{found} instead of {expected}"
        );
    }
}
