//! Megatron-SP: weights of attention and feed-forward are sharded by heads and features; sequence between them.
//!
//! ```text
//!   residual stream            sub-layer                                residual stream
//!     ┌────────┐              ┌──────────────────────┐                    ┌────────┐
//!     │ rank 0 │  all-gather  │ all positions, heads │  reduce-scatter    │ rank 0 │
//!     ├────────┤ ───────────▶ │ or features of 1/N   │ ─────────────────▶ ├────────┤
//!     │ rank 1 │  of the      │ of the weights       │  of partial sums   │ rank 1 │
//!     └────────┘  normed x    └──────────────────────┘                    └────────┘
//! ```
//!
//! Cost, for each sub-layer: rank `r` sends `B·C·(N−1)·l_r` in and `B·C·(L − l_r)` out, that is `2·M(N−1)/N` of an
//! activation of `M`, and as much backward. The graph keeps the gathered input, `M` a sub-layer on every rank, so
//! that backward does not gather it again; one that gathered again would send half as much more and keep
//! `M/N`.
//!
//! An attention that goes on with all heads of a position (a norm over them) ends by an all-to-all of heads for
//! sequence instead, `B·d·q_r(L − l_r)`.
//!
//! Weights: each rank holds the columns of its query heads, of the key-value heads that they use, and of its
//! inner features, and the rows back. A key-value head that several ranks use is held by each, and its gradient
//! summed over them. With more ranks than query heads some ranks have none: right, but idle. Norms and the biases
//! that are added after the reduction are replicated; their gradients are sums over the ranks' positions.
//!
//! Requires: nothing.
//!
//! Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use dsp_core::attention::heads::share;
use dsp_core::attention::{HeadRange, Heads};
use dsp_core::blocks::DimBlocks;
use dsp_core::collective::{exchange, relayout};
use dsp_core::cost::{self, Elements};
use dsp_core::layout::Value;
use dsp_core::ledger::Collective;
use dsp_core::partition::balanced_range;
use dsp_core::strategy::{
    AttentionScope, Closing, Parameter, Placement, Role, Scope, StageKind, StagePlan, Units, add_bias,
};
use dsp_core::{Error, Layout, ModelShape, PlanError, SequenceParallel, Shard, Stage};

/// Megatron's sequence parallelism around tensor parallelism.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Megatron;

impl SequenceParallel for Megatron {
    fn name(&self) -> &'static str {
        "megatron"
    }

    fn plan_stage(
        &self,
        model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        let local = StagePlan::local(residual, ranks);
        let Some((axis, partition)) = residual.split_axis() else {
            return Ok(local);
        };
        let others = residual.positions_beside(axis);
        let joins = matches!(
            &stage.kind,
            StageKind::Attention(attention) if attention.closing == Closing::AllHeads
        );
        let plan = StagePlan {
            inner: Layout::whole(residual.lengths()),
            value: if joins {
                Value::Complete
            } else {
                Value::Partial
            },
            ..local
        };
        Ok(plan.sending(|rank| {
            // In by an all-gather, out by a reduce-scatter; each the other's transpose.
            let there = cost::all_gather(model.batch, model.hidden, others, partition, rank);
            let back = match &stage.kind {
                StageKind::Attention(attention) if attention.closing == Closing::AllHeads => {
                    let heads = attention.heads;
                    let own = share(heads, rank, ranks).query.len();
                    let unit = model.batch * others * heads.dim;
                    let (l, length) = (partition.count(rank), partition.length());
                    let sent = |elements: usize| (unit * elements) as u64;
                    Elements::both(sent(own * (length - l)), sent(l * (heads.query - own)))
                }
                _ => Elements::both(there.backward, there.forward),
            };
            there + back
        }))
    }

    fn placement(&self, parameter: &Parameter<'_>, rank: usize, ranks: usize) -> Placement {
        let (dim, fused, units) = match parameter.role {
            // A parameter of no stage is no sub-layer's.
            _ if parameter.stage.is_none() => return Placement::Replicated,
            Role::Columns { dim, fused, units } => (dim, fused, units),
            Role::Rows { dim, units } => (dim, 1, units),
            _ => return Placement::Replicated,
        };
        let part = parameter.shape[dim] / fused;
        let unit = part.checked_div(units.count()).unwrap_or(0);
        let held = held_units(units, rank, ranks);
        let ranges = (0..fused).map(|index| {
            let start = index * part;
            start + held.start * unit..start + held.end * unit
        });
        let ranges = ranges.collect();
        let all = (0..ranks).map(|rank| held_units(units, rank, ranks).len());
        if all.sum::<usize>() > units.count() {
            Placement::Shared { dim, ranges }
        } else {
            Placement::Sharded { dim, ranges }
        }
    }

    fn held_heads(
        &self,
        heads: Heads,
        _plan: &StagePlan,
        rank: usize,
        ranks: usize,
    ) -> HeadRange {
        share(heads, rank, ranks)
    }

    fn join(&self, x: Shard, scope: &AttentionScope<'_>) -> Result<Shard, Error> {
        let (group, heads) = (scope.scope.group, scope.attention.heads);
        let residual = &scope.scope.plan.residual;
        if residual.split_axis().is_none() {
            return Ok(x);
        }
        let (rank, ranks) = (group.rank(), group.size());
        let (batch, channels) = (x.tensor().dims()[0], heads.query * heads.dim);
        let of_each = (0..ranks).map(|rank| {
            let held = share(heads, rank, ranks).query;
            std::iter::once(held.start * heads.dim..held.end * heads.dim).collect()
        });
        let of_each = DimBlocks::from_ranges(channels, of_each.collect());
        let before = x.layout().blocks(batch, channels, ranks);
        let after = residual.blocks(batch, channels, ranks);
        let kind = Collective::AllToAll;
        let (before, after) = (Arc::new(before.with_dim(4, of_each)), Arc::new(after));
        let joined = exchange(x.into_tensor(), before, after, kind, kind, group)?;
        Ok(Shard::new(joined, residual.clone(), rank)?)
    }

    fn leave(&self, x: Shard, bias: Option<Tensor<1>>, scope: &Scope<'_>) -> Result<Shard, Error> {
        let x = x.with_value(Value::Partial);
        add_bias(relayout(x, &scope.plan.residual, scope.group)?, bias)
    }
}

/// The units of a rank: features and query heads evenly, key-value heads as the query heads need them.
fn held_units(units: Units, rank: usize, ranks: usize) -> Range<usize> {
    match units {
        Units::Query(heads) => share(heads, rank, ranks).query,
        Units::KeyValue(heads) => share(heads, rank, ranks).kv(),
        Units::Features(count) => balanced_range(count, rank, ranks),
    }
}
