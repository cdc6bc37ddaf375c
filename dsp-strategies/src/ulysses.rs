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

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use dsp_core::attention::{
    Attended, Dropout, Fold, HeadRange, Heads, Kernel, Logsumexp, Problem, linear, positions, samples,
};
use dsp_core::blocks::{Blocks, DIMS, DimBlocks};
use dsp_core::cost;
use dsp_core::error::Tracking;
use dsp_core::group::{Request, Step};
use dsp_core::ledger::{Collective, Phase};
use dsp_core::strategy::{
    AttentionScope, AttentionStage, Form, StageKind, StagePlan,
};
use dsp_core::{
    AxisSet,
    CommError, Error, Group, Layout, ModelShape, Partition, PlanError, SequenceParallel,
    Shard, Stage, vjp,
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
        let (StageKind::Attention(attention), Some((axis, partition))) =
            (&stage.kind, residual.split_axis())
        else {
            return Ok(local);
        };
        if !attention.axes.contains(axis) {
            return Ok(local);
        }
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
            return dsp_core::attention::attend_local(qkv, scope);
        }
        let rank = qkv[0].rank();
        let trade = Trade::new(attention, [&qkv[0], &qkv[1]], scope.scope.group);
        let inputs = qkv.map(Shard::into_tensor);
        let tracking = if inputs.iter().any(Tensor::is_tracked) {
            Tracking::Tracked
        } else {
            Tracking::Untracked
        };
        let forth = |x: &Tensor<DIMS>, side: &Side| -> Result<Tensor<4>, CommError> {
            trade.to_heads(x.clone().inner(), side, Phase::Forward, tracking)
        };
        let q = forth(&inputs[0], &trade.queries)?;
        let k = forth(&inputs[1], &trade.keys)?;
        let v = forth(&inputs[2], &trade.keys)?;
        let held = [q, k, v];
        let kernel = trade.kernel(scope.dropout);
        let kept = kernel.forward(&held);
        let back = |x, tracking| trade.to_sequence(x, &trade.queries, Phase::Forward, tracking);
        let output = back(kept.output().clone(), tracking)?;
        let logsumexp = match (scope.logsumexp, kept.logsumexp()) {
            (Logsumexp::Wanted, Some(lse)) => {
                let x = back(lse.clone().unsqueeze_dim(3), Tracking::Untracked)?;
                Some(Shard::new(
                    vjp::constant_like(x, &inputs[0]),
                    layout.clone(),
                    rank,
                )?)
            }
            _ => None,
        };
        // One node for the whole attention: separate ones could be walked back in another order on each
        // rank, for Burn orders them by depth, and the depth of what comes before may depend on the shapes.
        let output = vjp::attach3(inputs, output, move |dout| {
            let (phase, untracked) = (Phase::Backward, Tracking::Untracked);
            let dout = trade.to_heads(dout, &trade.queries, phase, untracked)?;
            let [dq, dk, dv] = kernel.backward(&held, &kept, dout);
            Ok::<_, CommError>([
                trade.to_sequence(dq, &trade.queries, phase, untracked)?,
                trade.to_sequence(dk, &trade.keys, phase, untracked)?,
                trade.to_sequence(dv, &trade.keys, phase, untracked)?,
            ])
        });
        Ok(Attended {
            output: Shard::new(output, layout, rank)?,
            logsumexp,
        })
    }
}

/// The queries, or the keys and values: how they are held before and after the exchange.
struct Side {
    /// All heads of a part of the sequence.
    layout: Layout,
    /// The attended axes whole.
    gathered: Layout,
    /// Which heads each rank then has.
    shares: Vec<Vec<Range<usize>>>,
    heads: usize,
    fold: Fold,
}

impl Side {
    fn new(x: &Shard, axes: AxisSet, heads: usize, shares: Vec<Vec<Range<usize>>>) -> Self {
        let layout = x.layout().clone();
        let gathered = axes.iter().fold(layout.clone(), Layout::with_whole);
        let [batch, .., channels] = x.tensor().dims();
        let [a, b, c] = gathered.local_lengths(x.rank());
        Self {
            layout,
            gathered,
            shares,
            heads,
            fold: Fold::new([batch, a, b, c, channels], axes),
        }
    }

