//! A causal language model on text: the cross-entropy of the next byte.

use std::path::PathBuf;
use std::sync::Arc;

use burn::tensor::Device;
use dsp_core::{Loss, Mask, ModelShape, Placed, Session};
use dsp_models::language::{CausalLm, LanguageConfig, Layers, Tokens, next_token_loss, roles};
use dsp_models::weights::cast;
use serde::{Deserialize, Serialize};

use super::{Description, Output, Pass, Run, Sizes, Subject, SubjectError, Workload};
use crate::scenario::{DEEPEST, LONGEST, Rules, Scenario, ScenarioError, WIDEST};
use crate::text::{self, Text, TextError, VOCABULARY};

/// The sizes of a language model and of the text that it sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageSizes {
    /// The text file, relative as a clip is. `None`: the built-in text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<PathBuf>,
    /// Tokens of a sample; a token is a byte.
    pub tokens: usize,
    /// Layers.
    pub depth: usize,
    /// Channels of a token.
    pub hidden: usize,
    /// The inner width of the feed-forward.
    pub inner: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads of softmax attention.
    pub key_value_heads: usize,
    /// Which layers attend linearly: `"softmax"` (none), `"linear"` (all) or `{ hybrid = { softmax_every = 4 } }`.
    pub layers: Layers,
}

impl LanguageSizes {
    pub(crate) fn config(&self) -> LanguageConfig {
        LanguageConfig::new(
            VOCABULARY,
            self.hidden,
            self.inner,
            self.depth,
            self.heads,
            self.key_value_heads,
        )
        .with_layers(self.layers)
    }

    pub(crate) fn read_text(&self) -> Result<Text, TextError> {
        match &self.text {
            Some(path) => Text::read(path),
            None => Ok(Text::built_in()),
        }
    }
}

impl Sizes for LanguageSizes {
    fn check(&self, _batch: usize, rules: &Rules<'_>) -> Result<(), ScenarioError> {
        rules.hold(
            (2..=LONGEST).contains(&self.tokens),
            "model.tokens",
            &self.tokens,
            format!("must be at least 2, as each token is said from those before it, and at most {LONGEST}"),
        )?;
        rules.within(DEEPEST, &[("model.depth", self.depth)])?;
        rules.within(WIDEST, &[("model.inner", self.inner)])?;
        rules.rotary_heads(self.hidden, self.heads)?;
        let shared = ("model.key_value_heads", self.key_value_heads);
        rules.within(WIDEST, &[shared])?;
        rules.hold(
            self.heads.is_multiple_of(shared.1),
            shared.0,
            &shared.1,
            format!(
                "must divide model.heads = {}, for as many query heads share each key-value head",
                self.heads
            ),
        )?;
        match self.layers {
            Layers::Hybrid { softmax_every } => {
                rules.at_least_one(&[("model.layers.hybrid.softmax_every", softmax_every)])
            }
            Layers::Softmax | Layers::Linear => Ok(()),
        }
    }

    fn file(&mut self) -> &mut Option<PathBuf> {
        &mut self.text
    }

    fn describe(&self, _batch: usize) -> Description {
        let layers = if self.depth == 1 { "layer" } else { "layers" };
        let text = match &self.text {
            Some(path) => path.display().to_string(),
            None => text::BUILT_IN_NAME.to_owned(),
        };
        let attention = match self.layers {
            Layers::Softmax => "softmax attention with rotary positions".to_owned(),
            Layers::Linear => "linear attention with decay".to_owned(),
            Layers::Hybrid { softmax_every } => {
                format!(
                    "linear attention with decay, and softmax attention in each {softmax_every}. layer"
                )
            }
        };
        Description {
            noun: "language model",
            data: "text",
            model: format!(
                "causal language model, {} {layers}, hidden {}, {} heads, {} of keys and values",
                self.depth, self.hidden, self.heads, self.key_value_heads
            ),
            tokens: format!("{} tokens", self.tokens),
            facts: vec![
                (
                    "layers",
                    format!("{attention}; SwiGLU of {} features", self.inner),
                ),
                ("input", "a token is a byte of the text".to_owned()),
                ("text", text),
            ],
        }
    }

    fn subject(&self, scenario: &Scenario) -> Result<Arc<dyn Subject>, SubjectError> {
        let config = self.config();
        let template = config.init(scenario.seed, &Device::flex())?;
        let rows = self.read_text()?.samples(scenario.batch, self.tokens)?;
        Ok(Arc::new(NextToken {
            template: cast(template, scenario.dtype.dtype()),
            tokens: Tokens::new(rows)?,
            config,
        }))
    }
}

#[derive(Debug)]
struct NextToken {
    config: LanguageConfig,
    template: CausalLm,
    tokens: Tokens,
}

impl Workload for NextToken {
    type Module = CausalLm;

    fn shape(&self) -> ModelShape {
        let [batch, length] = self.tokens.dims();
        self.config.shape(batch, length, &Mask::Causal)
    }

    fn place(&self, session: &Session, device: &Device) -> Placed<CausalLm> {
        session.place(&self.template, roles(&self.config), device)
    }

    fn forward(
        &self,
        module: &CausalLm,
        _pass: &Pass,
        session: &Session,
    ) -> Result<Run, SubjectError> {
        let logits = module.forward(&self.tokens, session)?;
        let loss = next_token_loss(&logits, &self.tokens)?;
        Ok(Run {
            input: None,
            output: Output::Shard(logits),
            loss: Loss::OfShard(loss),
        })
    }
}
