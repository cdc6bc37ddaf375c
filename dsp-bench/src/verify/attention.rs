//! Kind `attention`: softmax attention over one axis, with its logsumexp and gradients.
//!
//! Each case holds `q`, `k`, `v` `[B, H, L, d]`, `dout`, and `out`, `lse` `[B, H, L]`, `dq`, `dk`, `dv`.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use dsp_core::attention::Logsumexp;
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::session::Attend;
use dsp_core::strategy::{AttentionStage, OutputLayout, StageKind};
use dsp_core::{
    AxisSet, Group, Heads, Layout, Loss, Mask, ModelShape, SeqAxis, SequenceParallel, Session,
    Shard, Stage,
};
use serde::Deserialize;

use super::{Case, CaseError, Produced};
use crate::reference::{Reference, ReferenceError, Stored, data};

/// The sizes of a case, as the file's metadata gives them.
#[derive(Debug, Clone, Deserialize)]
struct Sizes {
    #[serde(rename = "B")]
    batch: usize,
    #[serde(rename = "Hq")]
    query_heads: usize,
    #[serde(rename = "Hkv")]
    key_value_heads: usize,
    #[serde(rename = "Lq")]
    queries: usize,
    #[serde(rename = "Lk")]
    keys: usize,
    #[serde(rename = "d")]
    dim: usize,
    causal: bool,
}

struct AttentionCase {
    name: String,
    sizes: Sizes,
    /// q, k, v and dout, `[B, H, L, d]`.
    inputs: [Stored; 4],
}

pub(super) fn open(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let cases: BTreeMap<String, Sizes> = reference.json("cases")?;
    let mut opened: Vec<Arc<dyn Case>> = Vec::new();
    for (name, sizes) in cases {
        let Sizes {
            batch,
            query_heads,
            key_value_heads,
            queries,
            keys,
            dim,
            ..
        } = sizes;
        let of = |tensor: &str, heads, length| {
            reference
                .shaped(&format!("{name}.{tensor}"), &[batch, heads, length, dim])
                .cloned()
        };
        let inputs = [
            of("q", query_heads, queries)?,
            of("k", key_value_heads, keys)?,
            of("v", key_value_heads, keys)?,
            of("dout", query_heads, queries)?,
        ];
        opened.push(Arc::new(AttentionCase {
            name,
            sizes,
            inputs,
        }));
    }
    Ok(opened)
}

impl Case for AttentionCase {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
        device: &Device,
        dtype: DType,
    ) -> Result<Produced, CaseError> {
        let device = device.clone().autodiff();
        let session = Session::new(strategy, group, self.shape())?;
        let (group, rank) = (session.group(), session.group().rank());
        let [q, k, v, dout] = self.inputs.each_ref().map(|stored| {
            let rows = heads_last(stored);
            Tensor::<5>::from_data(data(rows.values, &rows.shape, dtype), (&device, dtype))
        });
        let leaves = [q, k, v].map(Tensor::require_grad);
        let [q, k, v] = leaves.clone();
        let planned = &session.plan().stages[0];
        if planned.inner != planned.residual {
            return Err(CaseError::NotApplicable(
                "the strategy shards the projections around an attention, and the file has none",
            ));
        }
        // Keys of another length than the queries are split evenly too.
        let input = &session.plan().input;
        let key_layout = match (self.sizes.keys == self.sizes.queries, input.split_axis()) {
            (true, _) => input.clone(),
            (false, Some((axis, _))) => Layout::split([self.sizes.keys, 1, 1], axis, group.size()),
            (false, None) => Layout::whole([self.sizes.keys, 1, 1]),
        };
        let query = session.split(q)?;
        let key = Shard::split(k, &key_layout, rank)?;
        let value = Shard::split(v, &key_layout, rank)?;

        let mut stages = session.stages();
        let stage = stages.attention().map_err(dsp_core::Error::from)?;
        let query = stage.enter(stage.arrange(query)?)?;
        let attended = stage.attend_with(
            [query, key, value],
            Attend {
                logsumexp: Logsumexp::Wanted,
                ..Attend::default()
            },
        )?;
        let output = stages.finish(stage.leave(attended.output, None)?)?;

        let cotangent = session.split(dout)?.into_tensor();
        let loss = (output.tensor().clone() * cotangent).sum();
        let gradients = session.backward(Loss::OfShard(loss))?;

        let mut produced = Produced::new();
        let whole = session.gather(output.detach())?;
        self.keep(&mut produced, "out", whole, self.sizes.query_heads);
        if let Some(lse) = attended.logsumexp {
            let whole = session.gather(lse.detach())?;
            self.keep(&mut produced, "lse", whole, self.sizes.query_heads);
        }
        let names = ["dq", "dk", "dv"];
        let kv = self.sizes.key_value_heads;
        for ((name, leaf), heads) in names
            .iter()
            .zip(leaves)
            .zip([self.sizes.query_heads, kv, kv])
        {
            let Some(part) = leaf.grad(&gradients) else {
                return Err(CaseError::Model(format!("no gradient reached {name}")));
            };
            let sum = all_reduce_in(part, Phase::Outside, group)?;
            self.keep(&mut produced, name, sum, heads);
        }
        Ok(produced)
    }
}

impl AttentionCase {
    fn shape(&self) -> ModelShape {
        let Sizes {
            batch,
            query_heads,
            key_value_heads,
            queries,
            dim,
            causal,
            ..
        } = self.sizes;
        let heads = Heads {
            query: query_heads,
            key_value: key_value_heads,
            dim,
        };
        let mask = if causal { Mask::Causal } else { Mask::Full };
        let attention = AttentionStage::softmax(AxisSet::of(&[SeqAxis::FIRST]), heads, mask);
        ModelShape {
            batch,
            lengths: vec![queries],
            hidden: query_heads * dim,
            stages: vec![Stage::new(
                self.name.clone(),
                StageKind::Attention(attention),
            )],
            output: OutputLayout::AsInput,
        }
    }

    /// Keeps `[B, L, 1, 1, H·d]` as the file has it: `[B, H, L, d]`, or `[B, H, L]` where d is 1.
    fn keep(&self, produced: &mut Produced, name: &str, tensor: Tensor<5>, heads: usize) {
        let [batch, length, _, _, channels] = tensor.dims();
        let dim = channels / heads;
        let values: Vec<f64> = tensor.into_data().iter::<f64>().collect();
        let mut stored = Stored {
            shape: vec![batch, heads, length, dim],
            values: transposed(&values, [batch, length, heads, dim]),
        };
        if name == "lse" {
            stored.shape.pop();
        }
        produced.insert(format!("{}.{name}", self.name), stored);
    }
}

/// `[B, H, L, d]` as `[B, L, 1, 1, H·d]`.
fn heads_last(stored: &Stored) -> Stored {
    let [batch, heads, length, dim] = stored.shape[..] else {
        unreachable!("the shape was checked when the file was opened");
    };
    Stored {
        shape: vec![batch, length, 1, 1, heads * dim],
        values: transposed(&stored.values, [batch, heads, length, dim]),
    }
}

/// `[a, b, c, d]` as `[a, c, b, d]`.
fn transposed(values: &[f64], [a, b, c, d]: [usize; 4]) -> Vec<f64> {
    let mut result = Vec::with_capacity(values.len());
    for i in 0..a {
        for k in 0..c {
            for j in 0..b {
                let start = ((i * b + j) * c + k) * d;
                result.extend_from_slice(&values[start..start + d]);
            }
        }
    }
    result
}
