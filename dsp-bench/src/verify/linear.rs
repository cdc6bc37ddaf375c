//! Kinds `linear_attention_decay` and `linear_attention_fla`: linear attention with a decay for each head.
//!
//! Each case holds `q`, `k` `[B, H, L, d]`, `v`, `dout` `[B, H, L, e]`, and `out`, `dq`, `dk`, `dv`; the first kind
//! also the heads' `slope`s and the `final_state`. Of the second only `retention` is this kind of attention: its other
//! case has a decay for each token.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use dsp_core::attention::{HeadRange, linear};
use dsp_core::layout::AxisSet;
use dsp_core::shape::reshape;
use dsp_core::strategy::{AttentionStage, OutputLayout, StageKind};
use dsp_core::{Group, Heads, Loss, ModelShape, SeqAxis, SequenceParallel, Session, Stage};

use super::shared::{keep, leaf, summed};
use super::{Case, CaseError, Produced};
use crate::reference::{Reference, ReferenceError, Stored};

struct LinearCase {
    name: String,
    decay: Vec<f64>,
    scale: f64,
    /// q, k, v and dout.
    inputs: [Stored; 4],
    has_state: bool,
}

/// A case of another kind of attention.
struct OtherCase(&'static str);

impl LinearCase {
    fn open(
        reference: &Reference,
        name: &str,
        scale: impl Fn(usize) -> f64,
        decay: impl Fn(usize) -> Result<Vec<f64>, ReferenceError>,
    ) -> Result<Self, ReferenceError> {
        let q = reference.input(&format!("{name}.q"))?.clone();
        let v = reference.input(&format!("{name}.v"))?.clone();
        let [batch, heads, length, dim] = q.shape[..] else {
            return Err(reference.wrong_metadata(format!(
                "goes with {name}.q of shape {:?}, which must be [B, H, L, d]",
                q.shape
            )));
        };
        let width = v.shape.last().copied().unwrap_or(0);
        let of = |tensor: &str, width| {
            let shape = [batch, heads, length, width];
            reference
                .shaped(&format!("{name}.{tensor}"), &shape)
                .cloned()
        };
        Ok(Self {
            name: name.to_owned(),
            decay: decay(heads)?,
            scale: scale(dim),
            inputs: [q, of("k", dim)?, of("v", width)?, of("dout", width)?],
            has_state: reference.has(&format!("{name}.final_state")),
        })
    }
}

pub(super) fn open_decay(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let mut opened: Vec<Arc<dyn Case>> = Vec::new();
    let names = reference.expected();
    for name in names.keys().filter_map(|tensor| tensor.strip_suffix(".q")) {
        let slopes = |heads| {
            let slopes = reference.shaped(&format!("{name}.slope"), &[heads])?;
            Ok(slopes.values.iter().map(|slope| (-slope).exp()).collect())
        };
        opened.push(Arc::new(LinearCase::open(
            reference,
            name,
            |_| 1.0,
            slopes,
        )?));
    }
    Ok(opened)
}

pub(super) fn open_fla(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    // Retention's decays (Sun et al., arXiv:2307.08621).
    let decay = |heads: usize| {
        let decays = (0..heads).map(|head| 1.0 - 2f64.powi(-5 - head as i32));
        Ok(decays.collect())
    };
    let scale = |dim: usize| (dim as f64).powf(-0.5);
    let retention = LinearCase::open(reference, "retention", scale, decay)?;
    let mut opened: Vec<Arc<dyn Case>> = vec![Arc::new(retention)];
    if !reference.inputs_under("simple_gla.").is_empty() {
        opened.push(Arc::new(OtherCase("simple_gla")));
    }
    Ok(opened)
}

impl Case for OtherCase {
    fn name(&self) -> &str {
        self.0
    }

    fn run(
        &self,
        _strategy: Arc<dyn SequenceParallel>,
        _group: Group,
        _device: &Device,
        _dtype: DType,
    ) -> Result<Produced, CaseError> {
        Err(CaseError::NotApplicable(
            "it has a decay for each token, and linear attention here has one for each head",
        ))
    }
}

impl Case for LinearCase {
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
        let [batch, heads, length, dim] = std::array::from_fn(|dim| self.inputs[0].shape[dim]);
        let width = self.inputs[2].shape[3];
        // Heads have one width here: the narrower of the two gets channels of 0, which change nothing.
        let common = dim.max(width);
        let axes = AxisSet::of(&[SeqAxis::FIRST]);
        let all = Heads::multi(heads, common);
        let stage = AttentionStage {
            scale: self.scale,
            ..AttentionStage::linear(axes, all, self.decay.clone().into())
        };
        let model = ModelShape {
            batch,
            lengths: vec![length],
            hidden: heads * common,
            stages: vec![Stage::new(&self.name, StageKind::Attention(stage))],
            output: OutputLayout::AsInput,
        };
        let session = Session::new(strategy, group, model)?;
        let planned = &session.plan().stages[0];
        if planned.inner != planned.residual {
            return Err(CaseError::NotApplicable(
                "the strategy shards the projections around an attention, and the file has none",
            ));
        }
        let leaves: [Tensor<4>; 4] = self.inputs.each_ref().map(|stored| {
            let shape = std::array::from_fn(|dim| stored.shape[dim]);
            leaf(stored, shape, &device, dtype)
        });
        let activation = |x: &Tensor<4>| -> Tensor<5> {
            let missing = common - x.dims()[3];
            let x = match missing {
                0 => x.clone(),
                _ => {
                    let zeros = Tensor::zeros([batch, heads, length, missing], (&device, dtype));
                    Tensor::cat(vec![x.clone(), zeros], 3)
                }
            };
            reshape(x.swap_dims(1, 2), [batch, length, 1, 1, heads * common])
        };
        let [q, k, v, dout] = leaves
            .each_ref()
            .map(|leaf| session.split(activation(leaf)));
        let mut stages = session.stages();
        let stage = stages.attention().map_err(dsp_core::Error::from)?;
        let output = stage.attend(stage.enter(stage.arrange(q?)?)?, k?, v?)?;
        let output = stages.finish(stage.leave(output, None)?)?;
        let loss = (output.tensor().clone() * dout?.into_tensor().detach()).sum();
        let gradients = session.backward(Loss::OfShard(loss))?;

        let mut produced = Produced::new();
        let whole = session.gather(output.detach())?;
        let whole: Tensor<4> = reshape(whole, [batch, length, heads, common]);
        let whole = whole.swap_dims(1, 2).narrow(3, 0, width);
        let shape = [batch, heads, length, width];
        keep(&mut produced, &format!("{}.out", self.name), whole, &shape);
        for (name, leaf) in ["dq", "dk", "dv"].iter().zip(&leaves) {
            let sum = summed(leaf, &gradients, session.group())?;
            let name = format!("{}.{name}", self.name);
            keep(&mut produced, &name, sum, &leaf.dims());
        }
        if self.has_state {
            // What is left after the last position, which no strategy splits: every rank computes it alike.
            let problem = linear::Problem {
                heads: HeadRange::all(Heads::multi(heads, dim)),
                decay: self.decay.clone().into(),
                scale: self.scale,
            };
            let [_, k, v, _] = leaves.map(|leaf| leaf.inner().swap_dims(1, 2));
            let state = linear::states(&k, &v, &problem).last;
            let name = format!("{}.final_state", self.name);
            keep(&mut produced, &name, state, &[batch, heads, dim, width]);
        }
        Ok(produced)
    }
}
