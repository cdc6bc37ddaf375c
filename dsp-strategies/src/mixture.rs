//! A mixture of strategies: each stage runs with the first of them that can run it.
//!
//! ```text
//!   "lasp2+ring"           linear    softmax    linear    softmax
//!     lasp2                  ■                     ■
//!     ring                              ■                     ■
//!
//!   "dsp+ulysses"          time      space      time × space
//!     dsp                    ■         ■
//!     ulysses                                        ■
//! ```
//!
//! One part, the first that can, lays out the residual stream, planning the whole model with the other parts'
//! stages left out; each of those is then planned where the residual stream is by then. Cost: the sum of the
//! parts'. Requires: for each stage, a part that can run it where the residual stream is.

use std::sync::Arc;

use burn::tensor::Tensor;
use dsp_core::attention::{Attended, HeadRange, Heads};
use dsp_core::strategy::{
    AttentionScope, Parameter, PartPlan, Placement, Plan, Scope, StageKind, StagePlan,
};
use dsp_core::{Error, Layout, ModelShape, PlanError, SequenceParallel, Shard, Stage};

/// Strategies that share a model's stages among them.
#[derive(Debug, Clone)]
pub struct Mixture {
    name: String,
    parts: Vec<Arc<dyn SequenceParallel>>,
}

impl Mixture {
    /// A mixture in which `first` has the first choice of the stages, then `others` in their order.
    pub fn new(
        first: Arc<dyn SequenceParallel>,
        others: impl IntoIterator<Item = Arc<dyn SequenceParallel>>,
    ) -> Self {
        let parts: Vec<_> = std::iter::once(first).chain(others).collect();
        let names: Vec<&str> = parts.iter().map(|part| part.name()).collect();
        Self {
            name: names.join("+"),
            parts,
        }
    }

    /// The first part, in the given order, that has a plan of a stage.
    fn first_of<P>(
        &self,
        order: impl Iterator<Item = usize>,
        stage: &Stage,
        plan: impl Fn(&dyn SequenceParallel) -> Result<P, PlanError>,
    ) -> Result<(usize, P), PlanError> {
        let mut refusals = vec![];
        for index in order {
            match plan(&*self.parts[index]) {
                Ok(plan) => return Ok((index, plan)),
                Err(refusal) => refusals.push(refusal),
            }
        }
        Err(PlanError::NoPart {
            mixture: self.name.clone(),
            stage: stage.name.clone(),
            refusals,
        })
    }

    /// Which part has the first choice of each stage: the first that could run a model of it alone.
    fn choose(&self, model: &ModelShape, ranks: usize) -> Result<Vec<usize>, PlanError> {
        let of_stage = |stage: &Stage| {
            let alone = ModelShape {
                stages: vec![stage.clone()],
                ..model.clone()
            };
            let order = 0..self.parts.len();
            let (index, _) = self.first_of(order, stage, |part| part.plan(&alone, ranks))?;
            Ok(index)
        };
        model.stages.iter().map(of_stage).collect()
    }

    /// The plan in which the part `leader` lays out the residual stream.
    fn plan_led_by(
        &self,
        leader: usize,
        chosen: &[usize],
        model: &ModelShape,
        ranks: usize,
    ) -> Result<Plan, PlanError> {
        let mut led = model.clone();
        for (stage, &index) in led.stages.iter_mut().zip(chosen) {
            if index != leader {
                // A position-wise stage minds no layout.
                stage.kind = StageKind::FeedForward { inner: 0 };
            }
        }
        let mut plan = self.parts[leader].plan(&led, ranks)?;
        let stages = model.stages.iter().zip(chosen).zip(&mut plan.stages);
        for ((stage, &index), planned) in stages {
            let (index, own) = if index == leader {
                (index, planned.clone())
            } else {
                let (index, part) = self.plan_other(index, model, stage, planned, ranks)?;
                let arranges = planned.arranges.clone();
                (index, StagePlan { arranges, ..part })
            };
            *planned = StagePlan {
                part: Some(Arc::new(PartPlan {
                    index,
                    plan: own.clone(),
                })),
                ..own
            };
        }
        Ok(plan)
    }

