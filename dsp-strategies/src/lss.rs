//! LSS, the Long Short-Sequence transformer: queries stay, the keys and values of the split axis are gathered.
//!
//! ```text
//!        queries          keys and values
//!       ┌────────┐          ┌────────┐                    ┌────────┐
//!       │ rank 0 │          │ rank 0 │   one all-gather   │  all,  │     each rank attends with its queries
//!       ├────────┤          ├────────┤  ───────────────▶  │   on   │     to all keys; backward, one
//!       │ rank 1 │          │ rank 1 │   of both, fused   │ each   │     reduce-scatter of dk and dv
//!       └────────┘          └────────┘                    └────────┘
//! ```
//!
//! Attentions over the other axes are local. Cost of one over the split axis: rank `r` sends
//! `2·B·Hkv·d·(N−1)·l_r` forward and `2·B·Hkv·d·(L − l_r)` backward. The graph keeps the gathered keys and values,
//! `2·B·L·Hkv·d` on every rank, so that backward does not gather them again.
//!
//! Tables of positions along the split axis are sharded with it: their gradients need no reduction over the
//! sequence. The paper's double gradient averaging, over the ranks of a sequence and then over data-parallel
//! replicas, is [`Session::reduce`](dsp_core::Session::reduce) under
//! [`Session::with_replicas`](dsp_core::Session::with_replicas), as sums, for losses are over the global count.
//!
//! Requires: softmax attention.
//!
//! Wang et al., "Ultra-Long Sequence Distributed Transformer", arXiv:2311.02382.

use std::sync::Arc;

use burn::tensor::Tensor;
use dsp_core::attention::{
    Attended, Fold, Logsumexp, Problem, attend_local, backward, forward, positions, samples,
};
use dsp_core::blocks::{Blocks, DIMS};
use dsp_core::cost;
use dsp_core::error::Tracking;
use dsp_core::group::{Request, Step};
use dsp_core::ledger::{Collective, Phase};
use dsp_core::strategy::{
    AttentionScope, Form, Parameter, Placement, Role, StagePlan,
};
use dsp_core::{
    CommError, Error, Group, Layout, ModelShape, PlanError, SequenceParallel, Shard, Stage, vjp,
};

/// The LSS transformer's sequence parallelism.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lss;

