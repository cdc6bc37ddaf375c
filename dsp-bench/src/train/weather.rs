//! A weather model learns the next fields.
//!
//! What it sees and says are *anomalies*: deviations from the climatology, the mean of the same twelfth of the year
//! over the times that are learnt from. Its head begins with zeros, so that its first forecast is the climatology.
//! The last third of the times is held out. The errors to beat are those of that climatology and of persistence
//! ("it stays as it is"), on the same times and points.

use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::precision::computed_in;
use dsp_core::strategy::Part;
use dsp_core::{Loss, ModelShape, Session};
use dsp_models::WeatherConfig;
use dsp_models::random::{Draws, Purpose};
use dsp_models::weather::{Grid, Weather, loss, roles};

use super::data::Data;
use super::picture::{self, FirstRow, Panel};
use super::task::{Baseline, Measure, Place, Samples, Shown, Stage, Task};
use crate::fields::{Fields, FieldsError};
use crate::subject::{SubjectError, WeatherSizes};

/// The parts of a year that have a climatology of their own.
const PARTS: f64 = 12.0;

/// A weather model on fields.
#[derive(Debug)]
pub(super) struct NextFields {
    config: WeatherConfig,
    /// Times of a sample.
    times: usize,
    /// The fields on the sample's grid, `[T, lat, lon, variables]`.
    fields: Vec<f32>,
    /// The climatology of the same times.
    climatology: Vec<f32>,
    /// Rows, columns, variables.
    shape: [usize; 3],
    latitudes: Vec<f64>,
    longitudes: Vec<f64>,
    seasons: Vec<f64>,
    /// The first time that is held out.
    first_held_out: usize,
    /// The first variable's name.
    variable: String,
}

impl NextFields {
    pub(super) fn new(sizes: &WeatherSizes, data: Option<Data>) -> Result<Self, SubjectError> {
        let all = match data {
            Some(data) => Fields::decode(&data.file, &data.bytes, &sizes.variables())?,
            None => Fields::built_in()?,
        };
        let thinned = all.thinned(sizes.latitudes, sizes.longitudes)?;
        let available = thinned.seasons.len();
        let first_held_out = available - available / 3;
        // A held-out sample begins a time earlier. Then there are enough to learn from too, of which a sample has one
        // time more than the model sees.
        if available / 3 < sizes.times {
            return Err(FieldsError::NoneHeldOut {
                file: thinned.source,
                times: sizes.times,
                held_out: available / 3,
                available,
            }
            .into());
        }
        let shape = [
            thinned.latitudes.len(),
            thinned.longitudes.len(),
            thinned.variables.len(),
        ];
        let climatology = climatology(&thinned, first_held_out);
        Ok(Self {
            config: sizes.config(),
            times: sizes.times,
            climatology,
            shape,
            first_held_out,
            variable: (thinned.variables.first())
                .map_or_else(String::new, |variable| variable.name.clone()),
            fields: thinned.values,
            latitudes: thinned.latitudes,
            longitudes: thinned.longitudes,
            seasons: thinned.seasons,
        })
    }

    fn area(&self) -> usize {
        self.shape.iter().product()
    }

    /// The first times of samples.
    fn starts(&self, samples: &Samples) -> Vec<usize> {
        match samples {
            Samples::Drawn { seed, numbers } => {
                let places = self.first_held_out - self.times;
                let place = |number| {
                    let uniform = Draws::new(*seed, Purpose::Samples, number).uniforms(1)[0];
                    (uniform * places as f64) as usize
                };
                numbers.clone().map(place).collect()
            }
            // Each held-out time is the next one of just one time.
            Samples::HeldOut(numbers) => {
                let start = |number| self.first_held_out - 1 + number * self.times;
                numbers.clone().map(start).collect()
            }
        }
    }

