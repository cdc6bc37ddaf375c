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
    Attended, Fold, HeadRange, Heads, Logsumexp, Problem, backward, forward, positions,
};
use dsp_core::blocks::{Blocks, DIMS, DimBlocks};
use dsp_core::cost::{self, Elements};
use dsp_core::error::Tracking;
use dsp_core::group::{Request, Step};
use dsp_core::layout::AxisLayout;
use dsp_core::ledger::{Collective, Phase};
use dsp_core::strategy::{
    AttentionScope, AttentionStage, Plan, StageKind, StagePlan, check_softmax,
};
use dsp_core::{
    CommError, Error, Group, Layout, ModelShape, Partition, PlanError, SeqAxis, SequenceParallel,
    Shard, vjp,
};

/// DeepSpeed-Ulysses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ulysses;

impl SequenceParallel for Ulysses {
    fn name(&self) -> &'static str {
        "ulysses"
    }

    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        check_softmax(self.name(), model)?;
        for stage in &model.stages {
            if let StageKind::Attention(attention) = &stage.kind
                && attention.heads.query < ranks
            {
                return Err(PlanError::Heads {
                    strategy: self.name(),
                    stage: stage.name.clone(),
                    heads: attention.heads.query,
                    ranks,
                });
            }
        }
        let lengths = model.lengths()?;
        // The axis whose attentions send least; of equals the longest, which splits most evenly.
        let total = |axis: SeqAxis| -> u64 {
            let stages = model.stages.iter();
            stages
                .flat_map(|stage| stage_sends(&stage.kind, model.batch, lengths, axis, ranks))
                .map(|sent| sent.forward + sent.backward)
                .sum()
        };
        let axis = model
            .axes()
            .min_by_key(|&axis| (total(axis), usize::MAX - lengths[axis.index()]))
            .unwrap_or(SeqAxis::FIRST);
        let layout = Layout::split(lengths, axis, ranks);
        let stages = model.stages.iter().map(|stage| StagePlan {
            residual: layout.clone(),
            inner: layout.clone(),
            sends: stage_sends(&stage.kind, model.batch, lengths, axis, ranks),
            delegate: 0,
        });
        Ok(Plan {
            input: layout.clone(),
            stages: stages.collect(),
            output: layout.clone(),
            output_sends: vec![Elements::default(); ranks],
        })
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let attention = scope.attention;
        let layout = qkv[0].layout().clone();
        let attends_split = attention.axes.iter().any(|axis| layout.is_split(axis));
        if !attends_split {
            return dsp_core::attention::attend_local(qkv, attention, scope.logsumexp);
        }
        let rank = qkv[0].rank();
        let inputs = qkv.map(Shard::into_tensor);
        let trade = Trade::new(attention, layout.clone(), &inputs[0], scope.scope.group);
        let tracking = if inputs.iter().any(Tensor::is_tracked) {
            Tracking::Tracked
        } else {
            Tracking::Untracked
        };
        let forth = |x: &Tensor<DIMS>, heads| -> Result<Tensor<4>, CommError> {
            trade.to_heads(x.clone().inner(), heads, Phase::Forward, tracking)
        };
        let q = forth(&inputs[0], Of::Queries)?;
        let k = forth(&inputs[1], Of::KeysAndValues)?;
        let v = forth(&inputs[2], Of::KeysAndValues)?;
        let problem = trade.problem();
        let (out, lse) = forward(q.clone(), k.clone(), v.clone(), &problem);
        let back = |x, tracking| trade.to_sequence(x, Of::Queries, Phase::Forward, tracking);
        let output = back(out.clone(), tracking)?;
        let logsumexp = match scope.logsumexp {
            Logsumexp::Wanted => {
                let x = back(lse.clone().unsqueeze_dim(3), Tracking::Untracked)?;
                Some(Shard::new(
                    vjp::constant_like(x, &inputs[0]),
                    layout.clone(),
                    rank,
                )?)
            }
            Logsumexp::Unwanted => None,
        };
        // One node for the whole attention: separate ones could be walked back in another order on each
        // rank, for Burn orders them by depth, and the depth of what comes before may depend on the shapes.
        let output = vjp::attach3(inputs, output, move |dout| {
            let (phase, untracked) = (Phase::Backward, Tracking::Untracked);
            let dout = trade.to_heads(dout, Of::Queries, phase, untracked)?;
            let (q, k, v) = (q.clone(), k.clone(), v.clone());
            let (dq, dk, dv) = backward(q, k, v, out.clone(), lse.clone(), dout, &problem);
            Ok::<_, CommError>([
                trade.to_sequence(dq, Of::Queries, phase, untracked)?,
                trade.to_sequence(dk, Of::KeysAndValues, phase, untracked)?,
                trade.to_sequence(dv, Of::KeysAndValues, phase, untracked)?,
            ])
        });
        Ok(Attended {
            output: Shard::new(output, layout, rank)?,
            logsumexp,
        })
    }
}

