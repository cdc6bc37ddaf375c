//! A comparison as one HTML file: charts as inline SVG, no script, nothing loaded from elsewhere.
//!
//! The page is `report.html` (minijinja); the charts are horizontal bars by charts-rs, each drawn
//! twice, for light and for dark pages, of which the page's style shows one.

use charts_rs::{Color, HorizontalBarChart, Series};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};
use serde::Serialize;

use crate::record::{
    Comparison, Difference, Measured, Outcome, RELATIVE_FLOOR, Sent, bytes, label, scientific,
    seconds,
};

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// A chart cannot be drawn.
    #[error(
        "the report's chart of {chart}: {source}; --json gives the same numbers without charts"
    )]
    Chart {
        /// What it shows.
        chart: &'static str,
        /// What the charts' crate said.
        source: charts_rs::Error,
    },
    /// The page cannot be filled in: a mistake in its template.
    #[error("the report's template report.html: {0}; --json gives the same numbers")]
    Template(#[from] minijinja::Error),
}

/// The whole report as HTML; `trace` names a Perfetto trace that was written beside it.
///
/// # Errors
/// [`ReportError`] if a chart or the template fails; nothing that a scenario says leads there.
pub fn render(comparison: &Comparison, trace: Option<&str>) -> Result<String, ReportError> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_filter("bytes", bytes);
    environment.add_filter("seconds", seconds);
    environment.add_filter("grouped", grouped);
    environment.add_filter("scientific", |value: Option<f64>| {
        scientific(value.unwrap_or(f64::INFINITY))
    });
    environment.add_template("report.html", include_str!("report.html"))?;
    let page = environment
        .get_template("report.html")?
        .render(context(comparison, trace)?)?;
    Ok(page)
}

/// What the template shows.
fn context(comparison: &Comparison, trace: Option<&str>) -> Result<Value, ReportError> {
    let scenario = &comparison.scenario;
    let model = scenario.model.sizes().describe(scenario.batch);
    let any_timed = comparison.timed().next().is_some();
    let parallel = comparison.timed().any(|(row, _)| row.ranks > 1);
    let charts = [
        (any_timed, time_chart as fn(&Comparison) -> Chart),
        (parallel, traffic_chart),
        (any_timed, memory_chart),
    ];
    let mut drawn = Vec::new();
    for (wanted, chart) in charts {
        drawn.push(if wanted {
            Some(chart(comparison).svg()?)
        } else {
            None
        });
    }
    let mut drawn = drawn.into_iter();
    Ok(context! {
        comparison => Value::from(Serde(comparison)),
        title => format!("{}: strategies side by side", scenario.name),
        noun => model.noun,
        data => model.data,
        model => model.model,
        tokens => model.tokens,
        facts => model.facts,
        finding => comparison.finding(),
        well => comparison.all_well(),
        date => date(comparison.started_unix_seconds),
        passes => scenario.passes.label(),
        dtype => scenario.dtype.label(),
        floor => RELATIVE_FLOOR,
        shared => comparison.shared(),
        rounds => comparison.rounds(),
        time_chart => drawn.next(),
        traffic_chart => drawn.next(),
        memory_chart => drawn.next(),
        equality => Value::from(Serde(equality_rows(comparison))),
        costs => Value::from(Serde(cost_rows(comparison))),
        ranks => Value::from(Serde(rank_rows(comparison))),
        reasons => Value::from(Serde(reasons(comparison))),
        trace => trace,
    })
}

#[derive(Serialize)]
struct EqualityRow {
    case: String,
    holds: bool,
    parts: [Option<Difference>; 3],
}

fn equality_rows(comparison: &Comparison) -> Vec<EqualityRow> {
    comparison
        .rows
        .iter()
        .filter_map(|row| {
            let equality = match &row.outcome {
                Outcome::Timed(measured) => &measured.equality,
                Outcome::Unequal { equality } => equality,
                Outcome::Refused { .. } | Outcome::Error { .. } => return None,
            };
            Some(EqualityRow {
                case: row.case(),
                holds: equality.holds(),
                parts: [
                    Some(equality.output.clone()),
                    equality.input_gradient.clone(),
                    equality.parameter_gradients.clone(),
                ],
            })
        })
        .collect()
}

#[derive(Serialize)]
struct CostRow<'a> {
    case: String,
    oversubscribed: bool,
    measured: &'a Measured,
    mean: crate::record::RankSeconds,
    busiest: Sent,
    gradients_bytes: u64,
    equal: bool,
}

fn cost_rows(comparison: &Comparison) -> Vec<CostRow<'_>> {
    comparison
        .timed()
        .map(|(row, measured)| CostRow {
            case: row.case(),
            oversubscribed: row.oversubscribed,
            measured,
            mean: measured.time.mean(),
            busiest: measured.traffic.busiest(),
            gradients_bytes: measured.traffic.gradients_bytes(),
            equal: measured.traffic.equals_formula(),
        })
        .collect()
}

