//! LASP: linear attention over a split axis, whose state is handed from rank to rank.
//!
//! ```text
//!               state after 0        state after 1
//!    ┌────────┐   ───────▶ ┌────────┐   ───────▶ ┌────────┐      forward: rank r gets the state of all before it
//!    │ rank 0 │            │ rank 1 │            │ rank 2 │
//!    └────────┘ ◀───────   └────────┘ ◀───────   └────────┘      backward: the gradient of that state goes back
//! ```
//!
//! Attentions over the other axes are local. Cost of one over the split axis: each rank but the last sends the state,
//! `B·Hq·d²` elements, forward, and each but the first as much backward, whatever the length; the N−1 hops wait
//! for each other. The graph keeps the states before each block of 64 positions.
//!
//! Requires: linear attention over the split axis, of which the ranks' positions are contiguous and in rank order.
//! Chunks may be uneven, and empty ones hand the state on.
//!
//! Sun et al., "Linear Attention Sequence Parallelism", arXiv:2404.02882.

use std::sync::Arc;

use burn::tensor::Tensor;
use dsp_core::attention::chunks::{
    Chunks, Direction, Relay, attend_in_chunks, in_rank_order,
};
use dsp_core::attention::{Attended, attend_local};
use dsp_core::blocks::{Blocks, DimBlocks};
use dsp_core::cost;
use dsp_core::error::Tracking;
use dsp_core::group::{Request, Step};
use dsp_core::ledger::{Collective, Phase};
use dsp_core::strategy::{AttentionScope, Form, StageKind, StagePlan};
use dsp_core::{
    CommError, Error, Group, Layout, ModelShape, PlanError, SequenceParallel, Shard, Stage,
};

/// Linear attention sequence parallelism, hop by hop.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lasp;

impl SequenceParallel for Lasp {
    fn name(&self) -> &'static str {
        "lasp"
    }

    fn plan_stage(
        &self,
        model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        let local = StagePlan::local(residual, ranks);
        let (StageKind::Attention(attention), Some((axis, _))) =
            (&stage.kind, residual.split_axis())
        else {
            return Ok(local);
        };
        if !attention.axes.contains(axis) {
            return Ok(local);
        }
        if attention.form == Form::Softmax {
            return Err(PlanError::Form {
                strategy: self.name().to_owned(),
                stage: stage.name.clone(),
                rule: "it hands on the state of linear attention, and softmax attention has none; mix it with a \
                       strategy for that, as in lasp+ring",
            });
        }
        if !in_rank_order(residual, attention.axes, ranks) {
            return Err(PlanError::Residual {
                strategy: self.name().to_owned(),
                stage: stage.name.clone(),
                residual: Box::new(residual.clone()),
                rule: "a state runs through contiguous positions in rank order; split the outermost attended axis \
                       in plain blocks",
            });
        }
        let state = attention.state_elements(model.batch, residual.lengths());
        Ok(local.sending(|rank| cost::state_hops(state, ranks, rank)))
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let layout = qkv[0].layout();
        if !scope.attention.axes.iter().any(|axis| layout.is_split(axis)) {
            return attend_local(qkv, scope);
        }
        let group = scope.scope.group;
        attend_in_chunks(qkv, scope, |chunks| Hops {
            asked: group.next_sequence(),
            group: group.clone(),
            chunks,
        })
    }
}

/// The state's way from rank to rank.
struct Hops {
    chunks: Chunks,
    group: Group,
    /// The number of the first hop.
    asked: u64,
}

impl Relay for Hops {
    type Started = Tensor<4>;

    fn start(&self, own: Tensor<4>, direction: Direction) -> Result<Tensor<4>, CommError> {
        let (rank, ranks) = (self.group.rank(), self.group.size());
        // Hop `i` leads from the i-th rank on the way to the next.
        let on_the_way = |index: usize| match direction {
            Direction::Forward => index,
            Direction::Backward => ranks - 1 - index,
        };
        let [samples, heads, d, dv] = own.dims();
        let like = (&own.device(), own.dtype());
        let mut arrived = Tensor::<4>::zeros(own.dims(), like);
        for hop in 0..ranks - 1 {
            let (from, to) = (on_the_way(hop), on_the_way(hop + 1));
            let tensor = if rank == from {
                let passing = self.chunks.problem.passing(self.chunks.lengths[rank], like);
                let after = own.clone() + arrived.clone() * passing;
                after.unsqueeze_dim(0)
            } else {
                Tensor::zeros([0, samples, heads, d, dv], like)
            };
            let held = |holder: usize| {
                let one = |rank| if rank == holder { vec![0..1] } else { vec![] };
                let blocks = Blocks::replicated([1, samples, heads, d, dv], ranks);
                let held = DimBlocks::from_ranges(1, (0..ranks).map(one).collect());
                Arc::new(blocks.with_dim(0, held))
            };
            let (phase, tracking, answers) = match direction {
                Direction::Forward => (Phase::Forward, self.chunks.tracking, None),
                Direction::Backward => {
                    (Phase::Backward, Tracking::Untracked, Some(self.asked))
                }
            };
            let state = self.group.exchange(Request {
                collective: Collective::RingShift,
                phase,
                tracking,
                tensor,
                before: held(from),
                after: held(to),
                step: Step::First,
                answers,
            })?;
            if rank == to {
                arrived = state.squeeze_dim(0);
            }
        }
        Ok(arrived)
    }

    fn finish(&self, arrived: Tensor<4>) -> Result<Tensor<4>, CommError> {
        Ok(arrived)
    }
}
