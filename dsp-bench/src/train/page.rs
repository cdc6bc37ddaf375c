//! A run as one HTML page: curves, what was to be beaten, what was learnt. No script, nothing loaded from elsewhere.

use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use charts_rs::{Color, LineChart, NIL_VALUE, Series, SeriesCategory};
use minijinja::{AutoEscape, Environment, Value, context};

use super::config::RunConfig;
use super::run::{Line, Outcome};
use super::task::Shown;
use crate::report::round_axis;

/// Points of a curve: a long run's steps are averaged down to so many.
const POINTS: usize = 120;

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// A chart cannot be drawn.
    #[error("the page's chart of {chart}: {source}; metrics.jsonl has the same numbers")]
    Chart {
        /// What it shows.
        chart: &'static str,
        /// What the charts' crate said.
        source: charts_rs::Error,
    },
    /// The page cannot be filled in: a mistake in its template.
    #[error("the page's template: {0}; metrics.jsonl has the same numbers")]
    Template(#[from] minijinja::Error),
    /// A picture cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Picture {
        /// The picture.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// The page of a run that has ended.
///
/// # Errors
/// [`PageError`] if a chart fails or a picture cannot be read.
pub fn render(
    config: &RunConfig,
    metrics: &[Line],
    outcome: &Outcome,
) -> Result<String, PageError> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("page.html", include_str!("page.html"))?;
    let steps: Vec<(u64, [f64; 3])> = metrics
        .iter()
        .filter_map(|line| match line {
            Line::Step {
                step,
                loss,
                gradient_norm,
                learning_rate,
                ..
            } => Some((*step, [*loss, *gradient_norm, *learning_rate])),
            Line::HeldOut { .. } => None,
        })
        .collect();
    let held_out: Vec<(u64, f64)> = metrics
        .iter()
        .filter_map(|line| match line {
            Line::HeldOut { step, held_out } => Some((*step, *held_out)),
            Line::Step { .. } => None,
        })
        .collect();
    let first = steps.first().map_or(0, |(step, _)| *step);
    let last = steps.last().map_or(0, |(step, _)| *step);
    let axis = Axis::new(first, last);
    let of_steps = |which: usize, factor: f64| {
        axis.mean(
            steps
                .iter()
                .map(|(step, values)| (*step, values[which] * factor)),
        )
    };
    let mut errors = vec![
        ("loss of the step's samples", {
            // What is trained on may be another error than what is measured.
            of_steps(0, outcome.measure.factor)
        }),
        ("held out", axis.joined(&held_out)),
    ];
    for baseline in &outcome.baselines {
        errors.push((baseline.name, vec![baseline.error as f32; axis.points]));
    }
    let charts = vec![
        draw(&axis, outcome.measure.unit, errors)?,
        draw(
            &axis,
            "gradient norm",
            vec![("gradient norm", of_steps(1, 1.0))],
        )?,
        draw(
            &axis,
            "learning rate, thousandths",
            vec![("learning rate, thousandths", of_steps(2, 1e3))],
        )?,
    ];
    let mut shown = Vec::new();
    for what in &outcome.shown {
        shown.push(match what {
            Shown::Text(text) => context! { text },
            Shown::File(path, words) => {
                let bytes = std::fs::read(path).map_err(|source| PageError::Picture {
                    path: path.clone(),
                    source,
                })?;
                context! { words, picture => Value::from_safe_string(STANDARD.encode(bytes)) }
            }
        });
    }
    let baselines: Vec<Value> = outcome
        .baselines
        .iter()
        .map(|baseline| {
            let error = format!("{:.4}", baseline.error);
            context! { name => baseline.name, error, beaten => outcome.error < baseline.error }
        })
        .collect();
    let page = environment.get_template("page.html")?.render(context! {
        model => config.model.kind().name(),
        strategy => &config.strategy,
        mesh => config.mesh.to_string(),
        steps => config.training.steps,
        error => format!("{:.4}", outcome.error),
        unit => outcome.measure.unit,
        beats_all => outcome.beats_all(),
        baselines,
        charts,
        shown,
        config => config.to_toml().unwrap_or_default(),
    })?;
    Ok(page)
}

/// The steps along a chart.
struct Axis {
    first: u64,
    last: u64,
    points: usize,
}

impl Axis {
    fn new(first: u64, last: u64) -> Self {
        let all = (last - first + 1) as usize;
        Self {
            first,
            last,
            points: all.min(POINTS),
        }
    }

    /// The point that a step belongs to.
    fn point(&self, step: u64) -> usize {
        let all = self.last - self.first + 1;
        let past = step.clamp(self.first, self.last) - self.first;
        (past as usize * self.points) / all as usize
    }

    /// The step at the end of a point.
    fn step(&self, point: usize) -> u64 {
        let all = (self.last - self.first + 1) as usize;
        self.first + ((point + 1) * all).div_ceil(self.points) as u64 - 1
    }

    /// The mean of each point's values.
    fn mean(&self, values: impl Iterator<Item = (u64, f64)>) -> Vec<f32> {
        let mut sums = vec![(0.0, 0_u32); self.points];
        for (step, value) in values {
            let (sum, count) = &mut sums[self.point(step)];
            *sum += value;
            *count += 1;
        }
        let mean = |(sum, count): (f64, u32)| match count {
            0 => NIL_VALUE,
            count => (sum / f64::from(count)) as f32,
        };
        sums.into_iter().map(mean).collect()
    }