#[derive(Serialize)]
struct RankRow {
    case: String,
    rank: usize,
    spent: Option<crate::record::RankSeconds>,
    parts: [Sent; 3],
    equal: bool,
}

fn rank_rows(comparison: &Comparison) -> Vec<RankRow> {
    comparison
        .timed()
        .filter(|(row, _)| row.ranks > 1)
        .flat_map(|(row, measured)| {
            measured
                .traffic
                .per_rank
                .iter()
                .enumerate()
                .map(|(rank, sent)| {
                    let parts = [sent.forward, sent.backward, sent.parameters];
                    RankRow {
                        case: row.case(),
                        rank,
                        spent: measured.time.per_rank.get(rank).copied(),
                        equal: parts.iter().all(|s| s.measured_bytes == s.formula_bytes),
                        parts,
                    }
                })
        })
        .collect()
}

#[derive(Serialize)]
struct Reason {
    case: String,
    what: &'static str,
    why: String,
}

/// The cases that have no times, and why.
fn reasons(comparison: &Comparison) -> Vec<Reason> {
    comparison
        .rows
        .iter()
        .filter_map(|row| {
            let (what, why) = match &row.outcome {
                Outcome::Timed(_) => return None,
                Outcome::Refused { reason } => ("refused", reason.clone()),
                Outcome::Error { message } => ("failed", message.clone()),
                Outcome::Unequal { equality } => (
                    "not equal",
                    format!(
                        "largest relative error: {}; allowed: {}; so it was not timed",
                        scientific(equality.worst_relative()),
                        scientific(equality.tolerance)
                    ),
                ),
            };
            Some(Reason {
                case: row.case(),
                what,
                why,
            })
        })
        .collect()
}

/// Horizontal bars: for each case one value of each series, stacked or side by side.
struct Chart {
    about: &'static str,
    stacked: bool,
    unit: &'static str,
    cases: Vec<String>,
    series: Vec<(&'static str, Colour, Vec<f32>)>,
}

/// A series' place in the palette; `report.html` has the same three, for the legends.
#[derive(Debug, Clone, Copy)]
enum Colour {
    Blue,
    Orange,
    Grey,
}

/// The palette on a light page and on a dark one, told apart by lightness too.
const LIGHT: [(u8, u8, u8); 3] = [(44, 95, 163), (232, 145, 45), (160, 168, 178)];
const DARK: [(u8, u8, u8); 3] = [(110, 163, 232), (242, 166, 74), (110, 118, 130)];

/// A chart as the template takes it.
#[derive(Debug, Clone)]
struct Drawn {
    about: &'static str,
    light: Value,
    dark: Value,
    legend: Vec<(&'static str, &'static str)>,
}

impl From<Drawn> for Value {
    fn from(drawn: Drawn) -> Self {
        let legend: Vec<Value> = drawn
            .legend
            .into_iter()
            .map(|(name, colour)| context! { name, colour })
            .collect();
        context! { about => drawn.about, light => drawn.light, dark => drawn.dark, legend }
    }
}

impl Chart {
    /// Both drawings and the legend, which is HTML: its font is the page's.
    fn svg(&self) -> Result<Drawn, ReportError> {
        Ok(Drawn {
            about: self.about,
            light: Value::from_safe_string(self.draw(false)?),
            dark: Value::from_safe_string(self.draw(true)?),
            legend: self
                .series
                .iter()
                .map(|(name, colour, _)| (*name, colour.class()))
                .collect(),
        })
    }

    /// The end of the axis and its parts: round numbers that leave the longest bar room.
    fn axis(&self) -> (f32, usize) {
        let bars = (0..self.cases.len()).map(|case| {
            let values = self.series.iter().map(|(_, _, values)| values[case]);
            if self.stacked {
                values.sum()
            } else {
                values.fold(0.0, f32::max)
            }
        });
        round_axis(bars.fold(0.0, f32::max))
    }

