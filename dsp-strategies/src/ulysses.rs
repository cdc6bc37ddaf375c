//! DeepSpeed-Ulysses: one axis stays split; in its attention, heads are exchanged for sequence.
//!
//! ```text
//!            heads                              heads
//!          h0 h1 h2 h3                       h0 h1 │ h2 h3
//!        ┌─────────────┐   all-to-all of    ┌──────┼──────┐   all-to-all     ┌─────────────┐
//!    seq │   rank 0    │   q, k and v       │ rank │ rank │   of the output  │   rank 0    │
//!        ├─────────────┤  ──────────────▶   │  0   │  1   │  ─────────────▶  ├─────────────┤
//!        │   rank 1    │                    │      │      │                  │   rank 1    │
//!        └─────────────┘                    └──────┴──────┘                  └─────────────┘
//! ```
//!
//! Attentions over the other axes are local. Cost of one over the split axis: rank `r` sends
//! `B·d·[l_r(Hq − q_r) + 2·l_r·Σ_{p≠r} kv_p + q_r(L − l_r)]` elements, that is `4·M(N−1)/N²` of an activation
//! of `M` where all is even.
//!
//! Requires: a query head for every rank. Heads and lengths that the ranks do not divide are split unevenly;
//! where there are fewer key-value heads than ranks, or a rank's query heads cut a group, a key-value head
//! goes to every rank that needs it, and its gradients are summed at its owner, in rank order.
//!
//! Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509.

use burn::tensor::Tensor;
use dsp_core::attention::heads::{Side, Trade, share};
use dsp_core::attention::{Attended, Kernel, Logsumexp, Problem, attend_local, linear};
use dsp_core::blocks::DIMS;
use dsp_core::cost;
use dsp_core::error::Tracking;
use dsp_core::ledger::Phase;
use dsp_core::strategy::{AttentionScope, Form, StagePlan};
use dsp_core::{
    CommError, Error, Layout, ModelShape, PlanError, SequenceParallel, Shard, Stage, vjp,
};

/// DeepSpeed-Ulysses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ulysses;

impl SequenceParallel for Ulysses {
    fn name(&self) -> &'static str {
        "ulysses"
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
        if attention.heads.query < ranks {
            return Err(PlanError::Heads {
                strategy: self.name().to_owned(),
                stage: stage.name.clone(),
                heads: attention.heads.query,
                ranks,
            });
        }
        let (heads, others) = (attention.heads, residual.positions_beside(axis));
        let sends = |rank| cost::ulysses(model.batch, others, heads, partition, partition, rank);
        Ok(local.sending(sends))
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let attention = scope.attention;
        let layout = qkv[0].layout().clone();
        let attends_split = attention.axes.iter().any(|axis| layout.is_split(axis));
        if !attends_split {
            return attend_local(qkv, scope);
        }
        let rank = qkv[0].rank();
        let group = scope.scope.group;
        let everyone: Vec<usize> = (0..group.size()).collect();
        let tracking = Tracking::of(qkv.iter().map(Shard::tensor));
        let sides = [&qkv[0], &qkv[1]];
        let trade = Trade::new(attention, sides, (group, &everyone), tracking);
        let kernel = kernel(scope, &trade);
        let inputs = qkv.map(Shard::into_tensor);
        let forth = |index: usize, side| {
            let x: Tensor<DIMS> = inputs[index].clone().inner();
            trade.to_heads(x, side, Phase::Forward)
        };
        let held = [
            forth(0, Side::Queries)?,
            forth(1, Side::Keys)?,
            forth(2, Side::Keys)?,
        ];
        let kept = kernel.forward(&held);
        let forward = (Phase::Forward, tracking);
        let output = trade.to_sequence(kept.output().clone(), Side::Queries, forward)?;
        let logsumexp = match (scope.logsumexp, kept.logsumexp()) {
            (Logsumexp::Wanted, Some(lse)) => {
                let lse = lse.clone().unsqueeze_dim(3);
                let untracked = (Phase::Forward, Tracking::Untracked);
                let lse = trade.to_sequence(lse, Side::Queries, untracked)?;
                let lse = vjp::constant_like(lse, &inputs[0]);
                Some(Shard::new(lse, layout.clone(), rank)?)
            }
            _ => None,
        };
        // One node for the whole attention: separate ones could be walked back in another order on each
        // rank, for Burn orders them by depth, and the depth of what comes before may depend on the shapes.
        let output = vjp::attach3(inputs, output, move |dout| {
            let backward = (Phase::Backward, Tracking::Untracked);
            let dout = trade.to_heads(dout, Side::Queries, Phase::Backward)?;
            let [dq, dk, dv] = kernel.backward(&held, &kept, dout);
            Ok::<_, CommError>([
                trade.to_sequence(dq, Side::Queries, backward)?,
                trade.to_sequence(dk, Side::Keys, backward)?,
                trade.to_sequence(dv, Side::Keys, backward)?,
            ])
        });
        Ok(Attended {
            output: Shard::new(output, layout, rank)?,
            logsumexp,
        })
    }
}

/// This rank's attention: its query heads, over all positions.
fn kernel(scope: &AttentionScope<'_>, trade: &Trade) -> Kernel {
    let (attention, group) = (scope.attention, scope.scope.group);
    let heads = share(attention.heads, group.rank(), group.size());
    match &attention.form {
        Form::Linear { decay } => Kernel::Linear(linear::Problem {
            heads,
            decay: decay.clone(),
            scale: attention.scale,
        }),
        _ => Kernel::Softmax(Problem {
            heads,
            mask: trade.mask(&attention.mask),
            query_positions: trade.positions(Side::Queries),
            key_positions: trade.positions(Side::Keys),
            scale: attention.scale,
            dropout: scope.dropout,
            samples: trade.samples().to_vec(),
        }),
    }
}
