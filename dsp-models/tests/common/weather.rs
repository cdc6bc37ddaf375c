//! The axial weather model on ranks, with everything compared that a step produces.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::strategy::OutputLayout;
use dsp_core::{Group, LaunchError, Loss, SequenceParallel, Session};
use dsp_models::error::ModelError;
use dsp_models::weather::{Grid, Weather, WeatherConfig, loss, roles};

use super::{Account, Ending, LossFrom, Run, Values, collect, launch, named, sent, summed, whole};

/// What is differentiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The output times a given cotangent.
    Cotangent(LossFrom),
    /// The model's own loss, against the given fields as the next ones.
    Forecast,
}

/// A model with its inputs.
#[derive(Debug, Clone)]
pub(crate) struct WeatherCase {
    pub(crate) config: WeatherConfig,
    pub(crate) template: Weather,
    /// `[B, T, lat, lon, variables]`
    pub(crate) fields: Values,
    pub(crate) grid: Grid,
    /// As the fields: the cotangent, or the next fields.
    pub(crate) other: Values,
    pub(crate) end: End,
    pub(crate) output: OutputLayout,
    /// In how many parts switches go that follow a sub-layer.
    pub(crate) switch_parts: NonZeroUsize,
}

impl WeatherCase {
    pub(crate) fn run(
        self: &Arc<Self>,
        strategy: &Arc<dyn SequenceParallel>,
        ranks: usize,
    ) -> Result<Run, LaunchError> {
        let (case, strategy) = (self.clone(), strategy.clone());
        let ends = launch(ranks, move |group| case.run_rank(strategy.clone(), group))?;
        Ok(collect(ends))
    }

    fn run_rank(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
    ) -> Result<(BTreeMap<String, Values>, Account), ModelError> {
        let device = Device::flex().autodiff();
        let [batch, times, rows, columns] = self.grid.dims();
        let mut shape = self.config.shape(batch, times, rows, columns);
        shape.output = self.output;
        let session = Session::new(strategy, group, shape)?.switching_in(self.switch_parts);
        let placed = session.place(&self.template, roles(&self.config), &device);

        let fields: Tensor<5> = self.fields.tensor(&device, DType::F64).require_grad();
        let out = (placed.module).forward(fields.clone(), &self.grid, &session)?;
        let other = self.other.tensor::<5>(&device, DType::F64);
        let (mut ending, loss) = match self.end {
            End::Cotangent(from) => (Ending::of(&session, &out, &other, from)?, None),
            End::Forecast => {
                let loss = loss(&out, other, &self.grid)?;
                (of_loss(&session, loss.clone())?, Some(loss))
            }
        };
        let reduced = ending.reduce(&session, &placed)?;

        let mut found = named(&placed.module, &reduced);
        if let Some(loss) = loss {
            let sum = all_reduce_in(loss.detach(), Phase::Outside, session.group())?;
            found.insert("loss".to_owned(), Values::of(&sum.into_data()));
        }
        found.insert("out".to_owned(), whole(&session, out)?);
        let dx = summed(&fields, &ending.gradients, session.group())?;
        found.insert("dx".to_owned(), dx);
        Ok((found, ending.account))
    }
}

/// The backward pass of a loss on shards, and what it and the forward pass before it sent.
pub(crate) fn of_loss(session: &Session, loss: Tensor<1>) -> Result<Ending, ModelError> {
    let (ledger, expected) = (session.group().ledger(), session.expected_sends());
    let forward = sent(&ledger.take(), Phase::Forward);
    let gradients = session.backward(Loss::OfShard(loss))?;
    let backward = sent(&ledger.take(), Phase::Backward);
    let account = Account {
        forward: (forward, expected.forward),
        backward: (backward, expected.backward),
        gather: (0, 0),
        reduce: (0, 0),
    };
    Ok(Ending { gradients, account })
}
