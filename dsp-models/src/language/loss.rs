//! Tokens that every rank knows, and the loss of the next one.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use dsp_core::fused::check_classes;
use dsp_core::{ModelShape, Shard};

use super::config::TOKENS;
use crate::error::ModelError;
use crate::layers::{Target, cross_entropy};

/// Tokens `[batch, length]`, the same on every rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    rows: Arc<[Vec<u32>]>,
}

impl Tokens {
    /// One row a sample, all of one length.
    ///
    /// # Errors
    /// [`ModelError::Shape`] if the rows differ in length.
    pub fn new(rows: Vec<Vec<u32>>) -> Result<Self, ModelError> {
        let length = rows.first().map_or(0, Vec::len);
        if let Some(row) = rows.iter().find(|row| row.len() != length) {
            return Err(ModelError::Shape {
                what: "a row of tokens",
                got: vec![row.len()],
                rule: format!("the first has {length}: all must have as many"),
            });
        }
        Ok(Self { rows: rows.into() })
    }

    /// How many rows, and how many tokens in each.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows.len(), self.rows.first().map_or(0, Vec::len)]
    }

    pub(crate) fn check(&self, model: &ModelShape, vocabulary: usize) -> Result<(), ModelError> {
        let expected = [model.batch, model.lengths.first().copied().unwrap_or(0)];
        if self.dims() != expected {
            return Err(ModelError::Shape {
                what: "the tokens",
                got: self.dims().to_vec(),
                rule: format!("the model was declared for {expected:?}"),
            });
        }
        let unknown = self
            .rows
            .iter()
            .flatten()
            .find(|&&token| token as usize >= vocabulary);
        match unknown {
            Some(&token) => Err(ModelError::Shape {
                what: "a token",
                got: vec![token as usize],
                rule: format!("the vocabulary has {vocabulary}, from 0"),
            }),
            None => Ok(()),
        }
    }

    /// The tokens at some positions of each row.
    pub(crate) fn at(&self, positions: &[Range<usize>]) -> Vec<Vec<i64>> {
        let of_row = |row: &Vec<u32>| {
            let positions = positions.iter().cloned().flatten();
            positions.map(|position| i64::from(row[position])).collect()
        };
        self.rows.iter().map(of_row).collect()
    }
}

/// This rank's terms of the loss: the cross-entropy of the token after each of its own positions, whichever rank
/// holds that one, over the *global* count of tokens that have a next one. The ranks' terms add up to the mean.
///
/// # Shapes
/// - `logits`: `[B, L, 1, 1, vocabulary]`, as [`CausalLm::forward`](super::CausalLm::forward) returns them
/// - returns: `[1]`, on a rank without positions too
///
/// # Errors
/// [`ModelError`] on every rank, if the logits are not those of as many rows and tokens, or a token is not in the
/// vocabulary.
pub fn next_token_loss(logits: &Shard, tokens: &Tokens) -> Result<Tensor<1>, ModelError> {
    let [batch, length] = tokens.dims();
    let [rows, _, _, _, vocabulary] = logits.tensor().dims();
    let of_logits = [rows, logits.layout().lengths()[TOKENS.index()]];
    if tokens.dims() != of_logits {
        return Err(ModelError::Shape {
            what: "the tokens",
            got: tokens.dims().to_vec(),
            rule: format!("the logits are those of {of_logits:?}"),
        });
    }
    check_classes(tokens.rows.iter().flatten().copied(), vocabulary)?;
    let positions: Vec<usize> = logits.positions(TOKENS).into_iter().flatten().collect();
    // A last token has no target: it counts nothing.
    let weight = 1.0 / (batch * length.saturating_sub(1)).max(1) as f64;
    let targets: Vec<Target> = (tokens.rows.iter())
        .flat_map(|row| positions.iter().map(|position| row.get(position + 1)))
        .map(|next| Target {
            class: next.copied().unwrap_or(0),
            weight: next.map_or(0.0, |_| weight),
        })
        .collect();
    Ok(cross_entropy(logits.tensor().clone(), &targets))
}
