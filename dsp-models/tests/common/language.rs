//! A language model on ranks, with everything compared that a step produces.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{DType, Device};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::{Group, LaunchError, Mask, SequenceParallel, Session};
use dsp_models::error::ModelError;
use dsp_models::language::{CausalLm, LanguageConfig, Tokens, next_token_loss, roles};

use super::weather::of_loss;
use super::{Account, Run, Values, collect, launch, named, whole};

/// A model with its tokens.
#[derive(Debug, Clone)]
pub(crate) struct LanguageCase {
    pub(crate) config: LanguageConfig,
    pub(crate) template: CausalLm,
    pub(crate) tokens: Tokens,
    pub(crate) mask: Mask,
}

impl LanguageCase {
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
        let [batch, length] = self.tokens.dims();
        let shape = self.config.shape(batch, length, &self.mask);
        let session = Session::new(strategy, group, shape)?;
        let placed = session.place(&self.template, roles(&self.config), &device);
        let mut observed = Vec::new();
        let observe = |layers: usize, x: &dsp_core::Shard| observed.push((layers, x.clone()));
        let logits = placed
            .module
            .forward_observed(&self.tokens, &session, observe)?;
        let loss = next_token_loss(&logits, &self.tokens)?;
        let mut ending = of_loss(&session, loss.clone())?;
        let reduced = ending.reduce(&session, &placed)?;
        let mut found = named(&placed.module, &reduced);
        let sum = all_reduce_in(loss.detach(), Phase::Outside, session.group())?;
        found.insert("loss".to_owned(), Values::of(&sum.into_data()));
        found.insert("logits".to_owned(), whole(&session, logits)?);
        for (layers, x) in observed {
            found.insert(format!("after {layers} layers"), whole(&session, x)?);
        }
        Ok((found, ending.account))
    }

    pub(crate) fn cast(mut self, dtype: DType) -> Self {
        self.template = dsp_models::weights::cast(self.template, dtype);
        self
    }
}