impl SequenceParallel for Lss {
    fn name(&self) -> &'static str {
        "lss"
    }

    fn plan_stage(
        &self,
        model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        let local = StagePlan::local(residual, ranks);
        let Some((attention, axis, partition)) = stage.attends_split(residual) else {
            return Ok(local);
        };
        if attention.form != Form::Softmax {
            return Err(PlanError::Form {
                strategy: self.name().to_owned(),
                stage: stage.name.clone(),
                rule: "it gathers keys and values for softmax attention, and this one is linear, whose state is all \
                       that must move; use lasp or lasp2",
            });
        }
        let channels = 2 * attention.heads.key_value * attention.heads.dim;
        let others = residual.positions_beside(axis);
        let sends = |rank| cost::all_gather(model.batch, channels, others, partition, rank);
        Ok(local.sending(sends))
    }

    fn placement(&self, parameter: &Parameter<'_>, rank: usize, _ranks: usize) -> Placement {
        let input = &parameter.plan.input;
        match parameter.role {
            // A table with rows beyond the axis stays whole: nobody's positions would keep those.
            Role::Table { dim, axis }
                if input.is_split(axis) && parameter.shape[dim] == input.length(axis) =>
            {
                Placement::Sharded {
                    dim,
                    ranges: input.ranges(axis, rank),
                }
            }
            _ => Placement::Replicated,
        }
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let attention = scope.attention;
        let (query, key) = (qkv[0].layout().clone(), qkv[1].layout().clone());
        if !attention.axes.iter().any(|axis| key.is_split(axis)) {
            return attend_local(qkv, scope);
        }
        let rank = qkv[0].rank();
        let whole = attention.axes.iter().fold(key.clone(), Layout::with_whole);
        let gather = Gather::new(&qkv[1], &whole, scope.scope.group);
        let inputs = qkv.map(Shard::into_tensor);
        let queries = Fold::new(inputs[0].dims(), attention.axes);
        let keys = Fold::new(gather.gathered_dims(), attention.axes);
        let problem = Problem {
            mask: queries.mask(&attention.mask),
            query_positions: positions(&query, attention.axes, rank),
            key_positions: positions(&whole, attention.axes, rank),
            scale: attention.scale,
            heads: scope.heads.clone(),
            dropout: scope.dropout,
            samples: samples(&query, attention.axes, queries.batch(), rank),
        };
        let tracking = Tracking::of(&inputs);
        let [q, k, v] = inputs.each_ref().map(|x| x.clone().inner());
        let q = queries.fold(q, attention.heads.query);
        let held = attention.heads.key_value;
        let [k, v] = gather.there([k, v], tracking)?.map(|x| keys.fold(x, held));
        let (out, lse) = forward(q.clone(), k.clone(), v.clone(), &problem);
        let logsumexp = match scope.logsumexp {
            Logsumexp::Wanted => {
                let lse = queries.unfold(lse.clone().unsqueeze_dim(3));
                let lse = vjp::constant_like(lse, &inputs[0]);
                Some(Shard::new(lse, query.clone(), rank)?)
            }
            Logsumexp::Unwanted => None,
        };
        let output = queries.unfold(out.clone());
        let output = vjp::attach3(inputs, output, move |dout| {
            let dout = queries.fold(dout, problem.heads.query.len());
            let (q, k, v) = (q.clone(), k.clone(), v.clone());
            let (dq, dk, dv) = backward(q, k, v, out.clone(), lse.clone(), dout, &problem);
            let [dk, dv] = gather.back([dk, dv].map(|x| keys.unfold(x)))?;
            Ok::<_, CommError>([queries.unfold(dq), dk, dv])
        });
        Ok(Attended {
            output: Shard::new(output, query, rank)?,
            logsumexp,
        })
    }
}

/// The fused all-gather of keys and values, and its transpose.
struct Gather {
    split: Arc<Blocks>,
    whole: Arc<Blocks>,
    group: Group,
    /// The number of the all-gather.
    asked: u64,
}

impl Gather {
    fn new(key: &Shard, whole: &Layout, group: &Group) -> Self {
        let [batch, .., channels] = key.tensor().dims();
        let blocks =
            |layout: &Layout| Arc::new(layout.blocks(batch, 2 * channels, group.size()));
        Self {
            split: blocks(key.layout()),
            whole: blocks(whole),
            group: group.clone(),
            asked: group.next_sequence(),
        }
    }

    /// The local shape of the gathered keys.
    fn gathered_dims(&self) -> [usize; DIMS] {
        let mut dims = self.whole.local_shape(self.group.rank());
        dims[4] /= 2;
        dims
    }

    fn there(
        &self,
        [key, value]: [Tensor<DIMS>; 2],
        tracking: Tracking,
    ) -> Result<[Tensor<DIMS>; 2], CommError> {
        let both = self.group.exchange(Request {
            collective: Collective::AllGather,
            phase: Phase::Forward,
            tracking,
            tensor: Tensor::cat(vec![key, value], 4),
            before: self.split.clone(),
            after: self.whole.clone(),
            step: Step::First,
            answers: None,
        })?;
        Ok(halves(both))
    }

    fn back(&self, [key, value]: [Tensor<DIMS>; 2]) -> Result<[Tensor<DIMS>; 2], CommError> {
        let both = self.group.exchange(Request {
            collective: Collective::ReduceScatter,
            phase: Phase::Backward,
            tracking: Tracking::Untracked,
            tensor: Tensor::cat(vec![key, value], 4),
            before: self.whole.clone(),
            after: self.split.clone(),
            step: Step::First,
            answers: Some(self.asked),
        })?;
        Ok(halves(both))
    }
}

fn halves(both: Tensor<DIMS>) -> [Tensor<DIMS>; 2] {
    let channels = both.dims()[4] / 2;
    [0, channels].map(|start| both.clone().narrow(4, start, channels))
}