/// Whose heads a tensor holds.
#[derive(Debug, Clone, Copy)]
enum Of {
    Queries,
    KeysAndValues,
}

/// One attention's exchange of heads for sequence, either way.
struct Trade {
    attention: AttentionStage,
    /// All heads of a part of the sequence.
    layout: Layout,
    /// The attended axes whole.
    gathered: Layout,
    shares: HeadShares,
    batch: usize,
    fold: Fold,
    group: Group,
}

impl Trade {
    fn new(attention: &AttentionStage, layout: Layout, x: &Tensor<DIMS>, group: &Group) -> Self {
        let axes = attention.axes.iter();
        let gathered = axes.fold(layout.clone(), Layout::with_whole);
        let [batch, .., channels] = x.dims();
        let [a, b, c] = gathered.local_lengths(group.rank());
        Self {
            attention: attention.clone(),
            layout,
            gathered,
            shares: HeadShares::new(attention.heads, group.size()),
            batch,
            fold: Fold::new([batch, a, b, c, channels], attention.axes),
            group: group.clone(),
        }
    }

    /// This rank's attention: its query heads, over all positions.
    fn problem(&self) -> Problem {
        let rank = self.group.rank();
        let positions = positions(&self.gathered, self.attention.axes, rank);
        Problem {
            heads: HeadRange {
                query: self.shares.query[rank].first().cloned().unwrap_or(0..0),
                group: self.attention.heads.group(),
            },
            mask: self.fold.mask(&self.attention.mask),
            query_positions: positions.clone(),
            key_positions: positions,
            scale: self.attention.scale,
        }
    }

    /// Who holds what before and after, `unit` channels a head.
    fn blocks(&self, of: Of, unit: usize) -> (Arc<Blocks>, Arc<Blocks>) {
        let heads = self.attention.heads;
        let (heads, shares) = match of {
            Of::Queries => (heads.query, &self.shares.query),
            Of::KeysAndValues => (heads.key_value, &self.shares.key_value),
        };
        let ranks = self.group.size();
        let held = shares.iter().map(|ranges| {
            let channels = ranges
                .iter()
                .map(|heads| heads.start * unit..heads.end * unit);
            channels.collect()
        });
        let held = DimBlocks::from_ranges(heads * unit, held.collect());
        let sequence = self.layout.blocks(self.batch, heads * unit, ranks);
        let gathered = self.gathered.blocks(self.batch, heads * unit, ranks);
        (Arc::new(sequence), Arc::new(gathered.with_dim(4, held)))
    }

    /// All heads of this rank's positions to this rank's heads of all positions.
    fn to_heads(
        &self,
        x: Tensor<DIMS>,
        of: Of,
        phase: Phase,
        tracking: Tracking,
    ) -> Result<Tensor<4>, CommError> {
        let unit = self.attention.heads.dim;
        let (before, after) = self.blocks(of, unit);
        let heads = after.dim(4).count(self.group.rank()) / unit;
        let x = self.exchange(x, (before, after), phase, tracking)?;
        Ok(self.fold.fold(x, heads))
    }

    /// The way back. Where several ranks have the same head, the owner of a position gets their sum.
    fn to_sequence(
        &self,
        x: Tensor<4>,
        of: Of,
        phase: Phase,
        tracking: Tracking,
    ) -> Result<Tensor<DIMS>, CommError> {
        let (after, before) = self.blocks(of, x.dims()[3]);
        self.exchange(self.fold.unfold(x), (before, after), phase, tracking)
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

/// What each rank sends in a stage while `axis` is split.
fn stage_sends(
    kind: &StageKind,
    batch: usize,
    lengths: [usize; 3],
    axis: SeqAxis,
    ranks: usize,
) -> Vec<Elements> {
    let StageKind::Attention(attention) = kind else {
        return vec![Elements::default(); ranks];
    };
    if !attention.axes.contains(axis) {
        return vec![Elements::default(); ranks];
    }
    let layout = Layout::split(lengths, axis, ranks);
    let AxisLayout::Split { partition, .. } = layout.axis(axis) else {
        return vec![Elements::default(); ranks];
    };
    let others = lengths
        .iter()
        .enumerate()
        .filter(|&(index, _)| index != axis.index())
        .map(|(_, length)| length)
        .product();
    (0..ranks)
        .map(|rank| cost::ulysses(batch, others, attention.heads, partition, partition, rank))
        .collect()
}