    fn draw(&self, dark: bool) -> Result<String, ReportError> {
        let text: Color = if dark { (205, 211, 220) } else { (60, 66, 76) }.into();
        let line: Color = if dark { (60, 66, 76) } else { (221, 225, 231) }.into();
        let palette = if dark { DARK } else { LIGHT };
        let case_height = if self.stacked { 30.0 } else { 44.0 };

        // charts-rs lays the first case lowest, and the first of a case's bars highest.
        let series = self
            .series
            .iter()
            .map(|(name, colour, values)| {
                let values = values.iter().rev().copied().collect();
                let mut series = Series::new((*name).to_owned(), values);
                series.index = Some(*colour as usize);
                series.stack = self.stacked.then(|| "all".to_owned());
                series
            })
            .collect();
        // The spaces keep the names off the axis where the page's font is wider than the chart's.
        let cases = self.cases.iter().rev();
        let cases = cases
            .map(|case| format!("{case}\u{a0}\u{a0}\u{a0}\u{a0}\u{a0}"))
            .collect();
        let mut chart = HorizontalBarChart::new(series, cases);
        chart.width = 900.0;
        chart.height = 40.0 + case_height * self.cases.len() as f32;
        chart.margin = (4.0, 6.0, 40.0, 4.0).into();
        chart.background_color = Color::transparent();
        chart.font_family = "Roboto, system-ui, sans-serif".to_owned();
        chart.legend.show = Some(false);
        chart.x_axis.font.color = text;
        chart.x_axis.font.size = 14.0;
        chart.x_axis.stroke_color = line;
        chart.grid.stroke_color = line;
        chart.series.colors = palette.into_iter().map(Color::from).collect();
        let (end, parts) = self.axis();
        let mut values = chart.y_axis_configs.first().cloned().unwrap_or_default();
        values.font.color = text;
        values.font.size = 13.0;
        values.stroke_color = line;
        values.min = Some(0.0);
        values.max = Some(end);
        values.split_number = parts;
        values.formatter = Some(format!("{{c}} {}", self.unit));
        chart.y_axis_configs = vec![values];
        chart.svg().map_err(|source| ReportError::Chart {
            chart: self.about,
            source,
        })
    }
}

/// The end of an axis that begins at 0, and its parts: round numbers that leave the largest value room, of one decimal at
/// most, as the charts write no more.
pub(crate) fn round_axis(largest: f32) -> (f32, usize) {
    if largest <= 0.0 || !largest.is_finite() {
        return (1.0, 4);
    }
    let magnitude = 10_f32.powf(largest.log10().floor());
    let step = [0.1, 0.2, 0.5, 1.0, 2.0]
        .into_iter()
        .map(|part| (part * magnitude).max(0.1))
        .find(|step| largest <= 6.0 * step)
        .unwrap_or(2.0 * magnitude);
    let parts = (largest / step).ceil().max(1.0);
    (parts * step, parts as usize)
}

impl Colour {
    /// Its class in the page's style.
    fn class(self) -> &'static str {
        match self {
            Self::Blue => "blue",
            Self::Orange => "orange",
            Self::Grey => "grey",
        }
    }
}

fn time_chart(comparison: &Comparison) -> Chart {
    let slowest = comparison
        .timed()
        .map(|(_, measured)| measured.time.median_seconds)
        .fold(0.0, f64::max);
    let (unit, scale) = if slowest < 1.0 {
        ("ms", 1e3)
    } else {
        ("s", 1.0)
    };
    let mut series = vec![
        ("compute", Colour::Blue, Vec::new()),
        ("communication", Colour::Orange, Vec::new()),
        ("waiting", Colour::Grey, Vec::new()),
    ];
    let mut cases = Vec::new();
    for (row, measured) in comparison.timed() {
        let mean = measured.time.mean();
        for ((_, _, values), part) in series.iter_mut().zip([
            mean.compute_seconds,
            mean.communication_seconds,
            mean.waiting_seconds,
        ]) {
            values.push((part * scale) as f32);
        }
        cases.push(format!(
            "{} × {}{}\u{a0}\u{a0}{}",
            label(&row.strategy),
            row.ranks,
            if row.oversubscribed { "*" } else { "" },
            seconds(measured.time.median_seconds)
        ));
    }
    Chart {
        about: "time",
        stacked: true,
        unit,
        cases,
        series,
    }
}

fn traffic_chart(comparison: &Comparison) -> Chart {
    let sent: Vec<_> = comparison
        .timed()
        .filter(|(row, _)| row.ranks > 1)
        .map(|(row, measured)| (row, measured.traffic.busiest()))
        .collect();
    let most = sent
        .iter()
        .map(|(_, sent)| sent.measured_bytes.max(sent.formula_bytes))
        .max();
    let (unit, scale) = byte_unit(most.unwrap_or(0));
    let values = |part: fn(&Sent) -> u64| {
        sent.iter()
            .map(|(_, sent)| (part(sent) as f64 / scale) as f32)
            .collect()
    };
    Chart {
        about: "bytes",
        stacked: false,
        unit,
        cases: sent
            .iter()
            .map(|(row, sent)| {
                format!(
                    "{} × {}\u{a0}\u{a0}{}",
                    label(&row.strategy),
                    row.ranks,
                    bytes(sent.measured_bytes)
                )
            })
            .collect(),
        series: vec![
            ("measured", Colour::Blue, values(|sent| sent.measured_bytes)),
            (
                "by formula",
                Colour::Grey,
                values(|sent| sent.formula_bytes),
            ),
        ],
    }
}

