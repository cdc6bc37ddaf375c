//! The axial weather model on fields: the error of its forecast, by area.

use std::path::PathBuf;
use std::sync::Arc;

use burn::tensor::{Device, TensorData};
use dsp_core::{Loss, ModelShape, Placed, Session};
use dsp_models::WeatherConfig;
use dsp_models::weather::{Grid, Weather, loss, roles};
use dsp_models::weights::cast;
use serde::{Deserialize, Serialize};

use super::{Description, Output, Pass, Run, Sizes, Subject, SubjectError, Workload};
use crate::fields::{self, BUILT_IN_VARIABLES, Fields, FieldsError};
use crate::scenario::{DEEPEST, LONGEST, Rules, Scenario, ScenarioError};

/// The sizes of a weather model and of the fields that it sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeatherSizes {
    /// The NetCDF file, relative as a clip is. `None`: the built-in winds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fields: Option<PathBuf>,
    /// The file's variables; `None`: those of the built-in winds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<Vec<String>>,
    /// Times that a sample has.
    pub times: usize,
    /// Rows of the grid.
    pub latitudes: usize,
    /// Columns of the grid.
    pub longitudes: usize,
    /// Layers, each of three attentions and a feed-forward.
    pub depth: usize,
    /// Channels of a point.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the feed-forward over `hidden`.
    pub mlp_ratio: f64,
}

impl WeatherSizes {
    pub(crate) fn variables(&self) -> Vec<&str> {
        match &self.variables {
            Some(variables) => variables.iter().map(String::as_str).collect(),
            None => BUILT_IN_VARIABLES.to_vec(),
        }
    }

    pub(crate) fn config(&self) -> WeatherConfig {
        WeatherConfig::new(self.variables().len())
            .with_hidden_size(self.hidden)
            .with_depth(self.depth)
            .with_num_heads(self.heads)
            .with_mlp_ratio(self.mlp_ratio)
    }

    pub(crate) fn read_fields(&self) -> Result<Fields, FieldsError> {
        match &self.fields {
            Some(path) => Fields::read(path, &self.variables()),
            None => Fields::built_in(),
        }
    }
}

impl Sizes for WeatherSizes {
    fn check(&self, _batch: usize, rules: &Rules<'_>) -> Result<(), ScenarioError> {
        let extents = [
            ("model.times", self.times),
            ("model.latitudes", self.latitudes),
            ("model.longitudes", self.longitudes),
        ];
        rules.within(LONGEST, &extents)?;
        rules.within(DEEPEST, &[("model.depth", self.depth)])?;
        rules.rotary_heads(self.hidden, self.heads)?;
        rules.mlp_ratio(self.mlp_ratio, self.hidden)?;
        let variables = self.variables();
        rules.hold(
            !variables.is_empty(),
            "model.variables",
            &variables,
            "must name at least one variable of the fields",
        )?;
        rules.hold(
            self.fields.is_some() || self.variables.is_none(),
            "model.variables",
            &variables,
            format!(
                "the built-in fields are {} already; leave the key out, or name a file under model.fields",
                BUILT_IN_VARIABLES.join(" and ")
            ),
        )
    }

    fn file(&mut self) -> &mut Option<PathBuf> {
        &mut self.fields
    }

    fn describe(&self, _batch: usize) -> Description {
        let layers = if self.depth == 1 { "layer" } else { "layers" };
        let fields = match &self.fields {
            Some(path) => path.display().to_string(),
            None => fields::BUILT_IN_NAME.to_owned(),
        };
        Description {
            noun: "weather transformer",
            data: "fields",
            model: format!(
                "axial weather model, {} {layers}, hidden {}, {} heads",
                self.depth, self.hidden, self.heads
            ),
            tokens: format!(
                "{} times × {} latitudes × {} longitudes",
                self.times, self.latitudes, self.longitudes
            ),
            facts: vec![
                (
                    "layers",
                    format!(
                        "attention over time (causal), over latitude and over longitude, feed-forward {}×",
                        self.mlp_ratio
                    ),
                ),
                (
                    "input",
                    format!("the fields {}", self.variables().join(", ")),
                ),
                ("fields", fields),
            ],
        }
    }

    fn subject(&self, scenario: &Scenario) -> Result<Arc<dyn Subject>, SubjectError> {
        let fields = self.read_fields()?;
        let batch = fields.batch(scenario.batch, self.times, self.latitudes, self.longitudes)?;
        let config = self.config();
        let template = config.init(scenario.seed, &Device::flex())?;
        Ok(Arc::new(Forecast {
            config,
            template: cast(template, scenario.dtype.dtype()),
            fields: TensorData::new(batch.fields, batch.shape),
            next: TensorData::new(batch.next, batch.shape),
            grid: batch.grid,
        }))
    }
}

#[derive(Debug)]
struct Forecast {
    config: WeatherConfig,
    template: Weather,
    /// `[B, T, lat, lon, variables]`
    fields: TensorData,
    /// The same one time later.
    next: TensorData,
    grid: Grid,
}

impl Workload for Forecast {
    type Module = Weather;

    fn shape(&self) -> ModelShape {
        let [batch, times, latitudes, longitudes] = self.grid.dims();
        self.config.shape(batch, times, latitudes, longitudes)
    }

    fn place(&self, session: &Session, device: &Device) -> Placed<Weather> {
        session.place(&self.template, roles(&self.config), device)
    }

    fn forward(
        &self,
        module: &Weather,
        pass: &Pass,
        session: &Session,
    ) -> Result<Run, SubjectError> {
        let fields = pass.input(&self.fields);
        let output = module.forward(fields.clone(), &self.grid, session)?;
        let loss = loss(&output, pass.constant(&self.next), &self.grid)?;
        Ok(Run {
            input: Some(fields),
            output: Output::Shard(output),
            loss: Loss::OfShard(loss),
        })
    }
}
