//! Kind `ring_merge`: attention to keys in blocks, merged one after the other.
//!
//! A file holds `q [B, L, H, d]`, `k`, `v` of another length; for each block of keys its `out` and `lse [B, H, L]` and the
//! `merged` ones up to it; and `full.out`, which every strategy must give for the queries and keys that it splits.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use dsp_core::attention::{HeadRange, Problem, forward, merge};
use dsp_core::layout::AxisSet;
use dsp_core::shape::reshape;
use dsp_core::strategy::{AttentionStage, OutputLayout, StageKind};
use dsp_core::{
    Group, Heads, Layout, Mask, ModelShape, SeqAxis, SequenceParallel, Session, Shard, Stage,
};

use super::shared::keep;
use super::{Case, CaseError, Produced};
use crate::reference::{Reference, ReferenceError, Stored};

/// Where the keys are cut: between these rows lie the blocks.
const CUTS: [usize; 4] = [0, 5, 16, 27];

struct MergeCase {
    /// q, k and v.
    inputs: [Stored; 3],
}

pub(super) fn open(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let inputs = ["q", "k", "v"].map(|name| reference.input(name).cloned());
    let [q, k, v] = inputs;
    let (q, k, v) = (q?, k?, v?);
    let fits = q.shape.len() == 4
        && k.shape == v.shape
        && k.shape == [q.shape[0], CUTS[3], q.shape[2], q.shape[3]];
    if !fits {
        return Err(reference.wrong_metadata(format!(
            "goes with q {:?} and k {:?}: k and v must be [B, {}, H, d] for q [B, L, H, d]",
            q.shape, k.shape, CUTS[3]
        )));
    }
    Ok(vec![Arc::new(MergeCase { inputs: [q, k, v] })])
}

impl Case for MergeCase {
    fn name(&self) -> &str {
        ""
    }

    fn run(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
        device: &Device,
        dtype: DType,
    ) -> Result<Produced, CaseError> {
        let [batch, length, heads, dim] = std::array::from_fn(|dim| self.inputs[0].shape[dim]);
        let tensors = self
            .inputs
            .each_ref()
            .map(|stored| stored.tensor::<4>(device, dtype));
        let all = Heads::multi(heads, dim);
        let stage = AttentionStage::softmax(AxisSet::of(&[SeqAxis::FIRST]), all, Mask::Full);
        let scale = stage.scale;
        let model = ModelShape {
            batch,
            lengths: vec![length],
            hidden: heads * dim,
            stages: vec![Stage::new("attention", StageKind::Attention(stage))],
            output: OutputLayout::AsInput,
        };
        let session = Session::new(strategy, group, model)?;
        let planned = &session.plan().stages[0];
        if planned.inner != planned.residual {
            return Err(CaseError::NotApplicable(
                "the strategy shards the projections around an attention, and the file has none",
            ));
        }
        let (rank, ranks) = (session.group().rank(), session.group().size());
        let keys = match session.plan().input.split_axis() {
            Some((axis, _)) => Layout::split([CUTS[3], 1, 1], axis, ranks),
            None => Layout::whole([CUTS[3], 1, 1]),
        };
        let activation = |x: &Tensor<4>| -> Tensor<5> {
            let [batch, length, ..] = x.dims();
            reshape(x.clone(), [batch, length, 1, 1, heads * dim])
        };
        let [q, k, v] = tensors.each_ref().map(activation);
        let mut stages = session.stages();
        let attention = stages.attention().map_err(dsp_core::Error::from)?;
        let query = attention.enter(attention.arrange(session.split(q)?)?)?;
        let key = Shard::split(k, &keys, rank)?;
        let value = Shard::split(v, &keys, rank)?;
        let output = attention.attend(query, key, value)?;
        let output = session.gather(stages.finish(attention.leave(output, None)?)?)?;
        let mut produced = Produced::new();
        keep(
            &mut produced,
            "full.out",
            output,
            &[batch, length, heads, dim],
        );
        merges(&mut produced, &tensors, (all, scale));
        Ok(produced)
    }
}

/// Block after block, as every rank does alike: what a ring does hop by hop.
fn merges(produced: &mut Produced, [q, k, v]: &[Tensor<4>; 3], (heads, scale): (Heads, f64)) {
    let [batch, length, count, dim] = q.dims();
    let mut merged: Option<(Tensor<4>, Tensor<3>)> = None;
    for (index, cut) in CUTS.windows(2).enumerate() {
        let rows = |x: &Tensor<4>| x.clone().narrow(1, cut[0], cut[1] - cut[0]);
        let problem = Problem {
            heads: HeadRange::all(heads),
            mask: Mask::Full,
            query_positions: std::iter::once(0..length).collect(),
            key_positions: std::iter::once(cut[0]..cut[1]).collect(),
            scale,
            dropout: None,
            samples: std::iter::once(0..batch).collect(),
        };
        let block = forward(q.clone(), rows(k), rows(v), &problem);
        let sum = match merged {
            Some(before) => merge(before, block.clone()),
            None => block.clone(),
        };
        merged = Some(sum.clone());
        for (what, (out, lse)) in [("block", block), ("merged", sum)] {
            let name = |part: &str| format!("{what}{index}.{part}");
            keep(produced, &name("out"), out, &[batch, length, count, dim]);
            let lse = lse.swap_dims(1, 2);
            keep(produced, &name("lse"), lse, &[batch, count, length]);
        }
    }
}