    fn grid(&self, starts: &[usize]) -> Result<Grid, SubjectError> {
        let seasons = |&start: &usize| self.seasons[start..start + self.times].to_vec();
        let grid = Grid::new(
            self.latitudes.clone(),
            self.longitudes.clone(),
            starts.iter().map(seasons).collect(),
        );
        Ok(grid.map_err(|source| FieldsError::Grid {
            file: self.variable.clone(),
            source,
        })?)
    }

    /// Anomalies of the times from `later` times after each start, `[B, T, lat, lon, variables]`.
    fn anomalies(&self, starts: &[usize], later: usize, place: &Place) -> Tensor<5> {
        let area = self.area();
        let mut values = Vec::with_capacity(starts.len() * self.times * area);
        for &start in starts {
            let range = (start + later) * area..(start + later + self.times) * area;
            let pairs = self.fields[range.clone()]
                .iter()
                .zip(&self.climatology[range]);
            values.extend(pairs.map(|(value, mean)| value - mean));
        }
        let [rows, columns, variables] = self.shape;
        let shape = [starts.len(), self.times, rows, columns, variables];
        Tensor::from_data(
            TensorData::new(values, shape),
            (&place.device.clone().without_autodiff(), place.dtype),
        )
    }

    /// The error of saying `forecast` of each held-out time: the mean square, by area.
    fn error_of(
        &self,
        forecast: impl Fn(usize) -> usize,
        table: &[f32],
    ) -> Result<f64, SubjectError> {
        let areas = self.grid(&[])?.areas();
        let [rows, columns, variables] = self.shape;
        let area = self.area();
        let times: Vec<usize> = (0..self.held_out() * self.times)
            .map(|time| self.first_held_out + time)
            .collect();
        let mut sum = 0.0;
        for &time in &times {
            for (row, weight) in areas.iter().enumerate().take(rows) {
                for point in row * columns * variables..(row + 1) * columns * variables {
                    let said = f64::from(table[forecast(time) * area + point]);
                    let error = said - f64::from(self.fields[time * area + point]);
                    sum += weight * error * error;
                }
            }
        }
        Ok(sum / (times.len() * columns * variables) as f64)
    }
}

/// The mean of each time's twelfth of the year over the times before `end`; the mean of all of them for a twelfth
/// that has none.
fn climatology(fields: &Fields, end: usize) -> Vec<f32> {
    let area = fields.values.len() / fields.seasons.len();
    let part = |time: usize| (fields.seasons[time].rem_euclid(1.0) * PARTS) as usize;
    let mean = |times: Vec<usize>| -> Vec<f32> {
        let mean = |point: usize| {
            let values = times
                .iter()
                .map(|time| f64::from(fields.values[time * area + point]));
            (values.sum::<f64>() / times.len() as f64) as f32
        };
        (0..area).map(mean).collect()
    };
    let of_all = mean((0..end).collect());
    let parts: Vec<Vec<f32>> = (0..PARTS as usize)
        .map(|wanted| {
            let times: Vec<usize> = (0..end).filter(|&time| part(time) == wanted).collect();
            match times.is_empty() {
                true => of_all.clone(),
                false => mean(times),
            }
        })
        .collect();
    let of_time = |time: usize| parts[part(time).min(parts.len() - 1)].clone();
    (0..fields.seasons.len()).flat_map(of_time).collect()
}

impl Task for NextFields {
    type Module = Weather;

    fn template(&self, seed: u64) -> Result<Weather, SubjectError> {
        let mut model = self.config.init(seed, &Device::flex())?;
        model.head.weight = model.head.weight.map(|weight| weight.zeros_like());
        model.head.bias = model
            .head
            .bias
            .map(|bias| bias.map(|bias| bias.zeros_like()));
        Ok(model)
    }

    fn shape(&self, samples: usize) -> ModelShape {
        let [rows, columns, _] = self.shape;
        self.config.shape(samples, self.times, rows, columns)
    }

    fn role(&self, path: &str) -> Part {
        roles(&self.config)(path)
    }