    /// Straight lines between values that are far from each other.
    fn joined(&self, values: &[(u64, f64)]) -> Vec<f32> {
        let at = |point: usize| {
            let step = self.step(point) as f64;
            let after = values.iter().position(|(other, _)| *other as f64 >= step)?;
            let (next, value) = values[after];
            let Some((before, from)) = after.checked_sub(1).map(|before| values[before]) else {
                return (next as f64 == step).then_some(value);
            };
            let part = (step - before as f64) / (next - before).max(1) as f64;
            Some(from + (value - from) * part)
        };
        (0..self.points)
            .map(|point| at(point).map_or(NIL_VALUE, |value| value as f32))
            .collect()
    }
}

/// Blue, orange, grey and a darker grey: told apart by lightness too, on a light page and on a dark one.
const COLOURS: [(u8, u8, u8); 4] = [
    (70, 130, 200),
    (232, 145, 45),
    (150, 158, 168),
    (110, 116, 126),
];

fn draw(
    axis: &Axis,
    about: &'static str,
    curves: Vec<(&'static str, Vec<f32>)>,
) -> Result<Value, PageError> {
    let legend: Vec<Value> = curves
        .iter()
        .enumerate()
        .map(|(index, (name, _))| {
            let (r, g, b) = COLOURS[index % COLOURS.len()];
            context! { name => *name, colour => format!("rgb({r},{g},{b})") }
        })
        .collect();
    let known = curves.iter().flat_map(|(_, values)| values);
    let known = known.filter(|value| **value != NIL_VALUE && value.is_finite());
    let largest = known.copied().fold(0.0, f32::max);
    let series = curves
        .into_iter()
        .enumerate()
        .map(|(index, (name, values))| {
            let mut series = Series::new(name.to_owned(), values);
            series.index = Some(index);
            series.category = Some(SeriesCategory::Line);
            series
        })
        .collect();
    let steps = (0..axis.points).map(|point| axis.step(point).to_string());
    let mut chart = LineChart::new(series, steps.collect());
    let text: Color = (128, 136, 146).into();
    let line: Color = (128, 136, 146, 70).into();
    chart.width = 900.0;
    chart.height = 320.0;
    chart.margin = (8.0, 12.0, 8.0, 8.0).into();
    chart.background_color = Color::transparent();
    chart.font_family = "Roboto, system-ui, sans-serif".to_owned();
    chart.legend.show = Some(false);
    chart.x_axis.font.color = text;
    chart.x_axis.stroke_color = line;
    chart.grid.stroke_color = line;
    chart.series.colors = COLOURS.into_iter().map(Color::from).collect();
    chart.series.symbol = None;
    let mut values = chart.y_axis_configs.first().cloned().unwrap_or_default();
    values.font.color = text;
    values.stroke_color = line;
    let (end, parts) = round_axis(largest);
    values.min = Some(0.0);
    values.max = Some(end);
    values.split_number = parts;
    chart.y_axis_configs = vec![values];
    let svg = chart.svg().map_err(|source| PageError::Chart {
        chart: about,
        source,
    })?;
    Ok(context! { about, legend, svg => Value::from_safe_string(svg) })
}

#[cfg(test)]
mod tests {
    use super::super::task::{Baseline, Measure};
    use super::*;
    use crate::scenario::ModelKind;

    #[test]
    fn a_long_axis_has_a_step_at_the_end_of_each_point_and_every_step_in_one() {
        let axis = Axis::new(11, 1010);
        assert_eq!(
            (axis.points, axis.point(11), axis.point(1010)),
            (120, 0, 119)
        );
        assert_eq!(axis.step(119), 1010);
        for point in 0..axis.points {
            assert_eq!(axis.point(axis.step(point)), point);
        }
        let short = Axis::new(1, 3);
        assert_eq!(
            short.mean([(1, 2.0), (3, 4.0)].into_iter()),
            [2.0, NIL_VALUE, 4.0]
        );
        assert_eq!(short.joined(&[(1, 2.0), (3, 4.0)]), [2.0, 3.0, 4.0]);
    }

    #[test]
    fn the_page_stands_alone_and_says_what_was_beaten() {
        let folder = tempfile::tempdir().unwrap();
        let picture = folder.path().join("map.png");
        std::fs::write(&picture, b"not really a picture").unwrap();
        let step = |step: u64| Line::Step {
            step,
            loss: 3.0 / step as f64,
            gradient_norm: 1.0,
            learning_rate: 1e-3,
            tokens_per_second: 100.0,
        };
        let mut metrics: Vec<Line> = (1..=9).map(step).collect();
        metrics.push(Line::HeldOut {
            step: 9,
            held_out: 0.5,
        });
        let baseline = |name, error| Baseline { name, error };
        let outcome = Outcome {
            error: 0.5,
            measure: Measure {
                unit: "bits a byte",
                factor: 1.0,
            },
            baselines: vec![baseline("easy", 1.0), baseline("hard", 0.25)],
            shown: vec![
                Shown::Text("once <upon> a time".to_owned()),
                Shown::File(picture, "a map".to_owned()),
            ],
        };
        let config = RunConfig::of_model(ModelKind::Lm).unwrap();
        let page = render(&config, &metrics, &outcome).unwrap();
        for part in [
            "0.5000 bits a byte",
            "once &lt;upon&gt; a time",
            "data:image/png;base64,bm90IHJlYWxseSBhIHBpY3R1cmU",
            "learning_rate = 0.003",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert_eq!(page.matches("<svg").count(), 3);
        assert_eq!(page.matches(">beaten<").count(), 1);
        assert_eq!(page.matches(">not beaten<").count(), 1);
        assert!(
            !page.contains("<script") && !page.contains("<link") && !page.contains("src=\"http")
        );
        // A run that was over before a step is a page too.
        assert!(render(&config, &[], &outcome).is_ok());
    }
}
