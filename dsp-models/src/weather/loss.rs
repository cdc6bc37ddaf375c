//! The loss of a forecast.
//!
//! At each point and time the model says what the fields are one time later. The error is squared and counted by
//! the area that its row of the grid stands for, so that the many points near the poles count no more than
//! others (as WeatherBench does; Rasp et al., arXiv:2002.00469).

use burn::tensor::{Tensor, TensorData};
use dsp_core::Shard;
use dsp_core::precision::computed;

use super::config::LATITUDE;
use super::grid::Grid;
use crate::error::ModelError;

/// What a model is trained on, the same on every rank.
#[derive(Debug, Clone)]
pub struct WeatherBatch {
    /// `[B, T, lat, lon, variables]`, on the rank's device.
    pub fields: Tensor<5>,
    /// The same one time later.
    pub next: Tensor<5>,
    /// Where and when `fields` are.
    pub grid: Grid,
}

/// This rank's terms of the loss: the squared errors at its own points, by area, over the *global* sum of areas.
/// The ranks' terms add up to the mean over samples, times, variables and the sphere.
///
/// # Shapes
/// - `forecast`: `[B, T, lat, lon, variables]`, as [`Weather::forward`](super::Weather::forward) returns it
/// - `next`: the same, whole on every rank
///
/// # Errors
/// [`ModelError`] if `next` is of another shape or on another grid.
pub fn loss(forecast: &Shard, next: Tensor<5>, grid: &Grid) -> Result<Tensor<1>, ModelError> {
    let [samples, times, _, columns] = grid.dims();
    let dims = next.dims();
    let variables = forecast.tensor().dims()[4];
    if dims[..4] != grid.dims() || dims[4] != variables {
        return Err(ModelError::Shape {
            what: "the next fields",
            got: dims.to_vec(),
            rule: format!(
                "the forecast is on a grid of {:?} with {variables} variables",
                grid.dims()
            ),
        });
    }
    let said = computed(forecast.tensor().clone());
    let like = (&next.device(), said.dtype());
    let next = Shard::split(next.cast(like.1), forecast.layout(), forecast.rank())?;

    let areas = grid.areas();
    let count = (samples * times * columns * variables) as f64;
    let weights: Vec<f64> = (forecast.positions(LATITUDE).into_iter().flatten())
        .map(|row| areas[row] / count)
        .collect();
    let rows = weights.len();
    let weights = Tensor::from_data(TensorData::new(weights, [1, 1, rows, 1, 1]), like);

    let error = said - next.into_tensor();
    Ok((error.clone() * error * weights).sum())
}
