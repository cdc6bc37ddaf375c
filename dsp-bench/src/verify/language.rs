//! Kinds `llama_lm` and `tnl_attention`: a LLaMA with its tokens, and one attention of a TransNormer.
//!
//! A model file holds `input_ids [B, L]`, the weights, `logits`, `loss`, the first layer's input and output, and
//! each weight's gradient; an attention file `x`, `dout`, the heads' `slope_rate`, `out` and `dx`.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use dsp_core::collective::all_reduce_in;
use dsp_core::layout::AxisSet;
use dsp_core::ledger::Phase;
use dsp_core::strategy::{AttentionStage, Closing, OutputLayout, Part, Role, StageKind, Units};
use dsp_core::{Group, Heads, Loss, Mask, ModelShape, SequenceParallel, Session, Stage};
use dsp_models::language::{
    CausalLm, LanguageConfig, LinearAttention, TOKENS, Tokens, next_token_loss, roles,
};
use dsp_models::random::{Draws, Purpose};
use serde::Deserialize;

use super::shared::{keep, keep_parameters, leaf, of_dtype, summed, weights};
use super::{Case, CaseError, Produced};
use crate::reference::{Reference, ReferenceError, Stored};

#[derive(Debug, Deserialize)]
pub(super) struct LlamaFile {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
    tie_word_embeddings: bool,
}

impl LlamaFile {
    pub(super) fn config(&self) -> LanguageConfig {
        LanguageConfig::new(
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        .with_rms_norm_eps(self.rms_norm_eps)
        .with_rope_theta(self.rope_theta)
        .with_tie_word_embeddings(self.tie_word_embeddings)
    }
}

struct LlamaCase {
    config: LanguageConfig,
    templates: [CausalLm; 2],
    tokens: Tokens,
}

pub(super) fn open_llama(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let file: LlamaFile = reference.json("config")?;
    let config = file.config();
    let templates = weights(reference, || config.init(0, &Device::flex()))?;
    let ids = reference.input("input_ids")?;
    let rows = match ids.shape[..] {
        [_, length] if length > 0 => ids.values.chunks(length),
        _ => {
            return Err(reference.wrong_metadata(format!(
                "goes with input_ids of shape {:?}, which must be [samples, tokens]",
                ids.shape
            )));
        }
    };
    let rows = rows.map(|row| row.iter().map(|&id| id as u32).collect());
    let tokens =
        Tokens::new(rows.collect()).map_err(|error| reference.wrong_metadata(error.to_string()))?;
    Ok(vec![Arc::new(LlamaCase {
        config,
        templates,
        tokens,
    })])
}

impl Case for LlamaCase {
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
        let device = device.clone().autodiff();
        let [batch, length] = self.tokens.dims();
        let shape = self.config.shape(batch, length, &Mask::Causal);
        let session = Session::new(strategy, group, shape)?;
        let template = of_dtype(&self.templates, dtype);
        let placed = session.place(template, roles(&self.config), &device);
        let mut streams = Vec::new();
        let logits = placed
            .module
            .forward_observed(&self.tokens, &session, |_, x| streams.push(x.clone()))?;
        let loss = next_token_loss(&logits, &self.tokens)?;
        let gradients = session.backward(Loss::OfShard(loss.clone()))?;
        let mut produced = Produced::new();
        let [hidden, vocabulary] = [self.config.hidden_size, self.config.vocab_size];
        for (name, stream) in ["layer0_in", "layer0_out"].into_iter().zip(streams) {
            let whole = session.gather(stream.detach())?;
            keep(&mut produced, name, whole, &[batch, length, hidden]);
        }
        let whole = session.gather(logits.detach())?;
        keep(&mut produced, "logits", whole, &[batch, length, vocabulary]);
        let loss = all_reduce_in(loss, Phase::Outside, session.group())?;
        keep(&mut produced, "loss", loss, &[1]);
        keep_parameters(&mut produced, &session, &placed, gradients)?;
        Ok(produced)
    }
}

