//! What a comparison runs: a model with its weights and inputs, and one step of it on a rank.
//!
//! One file a model: its sizes as a scenario says them, its rules, how it is described, and its `Workload`. The
//! rest of the program sees a [`Subject`] and knows no model.
//!
//! | file | kind | model | input |
//! |---|---|---|---|
//! | `video` | `video` | STDiT-3 | a clip |
//! | `weather` | `weather` | an axial transformer | fields on the globe |
//! | `language` | `language` | a causal language model: softmax, linear or hybrid | text |
//! | `vit` | `vit` | a vision transformer | frames of a clip |

mod language;
mod video;
mod vit;
mod weather;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};
use dsp_core::collective::all_reduce_in;
use dsp_core::gradients::reduced_parameters;
use dsp_core::ledger::Phase;
use dsp_core::overlap::Reduction;
use dsp_core::{CommError, Loss, ModelShape, Overlap, Placed, PlanError, Session, Shard};
use dsp_models::error::{ConfigError, ModelError};
use dsp_models::training::Reduce;
use dsp_models::vit::gather_logits;
use dsp_models::weights::{OriginalNames, WeightsError, named_gradients};

use crate::clip::ClipError;
use crate::fields::FieldsError;
use crate::scenario::{Passes, Rules, Scenario, ScenarioError};
use crate::text::TextError;
use crate::train::PictureError;

pub use language::LanguageSizes;
pub use video::VideoSizes;
pub use vit::VitSizes;
pub use weather::WeatherSizes;

