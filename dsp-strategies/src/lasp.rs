//! LASP: linear attention over a split axis, whose state is handed from rank to rank.
//!
//! ```text
//!               state after 0        state after 1
//!    ┌────────┐   ───────▶ ┌────────┐   ───────▶ ┌────────┐      forward: rank r gets the state of all before it
//!    │ rank 0 │            │ rank 1 │            │ rank 2 │
//!    └────────┘ ◀───────   └────────┘ ◀───────   └────────┘      backward: the gradient of that state goes back
//! ```
//!
//! A rank computes its own positions while the state is on its way there, then hands it on. Attentions over the other
//! axes are local. Cost of one over the split axis: each rank but the last sends the state, `B·Hq·d²` elements, forward,
//! and each but the first as much backward, whatever the length; the N−1 hops wait for each other. The graph keeps
//! the states before each block of 64 positions.
//!
//! Requires: linear attention over the split axis, of which the ranks' positions are contiguous and in rank order.
//! Chunks may be uneven, and empty ones hand the state on.
//!
//! Sun et al., "Linear Attention Sequence Parallelism", arXiv:2404.02882.

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
        let on_softmax = "it hands on the state of linear attention, and softmax attention has none; \
                          mix it with a strategy for that, as in lasp+ring";
        let asks = (self.name(), on_softmax);
        let local = StagePlan::local(residual, ranks);
        Ok(match moved_state(asks, model, stage, residual, ranks)? {
            Some(state) => local.sending(|rank| cost::state_hops(state, ranks, rank)),
            None => local,
        })
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

/// The state's way from rank to rank: an exchange a hop, in which all take part and one pair moves something.
struct Hops {
    chunks: Chunks,
    group: Group,
    /// The number of the first hop.
    asked: u64,
}

/// A state on its way.
struct OnTheWay {
    /// This rank's own state.
    own: Tensor<4>,
    direction: Direction,
    /// The hops that have been started, from the first: the last of them ends at this rank, unless it is the first
    /// on the way.
    hops: Vec<InFlight>,
}

impl Hops {
    /// How many ranks the state has passed before it comes here.
    fn place(&self, direction: Direction) -> usize {
        self.rank_at(self.group.rank(), direction)
    }

    /// The rank at a place on the way.
    fn rank_at(&self, place: usize, direction: Direction) -> usize {
        match direction {
            Direction::Forward => place,
            Direction::Backward => self.group.size() - 1 - place,
        }
    }

    /// Starts the hop from one place on the way to the next. Only the rank that stands there sends `state`.
    fn hop(
        &self,
        place: usize,
        direction: Direction,
        state: &Tensor<4>,
    ) -> Result<InFlight, CommError> {
        let (from, to) = (
            self.rank_at(place, direction),
            self.rank_at(place + 1, direction),
        );
        let ranks = self.group.size();
        let [samples, heads, d, dv] = state.dims();
        let held = |holder: usize| {
            let one = |rank| if rank == holder { vec![0..1] } else { vec![] };
            let blocks = Blocks::replicated([1, samples, heads, d, dv], ranks);
            let held = DimBlocks::from_ranges(1, (0..ranks).map(one).collect());
            Arc::new(blocks.with_dim(0, held))
        };
        let (phase, tracking, answers) = match direction {
            Direction::Forward => (Phase::Forward, self.chunks.tracking, None),
            Direction::Backward => (Phase::Backward, Tracking::Untracked, Some(self.asked)),
        };
        let tensor = if self.group.rank() == from {
            state.clone().unsqueeze_dim(0)
        } else {
            let like = (&state.device(), state.dtype());
            Tensor::zeros([0, samples, heads, d, dv], like)
        };
        self.group.start(Request {
            collective: Collective::RingShift,
            phase,
            tracking,
            tensor,
            before: held(from),
            after: held(to),
            step: Step::First,
            answers,
        })
    }
}

impl Relay for Hops {
    type Started = OnTheWay;

    /// Starts all hops up to the one that ends here. The first rank on the way starts all: it sends what it has.
    fn start(&self, own: Tensor<4>, direction: Direction) -> Result<OnTheWay, CommError> {
        let count = match self.place(direction) {
            0 => self.group.size() - 1,
            place => place,
        };
        let hops = (0..count).map(|hop| self.hop(hop, direction, &own));
        Ok(OnTheWay {
            hops: hops.collect::<Result<_, _>>()?,
            own,
            direction,
        })
    }

    /// Waits for the state, and hands it on with this rank's own.
    fn finish(&self, started: OnTheWay) -> Result<Option<Tensor<4>>, CommError> {
        let OnTheWay {
            own,
            direction,
            hops,
        } = started;
        let started = hops.len();
        let mut last = None;
        for hop in hops {
            last = Some(hop.wait()?);
        }
        let is_first = self.place(direction) == 0;
        let arrived = last.filter(|_| !is_first);
        let arrived: Option<Tensor<4>> = arrived.map(|state| state.squeeze_dim(0));
        let onward = match &arrived {
            Some(arrived) => {
                let like = (&own.device(), own.dtype());
                let length = self.chunks.lengths[self.group.rank()];
                own + arrived.clone() * self.chunks.problem.passing(length, like)
            }
            None => own,
        };
        for hop in started..self.group.size() - 1 {
            self.hop(hop, direction, &onward)?.wait()?;
        }
        Ok(arrived)
    }
}