#[derive(Debug, Deserialize)]
struct AttentionFile {
    embed_dim: usize,
    num_heads: usize,
}

struct AttentionCase {
    stage: AttentionStage,
    templates: [LinearAttention; 2],
    x: Stored,
    dout: Stored,
}

pub(super) fn open_attention(reference: &Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError> {
    let AttentionFile {
        embed_dim,
        num_heads,
    } = reference.json("config")?;
    if num_heads == 0 || !embed_dim.is_multiple_of(num_heads) {
        return Err(reference.wrong_metadata(format!(
            "has embed_dim {embed_dim}, which is no multiple of num_heads {num_heads}"
        )));
    }
    let template = || -> Result<LinearAttention, std::convert::Infallible> {
        let draws = &mut Draws::new(0, Purpose::Parameters, 0);
        Ok(LinearAttention::new(
            embed_dim,
            num_heads,
            draws,
            &Device::flex(),
        ))
    };
    let templates = weights(reference, template)?;
    let slopes = reference.shaped("slope_rate", &[num_heads])?;
    let decay = slopes.values.iter().map(|slope| (-slope).exp());
    let heads = Heads::multi(num_heads, embed_dim / num_heads);
    let stage = AttentionStage::linear(AxisSet::of(&[TOKENS]), heads, decay.collect());
    let x = reference.input("x")?.clone();
    if x.shape.len() != 3 || x.shape[2] != embed_dim {
        return Err(reference.wrong_metadata(format!(
            "has embed_dim {embed_dim}, and x is {:?}, which must be [samples, tokens, channels]",
            x.shape
        )));
    }
    Ok(vec![Arc::new(AttentionCase {
        stage: AttentionStage {
            closing: Closing::AllHeads,
            ..stage
        },
        templates,
        dout: reference.shaped("dout", &x.shape)?.clone(),
        x,
    })])
}

impl Case for AttentionCase {
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
        let device = device.clone().autodiff();
        let [batch, length, channels] = [self.x.shape[0], self.x.shape[1], self.x.shape[2]];
        let heads = Units::Query(self.stage.heads);
        let model = ModelShape {
            batch,
            lengths: vec![length],
            hidden: channels,
            stages: vec![Stage::new(
                "attention",
                StageKind::Attention(self.stage.clone()),
            )],
            output: OutputLayout::AsInput,
        };
        let session = Session::new(strategy, group, model)?;
        let roles = |path: &str| -> Part {
            match path {
                "q_proj.weight" | "k_proj.weight" | "v_proj.weight" => Role::Columns {
                    dim: 1,
                    fused: 1,
                    units: heads,
                }
                .in_stage(0),
                _ => Role::Replicated.into(),
            }
        };
        let placed = session.place(of_dtype(&self.templates, dtype), roles, &device);
        let activation = [batch, length, 1, 1, channels];
        let x: Tensor<5> = leaf(&self.x, activation, &device, dtype);
        let dout: Tensor<5> = leaf(&self.dout, activation, &device, dtype);
        let mut stages = session.stages();
        let stage = stages.attention().map_err(dsp_core::Error::from)?;
        let out = placed
            .module
            .forward(stage.arrange(session.split(x.clone())?)?, &stage)?;
        let out = stages.finish(out)?;
        let loss = (out.tensor().clone() * session.split(dout.detach())?.into_tensor()).sum();
        let gradients = session.backward(Loss::OfShard(loss))?;
        let mut produced = Produced::new();
        keep(
            &mut produced,
            "out",
            session.gather(out.detach())?,
            &self.x.shape,
        );
        let dx = summed(&x, &gradients, session.group())?;
        keep(&mut produced, "dx", dx, &self.x.shape);
        keep_parameters(&mut produced, &session, &placed, gradients)?;
        Ok(produced)
    }
}
