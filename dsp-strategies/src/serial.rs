//! Serial: one rank holds everything and nothing moves. What every other strategy is held to.
//!
//! ```text
//!   rank 0   [ everything ]
//! ```
//!
//! Cost: nothing. Requires: one rank.

use dsp_core::strategy::StagePlan;
use dsp_core::{Layout, ModelShape, PlanError, SequenceParallel, Stage};

/// The serial strategy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Serial;

impl SequenceParallel for Serial {
    fn name(&self) -> &'static str {
        "serial"
    }

    fn residuals(&self, model: &ModelShape, ranks: usize) -> Result<Vec<Layout>, PlanError> {
        if ranks != 1 {
            return Err(PlanError::Ranks {
                strategy: self.name().to_owned(),
                ranks,
                rule: "it is the model on one device; every other strategy runs on several",
            });
        }
        Ok(vec![Layout::whole(model.lengths()?)])
    }

    fn plan_stage(
        &self,
        _model: &ModelShape,
        _stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        Ok(StagePlan::local(residual, ranks))
    }
}