    fn tokens(&self) -> usize {
        self.times * self.shape[0] * self.shape[1]
    }

    fn held_out(&self) -> usize {
        (self.seasons.len() - self.first_held_out) / self.times
    }

    fn measure(&self) -> Measure {
        Measure {
            unit: "squared deviations, by area",
            factor: 1.0,
        }
    }

    fn baselines(&self) -> Result<Vec<Baseline>, SubjectError> {
        Ok(vec![
            Baseline {
                name: "climatology of the times that are learnt from",
                error: self.error_of(|time| time, &self.climatology)?,
            },
            Baseline {
                name: "persistence",
                error: self.error_of(|time| time - 1, &self.fields)?,
            },
        ])
    }

    fn loss(
        &self,
        module: &Weather,
        samples: &Samples,
        place: &Place,
        session: &Session,
    ) -> Result<Loss, SubjectError> {
        let starts = self.starts(samples);
        let grid = self.grid(&starts)?;
        let forecast = module.forward(self.anomalies(&starts, 0, place), &grid, session)?;
        // What is to be said is not rounded to what passes are computed in.
        let exact = Place {
            device: place.device.clone(),
            dtype: computed_in(place.dtype),
        };
        let next = self.anomalies(&starts, 1, &exact);
        Ok(Loss::OfShard(loss(&forecast, next, &grid)?))
    }

    fn show(&self, module: &Weather, stage: &Stage<'_>) -> Result<Vec<Shown>, SubjectError> {
        let start = self.seasons.len() - self.times - 1;
        let starts = [start];
        let fields = self.anomalies(&starts, 0, &stage.place);
        let forecast = module.forward(fields, &self.grid(&starts)?, stage.session)?;
        let forecast: Vec<f64> = (stage.session.gather(forecast)?.into_data())
            .iter::<f64>()
            .collect();
        if !stage.writes() {
            return Ok(vec![]);
        }
        let [rows, columns, variables] = self.shape;
        let (area, last) = (self.area(), start + self.times);
        let points = || (0..rows * columns).map(|point| point * variables);
        let at = |table: &[f32], time: usize| -> Vec<f64> {
            points()
                .map(|point| f64::from(table[time * area + point]))
                .collect()
        };
        let climate = at(&self.climatology, last);
        let said = &forecast[(self.times - 1) * area..];
        let said = points()
            .zip(&climate)
            .map(|(point, mean)| mean + said[point]);
        let maps = [
            at(&self.fields, last),
            said.collect(),
            climate.clone(),
            at(&self.fields, last - 1),
        ];
        let panels = maps.map(|values| Panel {
            values,
            rows,
            columns,
        });
        let first = match self.latitudes.first() < self.latitudes.last() {
            true => FirstRow::South,
            false => FirstRow::North,
        };
        let path = picture::maps(&stage.folder.join("forecast.png"), first, &panels)?;
        let words = format!(
            "{} of the last time: from the top truth, forecast, climatology, persistence",
            self.variable
        );
        Ok(vec![Shown::File(path, words)])
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;
    use dsp_models::weights::cast;

    use super::*;
    use crate::scenario::{ModelKind, ModelSizes};
    use crate::train::RunConfig;
    use crate::train::task::tests::assert_first_baseline;

    #[test]
    fn the_climatology_has_the_error_that_is_to_be_beaten_in_passes_of_bfloat16_too() {
        let run = RunConfig::of_model(ModelKind::Weather).unwrap();
        let small = ["model.times=6", "model.latitudes=5", "model.longitudes=4"];
        let run = run.with(&small.map(|change| change.parse().unwrap()));
        let ModelSizes::Weather(sizes) = run.unwrap().model else {
            panic!("the model is a weather model");
        };
        let task = NextFields::new(&sizes, None).unwrap();
        // Its first forecast is that.
        let module = cast(task.template(1).unwrap(), DType::BF16);
        assert_first_baseline(&task, &module);
    }
}