/// Why a subject cannot be built or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubjectError {
    /// The clip cannot be used.
    #[error(transparent)]
    Clip(#[from] ClipError),
    /// The fields cannot be used.
    #[error(transparent)]
    Fields(#[from] FieldsError),
    /// The text cannot be used.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The sizes describe no model.
    #[error("the model: {0}")]
    Config(#[from] ConfigError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The strategy refuses the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The ranks failed.
    #[error(transparent)]
    Core(#[from] dsp_core::Error),
    /// A picture cannot be written.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// The device stopped working.
    #[error("the device failed: {0}")]
    Device(String),
    /// The gradients cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

impl From<CommError> for SubjectError {
    fn from(error: CommError) -> Self {
        Self::Core(error.into())
    }
}

impl From<dsp_core::layout::LayoutError> for SubjectError {
    fn from(error: dsp_core::layout::LayoutError) -> Self {
        Self::Core(error.into())
    }
}

/// What a scenario says of a model: a type for each kind.
pub trait Sizes {
    /// Checks every rule that needs no data.
    ///
    /// # Errors
    /// [`ScenarioError::Rule`], for the first rule that is broken.
    fn check(&self, batch: usize, rules: &Rules<'_>) -> Result<(), ScenarioError>;

    /// The file that the input is read from; none for the built-in one.
    fn file(&mut self) -> &mut Option<PathBuf>;

    /// The model and its input, in words.
    fn describe(&self, batch: usize) -> Description;

    /// Reads the input, and draws weights and whatever else is random from the scenario's seed.
    ///
    /// # Errors
    /// [`SubjectError`] if the input cannot be used or the sizes describe no model.
    fn subject(&self, scenario: &Scenario) -> Result<Arc<dyn Subject>, SubjectError>;
}

/// A model and its input, for tables and reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// What it is, as in "one video transformer".
    pub noun: &'static str,
    /// What it runs on, as in "the same clip".
    pub data: &'static str,
    /// The model and its sizes, in a line.
    pub model: String,
    /// The extents of its sequence, in tokens.
    pub tokens: String,
    /// What else there is to say: a term, and what it is here.
    pub facts: Vec<(&'static str, String)>,
}

/// A model with its weights and inputs, the same for every case of a comparison.
pub trait Subject: fmt::Debug + Send + Sync {
    /// What the model declares.
    fn shape(&self) -> ModelShape;

    /// This rank's part of it.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks have failed.
    fn on_rank<'a>(
        &'a self,
        session: &'a Session,
        pass: Pass,
    ) -> Result<Box<dyn OnRank + 'a>, SubjectError>;
}

/// What a model's file provides to be a [`Subject`].
trait Workload: fmt::Debug + Send + Sync {
    /// The model.
    type Module: Module + OriginalNames;

    /// What it declares.
    fn shape(&self) -> ModelShape;

    /// This rank's part of it, on the given device.
    fn place(&self, session: &Session, device: &Device) -> Placed<Self::Module>;

    /// The forward pass, to the loss.
    fn forward(
        &self,
        module: &Self::Module,
        pass: &Pass,
        session: &Session,
    ) -> Result<Run, SubjectError>;
}

/// How a pass is made: where, in which element type, and whether a backward pass follows.
#[derive(Debug, Clone)]
pub struct Pass {
    /// Where this rank computes, without autodiff.
    pub device: Device,
    /// The type of every float.
    pub dtype: DType,
    /// What is run.
    pub passes: Passes,
    /// When the parameters' gradients are summed.
    pub reduce: Reduce,
}

impl Pass {
    /// A tensor that takes no part in the backward pass.
    fn constant<const D: usize>(&self, data: &TensorData) -> Tensor<D> {
        Tensor::from_data(data.clone(), (&self.device(), self.dtype))
    }

    /// The input whose gradient is compared.
    fn input(&self, data: &TensorData) -> Tensor<5> {
        match self.passes {
            Passes::ForwardBackward => self.constant(data).require_grad(),
            Passes::Forward => self.constant(data),
        }
    }

    /// A forward pass alone keeps no graph.
    fn device(&self) -> Device {
        match self.passes {
            Passes::ForwardBackward => self.device.clone().autodiff(),
            Passes::Forward => self.device.clone(),
        }
    }
}

/// A forward pass that was made.
#[derive(Debug)]
pub struct Run {
    /// The input, where it has a gradient: whole on every rank.
    input: Option<Tensor<5>>,
    output: Output,
    loss: Loss,
}

/// What a forward pass gives.
#[derive(Debug)]
enum Output {
    /// A part of it on each rank.
    Shard(Shard),
    /// The logits of classes, on the rank that has the class token.
    Classes(Tensor<5>),
}

/// The gradients of a step on this rank: of the parameters, after the sum over the ranks, and this rank's
/// part of the input's.
#[derive(Debug)]
pub struct StepGradients {
    parameters: GradientsParams,
    input: Option<Tensor<5>>,
}

/// The gradients of a step, whole.
#[derive(Debug)]
pub struct Gradients {
    /// Of the input; none if it is made of tokens, which have none.
    pub input: Option<TensorData>,
    /// Of each parameter, by its original name.
    pub parameters: BTreeMap<String, TensorData>,
}

/// A subject on a rank.
pub trait OnRank {
    /// The forward pass, to the loss.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    fn forward(&self) -> Result<Run, SubjectError>;

    /// The backward pass, and the sum of the parameters' gradients over the ranks.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    fn backward(&self, run: &Run) -> Result<StepGradients, SubjectError>;

    /// The output, whole.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    fn output(&self, run: &Run) -> Result<TensorData, SubjectError>;

    /// The gradients, whole.
    ///
    /// # Errors
    /// [`SubjectError`] if the ranks fail.
    fn whole(&self, gradients: StepGradients) -> Result<Gradients, SubjectError>;

    /// How many numbers this rank sends for the sum of the parameters' gradients, by formula.
    fn expected_reduce(&self) -> u64;
}

/// A [`Workload`] on a rank.
struct Placement<'a, W: Workload> {
    workload: &'a W,
    session: &'a Session,
    pass: Pass,
    placed: Placed<W::Module>,
    overlap: Option<Overlap>,
    /// Of the pass that is under way.
    reduction: RefCell<Option<Reduction>>,
}

impl<W: Workload> Subject for W {
    fn shape(&self) -> ModelShape {
        Workload::shape(self)
    }

    fn on_rank<'a>(
        &'a self,
        session: &'a Session,
        pass: Pass,
    ) -> Result<Box<dyn OnRank + 'a>, SubjectError> {
        let overlap = match pass.reduce {
            Reduce::AtOnce => None,
            Reduce::Overlapped => Some(Overlap::new(session, Reduce::BUCKET)?),
        };
        Ok(Box::new(Placement {
            workload: self,
            session,
            placed: self.place(session, &pass.device.clone().autodiff()),
            pass,
            overlap,
            reduction: RefCell::new(None),
        }))
    }
}

impl<W: Workload> OnRank for Placement<'_, W> {
    fn forward(&self) -> Result<Run, SubjectError> {
        let _span = tracing::info_span!("forward").entered();
        let module = match (self.pass.passes, &self.overlap) {
            (Passes::Forward, _) => self.placed.module.valid(),
            (Passes::ForwardBackward, None) => self.placed.module.clone(),
            (Passes::ForwardBackward, Some(overlap)) => {
                let (module, reduction) = overlap.begin(&self.placed, GradientsParams::new());
                self.reduction.replace(Some(reduction));
                module
            }
        };
        self.workload.forward(&module, &self.pass, self.session)
    }

    fn backward(&self, run: &Run) -> Result<StepGradients, SubjectError> {
        let mut gradients = {
            let _span = tracing::info_span!("backward").entered();
            self.session.backward(run.loss.clone())?
        };
        let _span = tracing::info_span!("reduce gradients").entered();
        let input = run.input.as_ref().map(|input| {
            let zeros = || input.clone().inner().zeros_like();
            input.grad(&gradients).unwrap_or_else(zeros)
        });
        let parameters = match self.reduction.take() {
            Some(reduction) => reduction.finish(&mut gradients, &self.placed)?,
            None => self.session.reduce(&mut gradients, &self.placed)?,
        };
        Ok(StepGradients { parameters, input })
    }

    fn output(&self, run: &Run) -> Result<TensorData, SubjectError> {
        match &run.output {
            Output::Shard(output) => {
                let output = output.clone().detach();
                Ok(self.session.gather(output)?.into_data())
            }
            Output::Classes(logits) => {
                let logits = gather_logits(logits.clone(), self.session)?;
                Ok(logits.into_data())
            }
        }
    }

    fn whole(&self, gradients: StepGradients) -> Result<Gradients, SubjectError> {
        let input = match gradients.input {
            Some(part) => {
                let sum = all_reduce_in(part, Phase::Outside, self.session.group())?;
                Some(sum.into_data())
            }
            None => None,
        };
        let parameters = self.session.whole(gradients.parameters, &self.placed)?;
        Ok(Gradients {
            input,
            parameters: named_gradients(&self.placed.module, &parameters)?,
        })
    }

    fn expected_reduce(&self) -> u64 {
        match &self.overlap {
            Some(overlap) => overlap.expected_sends(&self.placed),
            None => (self.session).expected_reduce(reduced_parameters(&self.placed)),
        }
    }
}
