//! Rotary position embedding: a position turns each pair of channels by an angle.
//!
//! ```text
//!   channels 2i, 2i+1 at position p:   (a, b) ↦ (a·cos θ − b·sin θ, b·cos θ + a·sin θ),   θ = p·base^(−2i/d)
//! ```
//!
//! Pairs are interleaved, as in RoFormer (Su et al., arXiv:2104.09864), or a channel of the first half is paired with
//! one of the second, as in LLaMA's published weights ([`Pairs`]). Positions are global: a rank reads them
//! from its shard's layout, so that a token is turned alike wherever it is held.

use std::ops::Range;

use burn::tensor::{Tensor, TensorData};
use dsp_core::fused::{Angles, Pairs, rotary};

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
    angles: Angles,
    pairs: Pairs,
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
            .flat_map(|position| frequencies.iter().map(move |f| position as f64 * f))
            .collect();
        let table = |function: fn(f64) -> f64| {
            let values: Vec<f64> = angles.iter().copied().map(function).collect();
            Tensor::from_data(TensorData::new(values, [count, self.dim / 2]), options)
        };
        RotaryTables {
            angles: Angles {
                cos: table(f64::cos),
                sin: table(f64::sin),
            },
            pairs: self.pairs,
        }
    }
}

impl RotaryTables {
    /// Turns queries or keys.
    ///
    /// # Shapes
    /// - `x`: `[B, positions, n1, n2, heads·dim]`; returns the same
    ///
    /// # Gradient
    /// The turn the other way.
    pub fn apply(&self, x: Tensor<5>) -> Tensor<5> {
        rotary(x, self.angles.clone(), self.pairs)
    }
}
