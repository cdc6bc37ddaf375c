//! Tokens that every rank knows, and the loss of the next one.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Int, Tensor, TensorData};
use dsp_core::shape::reshape;
use dsp_core::vjp::attach1;
use dsp_core::{ModelShape, Shard};

use super::config::TOKENS;
use crate::error::ModelError;

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
/// - returns: `[1]`
///
/// # Gradient
/// Its own: softmax less one at the target, from the logits alone; exact where there are no positions.
pub fn next_token_loss(logits: &Shard, tokens: &Tokens) -> Tensor<1> {
    let [batch, length] = tokens.dims();
    let vocabulary = logits.tensor().dims()[4];
    let positions: Vec<usize> = logits.positions(TOKENS).into_iter().flatten().collect();
    let rows = batch * positions.len();
    // A last token has no target: it counts nothing.
    let weight = 1.0 / (batch * length.saturating_sub(1)).max(1) as f64;
    let mut targets = Vec::with_capacity(rows);
    let mut weights = Vec::with_capacity(rows);
    for row in tokens.rows.iter() {
        for &position in &positions {
            let next = row.get(position + 1);
            targets.push(next.map_or(0, |&token| i64::from(token)));
            weights.push(if next.is_some() { weight } else { 0.0 });
        }
    }
    let x = logits.tensor().clone();
    let inner = x.clone().inner();
    let (device, dtype, dims) = (inner.device(), inner.dtype(), inner.dims());
    if rows == 0 {
        let zero = Tensor::zeros([1], (&device, dtype));
        return attach1(x, zero, move |gradient: Tensor<1>| {
            Ok::<_, Infallible>(Tensor::zeros(dims, (&gradient.device(), dtype)))
        });
    }
    let flat: Tensor<2> = reshape(inner, [rows, vocabulary]);
    let targets =
        Tensor::<2, Int>::from_data(TensorData::new(targets, [rows, 1]), (&device, DType::I64));
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [rows, 1]), (&device, dtype));
    let largest = flat.clone().max_dim(1);
    let sums = (flat.clone() - largest.clone()).exp().sum_dim(1);
    let logsumexp = largest + sums.log();
    let of_target = flat.clone().gather(1, targets.clone());
    let loss = ((logsumexp.clone() - of_target) * weights.clone()).sum();
    attach1(x, loss, move |gradient: Tensor<1>| {
        let probabilities = (flat.clone() - logsumexp.clone()).exp();
        let less = probabilities.scatter(
            1,
            targets.clone(),
            Tensor::full([rows, 1], -1.0, (&gradient.device(), dtype)),
            burn::tensor::IndexingUpdateOp::Add,
        );
        let gradient = reshape(gradient, [1, 1]);
        Ok::<_, Infallible>(reshape(less * weights.clone() * gradient, dims))
    })
}
