//! Rotary position embedding: a position turns each pair of channels by an angle.
//!
//! ```text
//!   channels 2i, 2i+1 at position p:   (a, b) ↦ (a·cos θ − b·sin θ, b·cos θ + a·sin θ),   θ = p·base^(−2i/d)
//! ```
//!
//! Pairs are interleaved, as in RoFormer (Su et al., arXiv:2104.09864), or a channel of the first half is paired with
//! one of the second, as in LLaMA's published weights ([`Pairs`]). Positions are global: a rank reads them
//! from its shard's layout, so that a token is turned alike wherever it is held.

use std::convert::Infallible;
use std::ops::Range;

use burn::tensor::{Tensor, TensorData};
use dsp_core::linear::times;
use dsp_core::shape::reshape;
use dsp_core::vjp::attach1;

/// Which channels are turned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// `2i` and `2i + 1`.
    Interleaved,
    /// `i` and `i + d/2`.
    Halves,
}

impl Pairs {
    /// The pair of a channel.
    fn of(self, channel: usize, dim: usize) -> usize {
        match self {
            Self::Interleaved => channel / 2,
            Self::Halves => channel % (dim / 2),
        }
    }

    /// The two channels of a pair.
    fn channels(self, pair: usize, dim: usize) -> [usize; 2] {
        match self {
            Self::Interleaved => [2 * pair, 2 * pair + 1],
            Self::Halves => [pair, pair + dim / 2],
        }
    }
}

/// The angles of a rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// The channels of a head, an even number.
    pub dim: usize,
    /// The base of the frequencies: 10000.
    pub base: f64,
    /// Which channels are turned together.
    pub pairs: Pairs,
}

/// The cosines and sines of some positions.
#[derive(Debug, Clone)]
pub struct RotaryTables {
    /// `[positions, dim]`, each value for both channels of its pair.
    cos: Tensor<2>,
    sin: Tensor<2>,
    /// `[dim, dim]`: `x·turn` is `(−b, a)` for each pair `(a, b)`.
    turn: Tensor<2>,
}

impl Rotary {
    /// The usual base, and interleaved pairs.
    pub fn new(dim: usize) -> Self {
        Self {
            dim,
            base: 1e4,
            pairs: Pairs::Interleaved,
        }
    }

    /// The frequency of each pair of channels: `base^(−2i/dim)`.
    pub fn frequencies(&self) -> Vec<f64> {
        (0..self.dim / 2)
            .map(|pair| self.base.powf(-(2.0 * pair as f64) / self.dim as f64))
            .collect()
    }

    /// The tables for the given global positions, in the element type and on the device of `like`.
    pub fn tables<const D: usize>(
        &self,
        positions: &[Range<usize>],
        like: &Tensor<D>,
    ) -> RotaryTables {
        let options = (&like.clone().inner().device(), like.dtype());
        let frequencies = &self.frequencies();
        let count = positions.iter().map(ExactSizeIterator::len).sum::<usize>();
        let angles: Vec<f64> = (positions.iter().cloned().flatten())
            .flat_map(|position| {
                (0..self.dim).map(move |channel| {
                    position as f64 * frequencies[self.pairs.of(channel, self.dim)]
                })
            })
            .collect();
        let table = |function: fn(f64) -> f64| {
            let values: Vec<f64> = angles.iter().copied().map(function).collect();
            Tensor::from_data(TensorData::new(values, [count, self.dim]), options)
        };
        let mut turn = vec![0.0; self.dim * self.dim];
        for pair in 0..self.dim / 2 {
            let [first, second] = self.pairs.channels(pair, self.dim);
            turn[second * self.dim + first] = -1.0;
            turn[first * self.dim + second] = 1.0;
        }
        RotaryTables {
            cos: table(f64::cos),
            sin: table(f64::sin),
            turn: Tensor::from_data(TensorData::new(turn, [self.dim, self.dim]), options),
        }
    }
}

impl RotaryTables {
    /// Turns queries or keys.
    ///
    /// # Shapes
    /// - `x`: `[B, positions, n, heads, dim]`; returns the same
    ///
    /// # Gradient
    /// The turn the other way.
    pub fn apply(&self, x: Tensor<5>) -> Tensor<5> {
        let [positions, dim] = self.cos.dims();
        let cos = reshape(self.cos.clone(), [1, positions, 1, 1, dim]);
        let sin = reshape(self.sin.clone(), [1, positions, 1, 1, dim]);
        let turn = self.turn.clone();
        let inner = x.clone().inner();
        let y = inner.clone() * cos.clone() + times(inner, turn.clone()) * sin.clone();
        attach1(x, y, move |gradient: Tensor<5>| {
            let back = turn.clone().transpose();
            let turned = times(gradient.clone() * sin.clone(), back);
            Ok::<_, Infallible>(gradient * cos.clone() + turned)
        })
    }
}