    /// A stage that is not the leader's, by the part that has the first choice of it, or else by any that can run
    /// it where the residual stream is.
    fn plan_other(
        &self,
        chosen: usize,
        model: &ModelShape,
        stage: &Stage,
        led: &StagePlan,
        ranks: usize,
    ) -> Result<(usize, StagePlan), PlanError> {
        let others = (0..self.parts.len()).filter(|&index| index != chosen);
        self.first_of(std::iter::once(chosen).chain(others), stage, |part| {
            part.plan_stage(model, stage, &led.residual, ranks)
        })
    }

    fn part<'a>(&'a self, plan: &'a StagePlan) -> (&'a dyn SequenceParallel, &'a StagePlan) {
        match &plan.part {
            Some(part) => (&*self.parts[part.index], &part.plan),
            None => (&*self.parts[0], plan),
        }
    }
}

impl SequenceParallel for Mixture {
    fn name(&self) -> &str {
        &self.name
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        model.check_on(ranks)?;
        let chosen = self.choose(model, ranks)?;
        let mut refusals = vec![];
        for leader in 0..self.parts.len() {
            match self.plan_led_by(leader, &chosen, model, ranks) {
                Ok(plan) => return Ok(plan),
                Err(refusal) => refusals.push(refusal),
            }
        }
        Err(PlanError::NoLeader {
            mixture: self.name.clone(),
            refusals,
        })
    }

    fn plan_stage(
        &self,
        model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        let led = StagePlan::local(residual, ranks);
        let (index, own) = self.plan_other(0, model, stage, &led, ranks)?;
        Ok(StagePlan {
            part: Some(Arc::new(PartPlan {
                index,
                plan: own.clone(),
            })),
            ..own
        })
    }

    fn placement(&self, parameter: &Parameter<'_>, rank: usize, ranks: usize) -> Placement {
        // A parameter of no stage is replicated: parts that would place it otherwise may not agree.
        let Some(stage) = parameter.stage else {
            return Placement::Replicated;
        };
        let (part, stage) = self.part(stage);
        let parameter = Parameter {
            stage: Some(stage),
            ..*parameter
        };
        part.placement(&parameter, rank, ranks)
    }

    fn held_heads(&self, heads: Heads, plan: &StagePlan, rank: usize, ranks: usize) -> HeadRange {
        let (part, plan) = self.part(plan);
        part.held_heads(heads, plan, rank, ranks)
    }

    fn arrange(&self, x: Shard, scope: &Scope<'_>) -> Result<Shard, Error> {
        let (part, plan) = self.part(scope.plan);
        part.arrange(x, &Scope { plan, ..*scope })
    }

    fn enter(&self, x: Shard, scope: &Scope<'_>) -> Result<Shard, Error> {
        let (part, plan) = self.part(scope.plan);
        part.enter(x, &Scope { plan, ..*scope })
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let (part, plan) = self.part(scope.scope.plan);
        let within = Scope {
            plan,
            ..scope.scope
        };
        part.attend(
            qkv,
            &AttentionScope {
                scope: within,
                ..*scope
            },
        )
    }

    fn join(&self, x: Shard, scope: &AttentionScope<'_>) -> Result<Shard, Error> {
        let (part, plan) = self.part(scope.scope.plan);
        let within = Scope {
            plan,
            ..scope.scope
        };
        part.join(
            x,
            &AttentionScope {
                scope: within,
                ..*scope
            },
        )
    }

    fn leave(&self, x: Shard, bias: Option<Tensor<1>>, scope: &Scope<'_>) -> Result<Shard, Error> {
        let (part, plan) = self.part(scope.plan);
        part.leave(x, bias, &Scope { plan, ..*scope })
    }
}
