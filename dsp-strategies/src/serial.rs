//! Serial: one rank holds everything and nothing moves. What every other strategy is held to.
//!
//! ```text
//!   rank 0   [ everything ]
//! ```
//!
//! Cost: nothing. Requires: one rank.

use dsp_core::cost::Elements;
use dsp_core::strategy::{Plan, StagePlan, check_softmax};
use dsp_core::{Layout, ModelShape, PlanError, SequenceParallel};

/// The serial strategy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Serial;

impl SequenceParallel for Serial {
    fn name(&self) -> &'static str {
        "serial"
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        check_softmax(self.name(), model)?;
        if ranks != 1 {
            return Err(PlanError::Ranks {
                strategy: self.name(),
                ranks,
                rule: "it is the model on one device; every other strategy runs on several",
            });
        }
        let whole = Layout::whole(model.lengths()?);
        let stage = StagePlan {
            residual: whole.clone(),
            inner: whole.clone(),
            sends: vec![Elements::default()],
            delegate: 0,
        };
        Ok(Plan {
            input: whole.clone(),
            stages: vec![stage; model.stages.len()],
            output: whole,
            output_sends: vec![Elements::default()],
        })
    }
}
