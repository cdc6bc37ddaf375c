//! LASP-2: linear attention over a split axis, whose ranks gather each other's states.
//!
//! ```text
//!    ┌────────┐            ┌────────────┐
//!    │ rank 0 │ ── M₀ ──▶  │ M₀  M₁  M₂ │     on every rank; rank r adds up what comes before it, each state
//!    ├────────┤            │            │     aged by the positions in between:  P_r = Σ_{s<r} λ^{b_r − e_s} M_s
//!    │ rank 1 │ ── M₁ ──▶  │ all-gather │
//!    ├────────┤            │            │     backward, the same of the states' gradients, from the other end
//!    │ rank 2 │ ── M₂ ──▶  │            │
//!    └────────┘            └────────────┘
//! ```
//!
//! While the states are gathered a rank computes its own positions. Attentions over the other axes are local. Cost of
//! one over the split axis: each rank sends its state, `B·Hq·d²` elements, to N−1 others, each way, whatever the length.
//! The graph keeps the states before each block of 64 positions.
//!
//! Requires: linear attention over the split axis, of which the ranks' positions are contiguous and in rank order.
//! Chunks may be uneven or empty.
//!
//! Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", arXiv:2502.07563; its
//! own code has no decay.

use std::sync::Arc;

use burn::tensor::Tensor;
use dsp_core::attention::chunks::{Chunks, Direction, Relay, attend_in_chunks, moved_state};
use dsp_core::attention::{Attended, attend_local};
use dsp_core::blocks::{Blocks, DimBlocks};
use dsp_core::cost;
use dsp_core::error::Tracking;
use dsp_core::group::{InFlight, Request, Step};
use dsp_core::ledger::{Collective, Phase};
use dsp_core::strategy::{AttentionScope, StagePlan};
use dsp_core::{
    CommError, Error, Group, Layout, ModelShape, Partition, PlanError, SequenceParallel, Shard,
    Stage,
};

/// Linear attention sequence parallelism by one all-gather.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lasp2;

impl SequenceParallel for Lasp2 {
    fn name(&self) -> &'static str {
        "lasp2"
    }

    fn plan_stage(
        &self,
        model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        let on_softmax = "it gathers the states of linear attention, and softmax attention has none; \
                          mix it with a strategy for that, as in lasp2+ring";
        let asks = (self.name(), on_softmax);
        let local = StagePlan::local(residual, ranks);
        Ok(match moved_state(asks, model, stage, residual, ranks)? {
            Some(state) => local.sending(|_| cost::state_gather(state, ranks)),
            None => local,
        })
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let layout = qkv[0].layout();
        if !scope.attention.axes.iter().any(|axis| layout.is_split(axis)) {
            return attend_local(qkv, scope);
        }
        let group = scope.scope.group;
        attend_in_chunks(qkv, scope, |chunks| Gather {
            asked: group.next_sequence(),
            group: group.clone(),
            chunks,
        })
    }
}

/// The all-gather of the states.
struct Gather {
    chunks: Chunks,
    group: Group,
    /// The number of the forward all-gather.
    asked: u64,
}

impl Relay for Gather {
    type Started = (InFlight, Direction);

    fn start(&self, own: Tensor<4>, direction: Direction) -> Result<Self::Started, CommError> {
        let ranks = self.group.size();
        let [samples, heads, d, dv] = own.dims();
        let after = Blocks::replicated([ranks, samples, heads, d, dv], ranks);
        let each = DimBlocks::split(&Partition::balanced(ranks, ranks));
        let (phase, tracking, answers) = match direction {
            Direction::Forward => (Phase::Forward, self.chunks.tracking, None),
            Direction::Backward => (Phase::Backward, Tracking::Untracked, Some(self.asked)),
        };
        let gather = self.group.start(Request {
            collective: Collective::AllGather,
            phase,
            tracking,
            tensor: own.unsqueeze_dim(0),
            before: Arc::new(after.clone().with_dim(0, each)),
            after: Arc::new(after),
            step: Step::First,
            answers,
        })?;
        Ok((gather, direction))
    }

    fn finish(
        &self,
        (gather, direction): Self::Started,
    ) -> Result<Option<Tensor<4>>, CommError> {
        let states = gather.wait()?;
        let (rank, ranks) = (self.group.rank(), self.group.size());
        let like = (&states.device(), states.dtype());
        let state = |rank: usize| states.clone().narrow(0, rank, 1).squeeze_dim::<4>(0);
        let others: Vec<usize> = match direction {
            Direction::Forward => (0..rank).collect(),
            Direction::Backward => (rank + 1..ranks).rev().collect(),
        };
        // From the farthest to the nearest: what was added up ages by each chunk that it passes.
        Ok(others.into_iter().fold(None, |sum, other| {
            let aged = |sum: Tensor<4>| {
                let passing = self.chunks.problem.passing(self.chunks.lengths[other], like);
                sum * passing
            };
            Some(match sum {
                Some(sum) => aged(sum) + state(other),
                None => state(other),
            })
        }))
    }
}
