//! Ring Attention: one axis stays split; in its attention, keys and values go round.
//!
//! ```text
//!     queries stay         keys and values go round, the next block while this one is computed
//!     ┌────────┐           ┌────┐     ┌────┐     ┌────┐
//!     │ rank 0 │           │ kv │ ──▶ │ kv │ ──▶ │ kv │ ─┐      causal, 2 ranks, mirrored chunks:
//!     ├────────┤           │ 0  │     │ 1  │     │ 2  │  │      rank 0  ▓▓▓░░░░░░▓▓▓
//!     │ rank 1 │           └────┘     └────┘     └────┘  │      rank 1  ░░░▓▓▓▓▓▓░░░
//!     ├────────┤             ▲                           │
//!     │ rank 2 │             └───────────────────────────┘
//!     └────────┘
//! ```
//!
//! Attentions over the other axes are local. Cost of one over the split axis: rank `r` sends all blocks but that of the
//! rank before which it stands, `2·B·Hkv·d·(L − l_{r+1})` elements; backward these again, and as many of their
//! gradients, all but its own, in f32 at least. A block goes no farther than a rank sees any of it: under a sliding
//! window a hop or two, and each rank sends a block or two whatever N is. Memory: two blocks of keys and values.
//!
//! Under a causal mask the axis is split in mirrored chunks, within each document if there are packed ones, so that
//! all ranks compute as much; else in plain blocks.
//!
//! Requires: softmax attention.
//!
//! Liu et al., "Ring Attention with Blockwise Transformers", arXiv:2310.01889; the mirrored chunks are those of
//! the Llama 3 and zigzag rings (arXiv:2407.21783, §3.3.2).

use dsp_core::attention::ring::{self, Ring as Rounds, balanced_layouts};
use dsp_core::attention::{Attended, Fold, Logsumexp, attend_local, positions, samples};
use dsp_core::error::Tracking;
use dsp_core::strategy::{AttentionScope, Form, StagePlan};
use dsp_core::{
    CommError, Error, Layout, ModelShape, PlanError, SequenceParallel, Shard, Stage, vjp,
};

/// Ring Attention.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ring;

impl SequenceParallel for Ring {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn residuals(&self, model: &ModelShape, ranks: usize) -> Result<Vec<Layout>, PlanError> {
        balanced_layouts(model, ranks)
    }

    fn plan_stage(
        &self,
        model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError> {
        let local = StagePlan::local(residual, ranks);
        let Some((attention, ..)) = stage.attends_split(residual) else {
            return Ok(local);
        };
        if attention.form != Form::Softmax {
            return Err(PlanError::Form {
                strategy: self.name().to_owned(),
                stage: stage.name.clone(),
                rule: "it sends keys and values round for softmax attention, and this one is linear, whose state is all \
                       that must move; use lasp or lasp2",
            });
        }
        let held: Vec<_> = (0..ranks)
            .map(|rank| positions(residual, attention.axes, rank))
            .collect();
        let reach = ring::reach(&attention.mask, model.batch, &held, &held);
        let rows: Vec<usize> = held
            .iter()
            .map(|ranges| ranges.iter().map(ExactSizeIterator::len).sum())
            .collect();
        let unit = attention.samples(model.batch, residual.lengths())
            * 2
            * attention.heads.key_value
            * attention.heads.dim;
        Ok(local.sending(|rank| ring::sends(unit, &rows, &reach, rank)))
    }

    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        let attention = scope.attention;
        let (query, key) = (qkv[0].layout().clone(), qkv[1].layout().clone());
        if !attention.axes.iter().any(|axis| key.is_split(axis)) {
            return attend_local(qkv, scope);
        }
        let (rank, group) = (qkv[0].rank(), scope.scope.group);
        let inputs = qkv.map(Shard::into_tensor);
        let fold = Fold::new(inputs[0].dims(), attention.axes);
        let key_fold = Fold::new(inputs[1].dims(), attention.axes);
        let of_each = |layout: &Layout| -> Vec<_> {
            (0..group.size())
                .map(|rank| positions(layout, attention.axes, rank))
                .collect()
        };
        let rounds = Rounds {
            heads: scope.heads.clone(),
            mask: fold.mask(&attention.mask),
            scale: attention.scale,
            dropout: scope.dropout,
            samples: samples(&query, attention.axes, fold.batch(), rank),
            queries: of_each(&query),
            keys: of_each(&key),
            tracking: Tracking::of(&inputs),
            asked: group.next_sequence(),
            group: group.clone(),
        };
        let (queries, keys) = (attention.heads.query, attention.heads.key_value);
        let [q, k, v] = inputs.each_ref().map(|x| x.clone().inner());
        let held = [
            fold.fold(q, queries),
            key_fold.fold(k, keys),
            key_fold.fold(v, keys),
        ];
        let (out, lse) = rounds.forward(&held)?;
        let logsumexp = match scope.logsumexp {
            Logsumexp::Wanted => {
                let lse = fold.unfold(lse.clone().unsqueeze_dim(3));
                let lse = vjp::constant_like(lse, &inputs[0]);
                Some(Shard::new(lse, query.clone(), rank)?)
            }
            Logsumexp::Unwanted => None,
        };
        // One node: what a rank computes in each step differs, and a chain of nodes would too.
        let output = vjp::attach3(inputs, fold.unfold(out.clone()), move |dout| {
            let dout = fold.fold(dout, queries);
            let [dq, dk, dv] = rounds.backward(&held, (&out, &lse), dout)?;
            Ok::<_, CommError>([
                fold.unfold(dq),
                key_fold.unfold(dk),
                key_fold.unfold(dv),
            ])
        });
        Ok(Attended {
            output: Shard::new(output, query, rank)?,
            logsumexp,
        })
    }
}
