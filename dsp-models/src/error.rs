//! What can go wrong in a model, before and while it runs.

use dsp_core::error::CommError;
use dsp_core::fused::UnknownClass;
use dsp_core::layout::LayoutError;
use dsp_core::session::StageError;
use dsp_core::strategy::PlanError;

/// A configuration that does not describe a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A number that must not be 0.
    #[error("{field} is 0: it must be at least 1")]
    Zero {
        /// The configuration's field.
        field: &'static str,
    },
    /// A number that does not divide another.
    #[error("{field} is {value}, which must be a multiple of {divisor} ({rule})")]
    Multiple {
        /// The configuration's field.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What it must be a multiple of.
        divisor: usize,
        /// Why.
        rule: &'static str,
    },
}

/// Why a model did not run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The ranks, the layouts or the stages.
    #[error(transparent)]
    Core(#[from] dsp_core::Error),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A target of a loss.
    #[error(transparent)]
    Target(#[from] UnknownClass),
    /// An input whose shape does not fit.
    #[error("{what} has shape {got:?}, where {rule}")]
    Shape {
        /// Which input.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What was expected.
        rule: String,
    },
}

impl From<LayoutError> for ModelError {
    fn from(error: LayoutError) -> Self {
        Self::Core(error.into())
    }
}

impl From<StageError> for ModelError {
    fn from(error: StageError) -> Self {
        Self::Core(error.into())
    }
}

impl From<PlanError> for ModelError {
    fn from(error: PlanError) -> Self {
        Self::Core(error.into())
    }
}

impl From<CommError> for ModelError {
    fn from(error: CommError) -> Self {
        Self::Core(error.into())
    }
}
