//! adaLN-single: shifts, scales and gates of a block, from the timestep and the block's own table.
//!
//! The timestep is embedded once for all blocks; each block adds a table of six rows (PixArt-α,
//! arXiv:2310.00426, §2.3). Frames that a mask holds fixed are modulated as at timestep 0.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use dsp_core::Shard;
use dsp_core::fused::layer_norm;

use super::config::TIME;

/// Which frames are to be generated: per sample, one value for each of the video's time positions.
///
/// A frame that is not is given, clean, and takes the modulation of timestep 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameMask {
    generated: Arc<[Vec<bool>]>,
}

impl FrameMask {
    /// A mask from `generated[sample][frame]`.
    pub fn new(generated: Vec<Vec<bool>>) -> Self {
        Self {
            generated: generated.into(),
        }
    }

    /// Whether a frame of a sample is to be generated.
    ///
    /// # Panics
    /// If there is no such sample or frame.
    pub fn is_generated(&self, sample: usize, frame: usize) -> bool {
        self.generated[sample][frame]
    }

    /// The number of samples, and of frames if they all have as many.
    pub fn dims(&self) -> Option<[usize; 2]> {
        let frames = self.generated.first().map_or(0, Vec::len);
        let even = self.generated.iter().all(|sample| sample.len() == frames);
        even.then_some([self.generated.len(), frames])
    }

    /// `[B, T, 1, 1, 1]` for the frames that the shard holds: 1 where it is to be generated, else 0.
    fn at(&self, x: &Shard) -> Tensor<5> {
        let frames: Vec<usize> = x.positions(TIME).into_iter().flatten().collect();
        let values: Vec<f64> = (self.generated.iter())
            .flat_map(|sample| {
                frames
                    .iter()
                    .map(|&frame| f64::from(u8::from(sample[frame])))
            })
            .collect();
        let data = TensorData::new(values, [self.generated.len(), frames.len(), 1, 1, 1]);
        let like = x.tensor();
        Tensor::from_data(data, (&like.device(), like.dtype()))
    }
}

/// A vector for each sample, by timestep: the one that holds for frames to be generated, and, where some are
/// given, the mask and the one that holds for those.
#[derive(Debug, Clone)]
pub struct ByFrame<const D: usize> {
    /// At the sample's timestep.
    pub generated: Tensor<D>,
    /// At timestep 0, with the mask that says where it holds.
    pub given: Option<(FrameMask, Tensor<D>)>,
}

impl ByFrame<3> {
    /// The `rows` of a table, each `[B, 1 or T, 1, 1, C]`, for the frames that `x` holds.
    ///
    /// # Shapes
    /// - `table`: `[rows, C]`; `self`: `[B, rows, C]`, or `[B, 1, C]` for every row the same
    pub(crate) fn rows<const ROWS: usize>(
        &self,
        table: &Tensor<2>,
        x: &Shard,
    ) -> [Tensor<5>; ROWS] {
        let generated = rows(&self.generated, table);
        let Some((mask, given)) = &self.given else {
            return generated;
        };
        let given: [Tensor<5>; ROWS] = rows(given, table);
        let mask = mask.at(x);
        let inverse = mask.clone().neg().add_scalar(1.0);
        let mut pairs = generated.into_iter().zip(given);
        std::array::from_fn(|_| match pairs.next() {
            Some((generated, given)) => generated * mask.clone() + given * inverse.clone(),
            None => unreachable!("as many pairs as rows"),
        })
    }

    /// The two sets of rows apart, and the mask `[B, T, 1, 1, 1]` that chooses between them.
    pub(crate) fn rows_apart<const ROWS: usize>(
        &self,
        table: &Tensor<2>,
        x: &Shard,
    ) -> ([Tensor<5>; ROWS], Option<([Tensor<5>; ROWS], Tensor<5>)>) {
        let given = (self.given.as_ref()).map(|(mask, given)| (rows(given, table), mask.at(x)));
        (rows(&self.generated, table), given)
    }
}

fn rows<const ROWS: usize>(vectors: &Tensor<3>, table: &Tensor<2>) -> [Tensor<5>; ROWS] {
    let [batch, _, channels] = vectors.dims();
    let sums = vectors.clone() + table.clone().unsqueeze::<3>();
    std::array::from_fn(|row| {
        let row = sums.clone().narrow(1, row, 1);
        row.reshape([batch, 1, 1, 1, channels])
    })
}

/// A layer norm, times `1 + scale`, plus `shift`.
///
/// # Shapes
/// - `x`: `[B, T, S, 1, C]`; `shift`, `scale`: `[B, 1 or T, 1, 1, C]`; returns as `x`
pub(crate) fn modulated_norm(
    x: Tensor<5>,
    shift: Tensor<5>,
    scale: Tensor<5>,
    epsilon: f64,
) -> Tensor<5> {
    layer_norm(x, scale.add_scalar(1.0), shift, epsilon)
}
