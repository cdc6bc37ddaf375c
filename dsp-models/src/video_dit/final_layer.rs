//! The last layer: a modulated norm and the projection to patches of the output.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use dsp_core::Shard;

use super::block::{NORM_EPSILON, modulation_table};
use super::modulation::{ByFrame, modulated_norm};
use crate::error::ModelError;
use crate::layers::linear;
use crate::random::Draws;
use dsp_core::linear::project;

/// The last layer of PixArt-α and its descendants.
#[derive(Module, Debug)]
pub struct FinalLayer {
    /// `[C, pt·ph·pw·channels]`.
    pub linear: Linear,
    /// `[2, C]`: what is added to the timestep's embedding, for the shift and for the scale.
    pub scale_shift_table: Param<Tensor<2>>,
}

impl FinalLayer {
    pub(crate) fn new(hidden: usize, outputs: usize, draws: &mut Draws, device: &Device) -> Self {
        Self {
            linear: linear(hidden, outputs, draws, device),
            scale_shift_table: modulation_table(2, hidden, draws, device),
        }
    }

    /// The output's patches.
    ///
    /// Given frames are modulated twice, first as at the sample's timestep, then, normalised again, as at
    /// timestep 0: so does the original, and weights that were trained with it need it.
    ///
    /// # Shapes
    /// - `x`: `[B, T, S, 1, C]`; `timestep`: `[B, 1, C]`; returns `[B, T, S, 1, outputs]`
    ///
    /// # Errors
    /// [`ModelError::Core`] if the mask does not fit the shard.
    pub fn forward(&self, x: Shard, timestep: &ByFrame<3>) -> Result<Shard, ModelError> {
        let table = self.scale_shift_table.val();
        let ([shift, scale], given) = timestep.rows_apart(&table, &x);
        Ok(x.map(|x| {
            let mut x = modulated_norm(x, shift, scale, NORM_EPSILON);
            if let Some(([shift, scale], mask)) = given {
                let given = modulated_norm(x.clone(), shift, scale, NORM_EPSILON);
                let inverse = mask.clone().neg().add_scalar(1.0);
                x = x * mask + given * inverse;
            }
            project(x, &self.linear)
        })?)
    }
}
