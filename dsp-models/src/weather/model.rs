//! The whole model, from fields on a grid to what it says the next ones are.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::linear::project;
use dsp_core::{Session, Shard};

use super::config::{LATITUDE, LONGITUDE, TIME, WeatherConfig};
use super::grid::Grid;
use super::layer::{Layer, NORM_EPSILON};
use crate::error::{ConfigError, ModelError};
use crate::layers::{RmsNorm, linear};
use crate::random::{Draws, Purpose};
use crate::weights::OriginalNames;

/// An axial transformer over time, latitude and longitude.
#[derive(Module, Debug)]
pub struct Weather {
    /// `[variables, C]`: a point's values.
    pub embed: Linear,
    /// `[4·harmonics, C]`, without a bias: a point's place on the sphere.
    pub place: Linear,
    /// `[2·SEASON_HARMONICS, C]`, without a bias: a time's season.
    pub season: Linear,
    /// The layers.
    pub layers: Vec<Layer>,
    /// After the last layer.
    pub norm: RmsNorm,
    /// `[C, variables]`.
    pub head: Linear,
}

impl OriginalNames for Weather {
    const RENAMED: &'static [(&'static str, &'static str)] = &[];
}

impl WeatherConfig {
    /// A model with parameters drawn from a seed, in the device's element type.
    ///
    /// # Errors
    /// [`ConfigError`] if the configuration describes no model.
    pub fn init(&self, seed: u64, device: &Device) -> Result<Weather, ConfigError> {
        self.check()?;
        let (hidden, block) = (self.hidden_size, self.block());
        let draws = &mut Draws::new(seed, Purpose::Parameters, 0);
        let unbiased = |features, draws: &mut Draws| Linear {
            bias: None,
            ..linear(features, hidden, draws, device)
        };
        Ok(Weather {
            embed: linear(self.variables, hidden, draws, device),
            place: unbiased(4 * self.harmonics, draws),
            season: unbiased(2 * Grid::SEASON_HARMONICS, draws),
            layers: (0..self.depth)
                .map(|_| Layer::new(&block, draws, device))
                .collect(),
            norm: RmsNorm::new(hidden, NORM_EPSILON, device),
            head: linear(hidden, self.variables, draws, device),
        })
    }
}

impl Weather {
    /// Runs the model on this rank's part of the fields.
    ///
    /// # Shapes
    /// - `fields`: `[B, T, lat, lon, variables]`, the same on every rank; `session`: of [`WeatherConfig::shape`]
    /// - returns: the same shape in the plan's output layout; at time `t`, the fields of `t + 1`
    ///
    /// # Gradient
    /// The fields' is each rank's terms, whose sum over the ranks is the gradient.
    ///
    /// # Errors
    /// [`ModelError`] if the fields do not fit the model, the grid or the session, or the ranks fail.
    pub fn forward(
        &self,
        fields: Tensor<5>,
        grid: &Grid,
        session: &Session,
    ) -> Result<Shard, ModelError> {
        self.check(&fields, grid)?;
        let fields = fields.cast(self.embed.weight.dtype());
        let x = session
            .split(fields)?
            .map(|fields| project(fields, &self.embed))?;
        let (place, season) = (self.places(&x, grid), self.seasons(&x, grid));
        let mut x = x.map(|x| x + place + season)?;
        let mut stages = session.stages();
        for layer in &self.layers {
            x = layer.forward(x, &mut stages)?;
        }
        let x = stages.finish(x)?;
        Ok(x.map(|x| project(self.norm.forward(x), &self.head))?)
    }

    fn check(&self, fields: &Tensor<5>, grid: &Grid) -> Result<(), ModelError> {
        let got = fields.dims();
        let variables = self.embed.weight.dims()[0];
        let [samples, times, rows, columns] = grid.dims();
        if got == [samples, times, rows, columns, variables] {
            return Ok(());
        }
        Err(ModelError::Shape {
            what: "the fields",
            got: got.to_vec(),
            rule: format!(
                "the grid has {samples} samples of {times} times, {rows} latitudes and {columns} longitudes, and \
                 the model {variables} variables"
            ),
        })
    }

    /// `[1, 1, lat, lon, C]` for the points that `x` holds.
    fn places(&self, x: &Shard, grid: &Grid) -> Tensor<5> {
        let [_, _, rows, columns, _] = x.tensor().dims();
        let features = self.place.weight.dims()[0];
        let (latitudes, longitudes) = (x.positions(LATITUDE), x.positions(LONGITUDE));
        let places = grid.places(&latitudes, &longitudes, features / 4);
        let places = TensorData::new(places, [1, 1, rows, columns, features]);
        let like = (&x.tensor().device(), x.tensor().dtype());
        project(Tensor::from_data(places, like), &self.place)
    }

    /// `[B, T, 1, 1, C]` for the times that `x` holds.
    fn seasons(&self, x: &Shard, grid: &Grid) -> Tensor<5> {
        let [samples, times, ..] = x.tensor().dims();
        let features = self.season.weight.dims()[0];
        let seasons = grid.seasons(&x.positions(TIME));
        let seasons = TensorData::new(seasons, [samples, times, 1, 1, features]);
        let like = (&x.tensor().device(), x.tensor().dtype());
        project(Tensor::from_data(seasons, like), &self.season)
    }
}
