//! The whole model: tokens in, logits of the next token out.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use dsp_core::layout::select_ranges;
use dsp_core::linear::{affine, project};
use dsp_core::shape::reshape;
use dsp_core::{Session, Shard};

use super::block::Block;
use super::config::{LanguageConfig, TOKENS};
use super::loss::Tokens;
use crate::error::{ConfigError, ModelError};
use crate::layers::{RmsNorm, linear_without_bias, parameter};
use crate::random::{Draws, Purpose};

/// A row for each token of the vocabulary.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocabulary, C]`.
    pub weight: Param<Tensor<2>>,
}

/// The embedding, the layers and the last norm.
#[derive(Module, Debug)]
pub struct Decoder {
    /// The embedding.
    pub embed_tokens: Embedding,
    /// The layers.
    pub layers: Vec<Block>,
    /// The last norm.
    pub norm: RmsNorm,
}

/// A causal language model.
#[derive(Module, Debug)]
pub struct CausalLm {
    /// All but the head.
    pub model: Decoder,
    /// `[C, vocabulary]`; without one the embedding is the head too.
    pub lm_head: Option<Linear>,
}

impl LanguageConfig {
    /// A model with parameters drawn from a seed, the same on every rank.
    ///
    /// # Errors
    /// [`ConfigError`] if the configuration describes no model.
    pub fn init(&self, seed: u64, device: &Device) -> Result<CausalLm, ConfigError> {
        self.check()?;
        let draws = &mut Draws::new(seed, Purpose::Parameters, 0);
        let (vocabulary, hidden) = (self.vocab_size, self.hidden_size);
        let weight = draws.normal([vocabulary, hidden], (hidden as f64).powf(-0.5), device);
        let layers =
            (0..self.num_hidden_layers).map(|index| Block::new(self, index, draws, device));
        let layers = layers.collect();
        Ok(CausalLm {
            model: Decoder {
                embed_tokens: Embedding {
                    weight: parameter(weight),
                },
                layers,
                norm: RmsNorm::new(hidden, self.rms_norm_eps, device),
            },
            lm_head: (!self.tie_word_embeddings)
                .then(|| linear_without_bias(hidden, vocabulary, draws, device)),
        })
    }
}

impl Embedding {
    /// The rows of a rank's own tokens: `[B, positions held, 1, 1, C]`.
    ///
    /// # Gradient
    /// Of the table; also where there are no tokens, so that the rank takes part in the backward pass.
    fn forward(&self, own: &[Vec<i64>]) -> Tensor<5> {
        let table = self.weight.val();
        let (batch, held) = (own.len(), own.first().map_or(0, Vec::len));
        let [_, channels] = table.dims();
        let rows = if batch * held == 0 {
            select_ranges(table, 0, &[])
        } else {
            let flat: Vec<i64> = own.concat();
            let device = table.device().without_autodiff();
            let data = TensorData::new(flat, [batch * held]);
            table.select(0, Tensor::<1, Int>::from_data(data, (&device, DType::I64)))
        };
        reshape(rows, [batch, held, 1, 1, channels])
    }
}

impl CausalLm {
    /// The logits of the token after each.
    ///
    /// # Shapes
    /// - `tokens`: `[B, L]`, the same on every rank
    /// - returns: `[B, L, 1, 1, vocabulary]`, in the plan's output layout
    ///
    /// # Errors
    /// [`ModelError`] if the tokens are not as declared, or the ranks fail.
    pub fn forward(&self, tokens: &Tokens, session: &Session) -> Result<Shard, ModelError> {
        self.forward_observed(tokens, session, |_, _| {})
    }

    /// As [`forward`](Self::forward), showing `observe` the residual stream after each number of layers, 0 included.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_observed(
        &self,
        tokens: &Tokens,
        session: &Session,
        mut observe: impl FnMut(usize, &Shard),
    ) -> Result<Shard, ModelError> {
        let vocabulary = self.model.embed_tokens.weight.shape().dims::<2>()[0];
        tokens.check(session.model(), vocabulary)?;
        let input = &session.plan().input;
        let rank = session.group().rank();
        let own = tokens.at(&input.ranges(TOKENS, rank));
        let x = self.model.embed_tokens.forward(&own);
        let mut x = Shard::new(x, input.clone(), rank)?;
        observe(0, &x);
        let mut stages = session.stages();
        for (index, layer) in self.model.layers.iter().enumerate() {
            x = layer.forward(x, &mut stages)?;
            observe(index + 1, &x);
        }
        let x = stages.finish(x)?.map(|x| self.model.norm.forward(x))?;
        Ok(x.map(|x| match &self.lm_head {
            Some(head) => project(x, head),
            None => affine(x, self.model.embed_tokens.weight.val().transpose(), None),
        })?)
    }
}