    /// Who holds what before and after, `unit` channels a head.
    fn blocks(&self, batch: usize, unit: usize, ranks: usize) -> (Arc<Blocks>, Arc<Blocks>) {
        let held = self.shares.iter().map(|ranges| {
            let channels = ranges
                .iter()
                .map(|heads| heads.start * unit..heads.end * unit);
            channels.collect()
        });
        let channels = self.heads * unit;
        let held = DimBlocks::from_ranges(channels, held.collect());
        let sequence = self.layout.blocks(batch, channels, ranks);
        let gathered = self.gathered.blocks(batch, channels, ranks);
        (Arc::new(sequence), Arc::new(gathered.with_dim(4, held)))
    }
}

/// One attention's exchange of heads for sequence, either way.
struct Trade {
    attention: AttentionStage,
    queries: Side,
    keys: Side,
    batch: usize,
    group: Group,
    /// The number of the first forward exchange.
    asked: u64,
}

impl Trade {
    fn new(attention: &AttentionStage, [query, key]: [&Shard; 2], group: &Group) -> Self {
        let (heads, axes) = (attention.heads, attention.axes);
        let shares = HeadShares::new(heads, group.size());
        Self {
            attention: attention.clone(),
            queries: Side::new(query, axes, heads.query, shares.query),
            keys: Side::new(key, axes, heads.key_value, shares.key_value),
            batch: query.tensor().dims()[0],
            group: group.clone(),
            asked: group.next_sequence(),
        }
    }

    /// This rank's attention: its query heads, over all positions.
    fn kernel(&self, dropout: Option<Dropout>) -> Kernel {
        let (rank, attention) = (self.group.rank(), &self.attention);
        let heads = HeadRange {
            query: self.queries.shares[rank].first().cloned().unwrap_or(0..0),
            group: attention.heads.group(),
        };
        let all = |side: &Side| positions(&side.gathered, attention.axes, rank);
        match &attention.form {
            Form::Linear { decay } => Kernel::Linear(linear::Problem {
                heads,
                decay: decay.clone(),
                scale: attention.scale,
            }),
            _ => Kernel::Softmax(Problem {
                heads,
                mask: self.queries.fold.mask(&attention.mask),
                query_positions: all(&self.queries),
                key_positions: all(&self.keys),
                scale: attention.scale,
                dropout,
                samples: samples(&self.queries.gathered, attention.axes, self.batch, rank),
            }),
        }
    }

    /// All heads of this rank's positions to this rank's heads of all positions.
    fn to_heads(
        &self,
        x: Tensor<DIMS>,
        side: &Side,
        phase: Phase,
        tracking: Tracking,
    ) -> Result<Tensor<4>, CommError> {
        let unit = self.attention.heads.dim;
        let (before, after) = side.blocks(self.batch, unit, self.group.size());
        let heads = after.dim(4).count(self.group.rank()) / unit;
        let x = self.exchange(x, (before, after), phase, tracking)?;
        Ok(side.fold.fold(x, heads))
    }

    /// The way back. Where several ranks have the same head, the owner of a position gets their sum.
    fn to_sequence(
        &self,
        x: Tensor<4>,
        side: &Side,
        phase: Phase,
        tracking: Tracking,
    ) -> Result<Tensor<DIMS>, CommError> {
        let (after, before) = side.blocks(self.batch, x.dims()[3], self.group.size());
        self.exchange(side.fold.unfold(x), (before, after), phase, tracking)
    }

    fn exchange(
        &self,
        tensor: Tensor<DIMS>,
        (before, after): (Arc<Blocks>, Arc<Blocks>),
        phase: Phase,
        tracking: Tracking,
    ) -> Result<Tensor<DIMS>, CommError> {
        self.group.exchange(Request {
            collective: Collective::AllToAll,
            phase,
            tracking,
            tensor,
            before,
            after,
            step: Step::First,
            answers: (phase == Phase::Backward).then_some(self.asked),
        })
    }
}

/// Which heads each rank computes: its query heads, and the key-value heads that they touch.
struct HeadShares {
    query: Vec<Vec<Range<usize>>>,
    key_value: Vec<Vec<Range<usize>>>,
}

impl HeadShares {
    fn new(heads: Heads, ranks: usize) -> Self {
        let partition = Partition::balanced(heads.query, ranks);
        let query: Vec<_> = (0..ranks)
            .map(|rank| partition.ranges(rank).to_vec())
            .collect();
        let touched = |range: &Range<usize>| {
            HeadRange {
                query: range.clone(),
                group: heads.group(),
            }
            .kv()
        };
        let key_value = query
            .iter()
            .map(|ranges| ranges.iter().map(touched).collect())
            .collect();
        Self { query, key_value }
    }
}