fn memory_chart(comparison: &Comparison) -> Chart {
    let most = comparison
        .timed()
        .map(|(_, measured)| measured.memory.peak_bytes)
        .max();
    let (unit, scale) = byte_unit(most.unwrap_or(0));
    let mut before = Vec::new();
    let mut added = Vec::new();
    let mut cases = Vec::new();
    for (row, measured) in comparison.timed() {
        let memory = measured.memory;
        before.push((memory.before_bytes as f64 / scale) as f32);
        let more = memory.peak_bytes.saturating_sub(memory.before_bytes);
        added.push((more as f64 / scale) as f32);
        cases.push(format!(
            "{} × {}\u{a0}\u{a0}{}",
            label(&row.strategy),
            row.ranks,
            bytes(memory.peak_bytes)
        ));
    }
    Chart {
        about: "memory",
        stacked: true,
        unit,
        cases,
        series: vec![
            ("held before the case", Colour::Grey, before),
            ("added by it", Colour::Blue, added),
        ],
    }
}

fn byte_unit(most: u64) -> (&'static str, f64) {
    match most {
        0..1_000_000 => ("kB", 1e3),
        1_000_000..1_000_000_000 => ("MB", 1e6),
        _ => ("GB", 1e9),
    }
}

/// `18 874 368`, with spaces at which no line breaks.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    grouped
}

/// `2026-11-24 07:20 UTC`, from seconds since 1970 (days to a date after Howard Hinnant's
/// "chrono-compatible low-level date algorithms").
fn date(unix_seconds: u64) -> String {
    let days = unix_seconds / 86_400 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let minutes = unix_seconds % 86_400 / 60;
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02} UTC",
        minutes / 60,
        minutes % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::sample;

    fn everything() -> Comparison {
        let mut comparison = sample::comparison(2);
        let mut broken = sample::equality(0.5);
        broken.output = Difference::between("output", &[1.0], &[f64::NAN]);
        comparison.push("ring", 2, Outcome::Unequal { equality: broken });
        comparison.push(
            "usp",
            3,
            Outcome::Refused {
                reason: "3 ranks are no mesh <2×2>".into(),
            },
        );
        comparison.push(
            "lss",
            4,
            Outcome::Error {
                message: "rank 1 panicked".into(),
            },
        );
        comparison
    }

    #[test]
    fn the_page_stands_alone() {
        let page = render(&everything(), Some("dsp-trace.json")).unwrap();
        assert!(page.starts_with("<!doctype html>"));
        for foreign in ["<script", "<link", "<img", "@import", "url(", " src="] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert_eq!(
            page.matches("<svg").count(),
            6,
            "three charts, light and dark"
        );
    }

    #[test]
    fn the_page_says_what_was_found_and_every_reason_escaped() {
        let comparison = everything();
        let page = render(&comparison, Some("dsp-trace.json")).unwrap();
        for expected in [
            "3 ranks are no mesh &lt;2×2&gt;",
            "rank 1 panicked",
            "not speed-ups",
            "not finite",
            "Example 9000",
            "dsp-trace.json",
            "18.9 MB",
            "37\u{202f}748\u{202f}736",
            "1152",
        ] {
            assert!(page.contains(expected), "no {expected:?}");
        }
    }

    #[test]
    fn a_comparison_of_which_nothing_was_timed_is_a_page_too() {
        let mut comparison = sample::comparison(2);
        comparison.rows.clear();
        comparison.push(
            "dsp",
            2,
            Outcome::Refused {
                reason: "one axis".into(),
            },
        );
        let page = render(&comparison, None).unwrap();
        assert!(page.contains("one axis"));
        assert_eq!(page.matches("<svg").count(), 0);
    }

    #[test]
    fn a_forward_only_comparison_has_no_gradients() {
        let mut comparison = sample::comparison(2);
        comparison.rows.truncate(4);
        for row in &mut comparison.rows {
            if let Outcome::Timed(measured) = &mut row.outcome {
                measured.equality.input_gradient = None;
                measured.equality.parameter_gradients = None;
            }
        }
        assert!(render(&comparison, None).unwrap().contains("–"));
    }

    #[test]
    fn digits_stand_in_groups_of_three() {
        let all = [0, 999, 1_000, 18_874_368].map(grouped);
        assert_eq!(
            all,
            ["0", "999", "1\u{202f}000", "18\u{202f}874\u{202f}368"]
        );
    }

    #[test]
    fn seconds_since_1970_become_a_date() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_795_500_000), "2026-11-24 06:00 UTC");
    }
}
