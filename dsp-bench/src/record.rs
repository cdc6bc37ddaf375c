//! What a comparison found: the one source of the table, the JSON and the HTML report.
//!
//! Everything here can be written as JSON and read again. Units stand in the names.

use dsp_core::Engine;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::devices::Devices;
use crate::scenario::Scenario;

/// An error is taken relative to the reference's largest value, but to no less than this.
pub const RELATIVE_FLOOR: f64 = 1e-3;

/// A whole comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// This crate's version.
    pub version: String,
    /// When it began, in seconds since 1970 in UTC.
    pub started_unix_seconds: u64,
    /// How long all of it took: equality, warm-ups and rounds.
    pub elapsed_seconds: f64,
    /// Where it ran.
    pub machine: Machine,
    /// Burn's backend, by its feature name.
    pub backend: String,
    /// What was compared.
    pub scenario: Scenario,
    /// The cases, in the order in which they ran; serial on one rank first.
    pub rows: Vec<Row>,
}

/// Where a comparison ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Cores that all ranks may use together.
    pub cores: usize,
    /// GPUs that the ranks have together; `None` where they compute on the processor.
    #[serde(default)]
    pub gpus: Option<usize>,
    /// The processor's name, where the system tells.
    pub cpu: Option<String>,
    /// All memory, where the system tells.
    pub memory_bytes: Option<u64>,
    /// The operating system and architecture.
    pub os: String,
}

/// One case: a strategy on a number of ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The strategy's name, as its feature's: `dsp`.
    pub strategy: String,
    /// Ranks, each a thread with its own compute pool.
    pub ranks: usize,
    /// Whether the ranks have more compute threads than there are cores, or share a GPU: such times are not speed-ups.
    pub oversubscribed: bool,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a case ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Equal to serial, then timed.
    Timed(Box<Measured>),
    /// Not equal to serial, so not timed.
    Unequal {
        /// By how much.
        equality: Equality,
    },
    /// The strategy cannot do it, and said so before any work.
    Refused {
        /// The rule that it breaks.
        reason: String,
    },
    /// It failed while it ran.
    Error {
        /// What was said.
        message: String,
    },
}

/// What was measured of a case that is equal to serial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// How near to serial.
    pub equality: Equality,
    /// How long.
    pub time: Timing,
    /// What was sent.
    pub traffic: Traffic,
    /// What was held.
    pub memory: Memory,
}

/// How near a case comes to serial on one rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Equality {
    /// The largest relative error allowed.
    pub tolerance: f64,
    /// Of the model's output.
    pub output: Difference,
    /// Of the gradient of the model's input; `None` where no backward pass was asked for, and where the input is
    /// made of tokens, which have none.
    pub input_gradient: Option<Difference>,
    /// Of all parameters' gradients, each after the sum over ranks; `None` where no backward pass was asked for.
    pub parameter_gradients: Option<Difference>,
}

/// The largest difference of one tensor, or of several, from its reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// The tensor with the largest relative error.
    pub tensor: String,
    /// max |Δ|. In JSON null where it is not finite.
    #[serde(
        serialize_with = "finite_or_null",
        deserialize_with = "null_is_infinite"
    )]
    pub max_abs: f64,
    /// max |Δ| / max(max |reference|, 1e-3). In JSON null where it is not finite.
    #[serde(
        serialize_with = "finite_or_null",
        deserialize_with = "null_is_infinite"
    )]
    pub relative: f64,
}

/// Wall-clock times of a case, one of each round, of which none is a warm-up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Each round's: those of two cases at one place were taken one soon after the other.
    pub repeats_seconds: Vec<f64>,
    /// The middle repeat; of an even number, the slower of the two middle ones, so that it is a run
    /// that was really made.
    pub median_seconds: f64,
    /// The fastest repeat.
    pub min_seconds: f64,
    /// The slowest repeat.
    pub max_seconds: f64,
    /// How each rank spent the median repeat.
    pub per_rank: Vec<RankSeconds>,
}

/// How a rank spent a repeat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RankSeconds {
    /// All that is neither of the next two.
    pub compute_seconds: f64,
    /// Moving data while the rank waited for them.
    pub communication_seconds: f64,
    /// Waiting for peers that were not there yet.
    pub waiting_seconds: f64,
    /// Moving data while the rank computed: all communication is this and the exposed one above.
    pub hidden_seconds: f64,
}

/// What the ranks of a case sent, in one repeat.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Each rank, in rank order.
    pub per_rank: Vec<RankTraffic>,
    /// How many collectives of each kind a rank took part in.
    pub collectives: Vec<CollectiveCount>,
}

/// What one rank sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankTraffic {
    /// Of activations, in the forward pass.
    pub forward: Sent,
    /// Of activations' gradients (and activations sent again), in the backward pass.
    pub backward: Sent,
    /// Of the parameters' gradients, summed over the ranks: alike for all strategies that replicate
    /// the parameters, and so no part of the comparison.
    pub parameters: Sent,
}

/// Bytes that one rank sent, counted and by formula.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// What the ledger counted.
    pub measured_bytes: u64,
    /// What the cost formula says.
    pub formula_bytes: u64,
}

/// How many collectives of one kind a rank took part in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectiveCount {
    /// `all-to-all`, `all-gather`, …
    pub kind: String,
    /// In the forward pass.
    pub forward: u64,
    /// In the backward pass, the sum of the parameters' gradients included.
    pub backward: u64,
}

/// What the process held, all ranks together: bytes asked of the allocator by Rust code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The most that was held while the case was timed.
    pub peak_bytes: u64,
    /// What was held before: the input, and the weights that every case places anew.
    pub before_bytes: u64,
}

impl Comparison {
    /// A comparison on this machine that begins now and has no rows yet.
    pub fn begin(scenario: Scenario, devices: &Devices, engine: &Engine) -> Self {
        let started_unix_seconds = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_seconds,
            elapsed_seconds: 0.0,
            machine: Machine {
                gpus: devices.gpus(engine),
                ..Machine::under(engine)
            },
            backend: devices.to_string(),
            scenario,
            rows: Vec::new(),
        }
    }

    /// Adds a case.
    pub fn push(&mut self, strategy: &str, ranks: usize, outcome: Outcome) {
        let threads = self.scenario.threads_per_rank.unwrap_or(1);
        let oversubscribed = match self.machine.gpus {
            Some(gpus) => ranks > gpus,
            None => ranks.saturating_mul(threads) > self.machine.cores,
        };
        self.rows.push(Row {
            strategy: strategy.to_owned(),
            ranks,
            oversubscribed,
            outcome,
        });
    }

    /// The timed cases.
    pub fn timed(&self) -> impl Iterator<Item = (&Row, &Measured)> {
        self.rows.iter().filter_map(|row| match &row.outcome {
            Outcome::Timed(measured) => Some((row, measured.as_ref())),
            _ => None,
        })
    }

    /// How often each case was timed: they took turns, in as many rounds.
    pub fn rounds(&self) -> usize {
        let rounds = (self.timed()).map(|(_, measured)| measured.time.repeats_seconds.len());
        rounds.max().unwrap_or_default()
    }

    /// What the ranks of the rows that are oversubscribed share; `None` if none is.
    pub fn shared(&self) -> Option<String> {
        let mut rows = self.rows.iter();
        rows.any(|row| row.oversubscribed)
            .then(|| match self.machine.gpus {
                Some(gpus) => format!("more ranks than GPUs ({gpus})"),
                None => format!("more compute threads than cores ({})", self.machine.cores),
            })
    }

    /// Whether nothing went wrong: no case is unequal or failed, and every count equals its formula.
    /// Refusals are no fault.
    pub fn all_well(&self) -> bool {
        self.rows.iter().all(|row| match &row.outcome {
            Outcome::Timed(measured) => measured.traffic.equals_formula(),
            Outcome::Refused { .. } => true,
            Outcome::Unequal { .. } | Outcome::Error { .. } => false,
        })
    }
}

impl Row {
    /// `DSP on 2 ranks`.
    pub fn case(&self) -> String {
        let unit = if self.ranks == 1 { "rank" } else { "ranks" };
        format!("{} on {} {unit}", label(&self.strategy), self.ranks)
    }
}

impl Machine {
    /// This machine, as far as its system tells without a library, with the cores of all on which ranks are.
    pub fn under(engine: &Engine) -> Self {
        let cpu_info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let memory_info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        let system = field(&release, "PRETTY_NAME", '=').map_or_else(
            || std::env::consts::OS.to_owned(),
            |name| name.trim_matches('"').to_owned(),
        );
        Self {
            cores: engine.cores(),
            gpus: None,
            cpu: field(&cpu_info, "model name", ':').map(str::to_owned),
            memory_bytes: field(&memory_info, "MemTotal", ':')
                .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok())
                .map(|kibibytes| kibibytes * 1024),
            os: format!("{system}, {}", std::env::consts::ARCH),
        }
    }
}

/// The value of the first line `name<separator>value`.
fn field<'a>(text: &'a str, name: &str, separator: char) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(separator))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
        .filter(|value| !value.is_empty())
}

impl Equality {
    /// Whether every relative error is within the tolerance; NaN never is.
    pub fn holds(&self) -> bool {
        self.worst_relative() <= self.tolerance
    }

    /// The largest relative error; infinite if any value is NaN.
    pub fn worst_relative(&self) -> f64 {
        self.parts()
            .map(|(_, difference)| or_infinite(difference.relative))
            .fold(0.0, f64::max)
    }

    /// What was compared, by name.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &Difference)> {
        [
            ("output", Some(&self.output)),
            ("input gradient", self.input_gradient.as_ref()),
            ("parameter gradients", self.parameter_gradients.as_ref()),
        ]
        .into_iter()
        .filter_map(|(name, difference)| Some((name, difference?)))
    }
}

impl Difference {
    /// The difference of one tensor from its reference, both row-major; infinite if a value is not
    /// finite or the lengths differ.
    pub fn between<T: Copy + Into<f64>>(tensor: &str, reference: &[T], actual: &[T]) -> Self {
        let mut max_abs = 0.0_f64;
        let mut largest = 0.0_f64;
        if reference.len() != actual.len() {
            max_abs = f64::INFINITY;
        }
        for (&reference, &actual) in reference.iter().zip(actual) {
            let reference: f64 = reference.into();
            max_abs = max_abs.max(or_infinite((actual.into() - reference).abs()));
            largest = largest.max(reference.abs());
        }
        Self {
            tensor: tensor.to_owned(),
            max_abs,
            relative: or_infinite(max_abs / largest.max(RELATIVE_FLOOR)),
        }
    }

    /// Both together: the larger of either error, and the tensor of the larger relative one.
    #[must_use]
    pub fn worst(self, other: Self) -> Self {
        let max_abs = or_infinite(self.max_abs).max(or_infinite(other.max_abs));
        let worse = if or_infinite(other.relative) > or_infinite(self.relative) {
            other
        } else {
            self
        };
        Self { max_abs, ..worse }
    }
}

/// A comparison of numbers loses NaN; an infinity it keeps.
fn or_infinite(value: f64) -> f64 {
    if value.is_nan() { f64::INFINITY } else { value }
}

impl Timing {
    /// The times of `repeats`: the wall-clock seconds of each, and how each of its ranks spent them.
    /// `None` if there is no repeat.
    pub fn of(repeats: Vec<(f64, Vec<RankSeconds>)>) -> Option<Self> {
        let repeats_seconds: Vec<f64> = repeats.iter().map(|(seconds, _)| *seconds).collect();
        let mut ordered = repeats;
        ordered.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let (min_seconds, max_seconds) = (ordered.first()?.0, ordered.last()?.0);
        let (median_seconds, per_rank) = ordered.swap_remove(ordered.len() / 2);
        Some(Self {
            repeats_seconds,
            median_seconds,
            min_seconds,
            max_seconds,
            per_rank,
        })
    }

    /// How the median repeat was spent, on the average over the ranks.
    pub fn mean(&self) -> RankSeconds {
        let ranks = self.per_rank.len().max(1) as f64;
        let mean =
            |part: fn(&RankSeconds) -> f64| self.per_rank.iter().map(part).sum::<f64>() / ranks;
        RankSeconds {
            compute_seconds: mean(|rank| rank.compute_seconds),
            communication_seconds: mean(|rank| rank.communication_seconds),
            waiting_seconds: mean(|rank| rank.waiting_seconds),
            hidden_seconds: mean(|rank| rank.hidden_seconds),
        }
    }
}

impl Traffic {
    /// Whether every rank sent to the byte what the formulas say.
    pub fn equals_formula(&self) -> bool {
        self.per_rank.iter().all(|rank| {
            [rank.forward, rank.backward, rank.parameters]
                .iter()
                .all(|sent| sent.measured_bytes == sent.formula_bytes)
        })
    }

    /// Bytes of activations and their gradients that the busiest rank sent.
    pub fn busiest_rank_bytes(&self) -> u64 {
        self.busiest().measured_bytes
    }

    /// Bytes of the parameters' gradients that the rank sent that sent most of those.
    pub fn gradients_bytes(&self) -> u64 {
        let sent = (self.per_rank.iter()).map(|rank| rank.parameters.measured_bytes);
        sent.max().unwrap_or_default()
    }

    /// Activations and their gradients, counted and by formula, of the rank that sent most.
    pub fn busiest(&self) -> Sent {
        self.per_rank
            .iter()
            .map(RankTraffic::activations)
            .max_by_key(|sent| sent.measured_bytes)
            .unwrap_or_default()
    }

    /// All ranks' activations and their gradients, counted and by formula.
    pub fn total(&self) -> Sent {
        self.per_rank
            .iter()
            .map(RankTraffic::activations)
            .fold(Sent::default(), Sent::plus)
    }
}

impl RankTraffic {
    /// Forward and backward together, without the parameters' gradients.
    pub fn activations(&self) -> Sent {
        self.forward.plus(self.backward)
    }
}

impl Sent {
    fn plus(self, other: Self) -> Self {
        Self {
            measured_bytes: self.measured_bytes + other.measured_bytes,
            formula_bytes: self.formula_bytes + other.formula_bytes,
        }
    }
}

fn finite_or_null<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    value.is_finite().then_some(*value).serialize(serializer)
}

fn null_is_infinite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// A strategy's name as papers write it, a mixture's with all of its parts.
pub fn label(strategy: &str) -> String {
    let parts: Vec<String> = strategy.split('+').map(part_label).collect();
    parts.join(" + ")
}

fn part_label(strategy: &str) -> String {
    match strategy {
        "dsp" | "usp" | "lss" | "lasp" => strategy.to_uppercase(),
        "lasp2" | "lasp-2" => "LASP-2".to_owned(),
        "megatron" => "Megatron-SP".to_owned(),
        _ => {
            let mut letters = strategy.chars();
            letters
                .next()
                .map(|first| first.to_uppercase().chain(letters).collect())
                .unwrap_or_default()
        }
    }
}

/// `4.7 MB`, in powers of 1000.
pub fn bytes(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..999_950 => format!("{:.1} kB", value / 1e3),
        999_950..999_950_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.2} GB", value / 1e9),
    }
}

/// `5.12 s`, `43 ms`.
pub fn seconds(seconds: f64) -> String {
    if seconds >= 99.95 {
        format!("{seconds:.0} s")
    } else if seconds >= 9.995 {
        format!("{seconds:.1} s")
    } else if seconds >= 0.9995 {
        format!("{seconds:.2} s")
    } else if seconds >= 0.01 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{:.1} ms", seconds * 1e3)
    }
}

/// `3e-6`, `0`, `not finite`.
pub fn scientific(value: f64) -> String {
    if value == 0.0 {
        "0".to_owned()
    } else if value.is_finite() {
        format!("{value:.1e}").replace(".0e", "e")
    } else {
        "not finite".to_owned()
    }
}

#[cfg(test)]
pub(crate) mod sample {
    //! A made-up comparison, for the tests of what shows one.
    use super::*;

    pub(crate) fn difference(tensor: &str, relative: f64) -> Difference {
        Difference {
            tensor: tensor.to_owned(),
            max_abs: relative * 2.0,
            relative,
        }
    }

    pub(crate) fn equality(relative: f64) -> Equality {
        Equality {
            tolerance: 2e-5,
            output: difference("output", relative / 2.0),
            input_gradient: Some(difference("input", relative / 3.0)),
            parameter_gradients: Some(difference("spatial_blocks.0.attn.qkv.weight", relative)),
        }
    }

    pub(crate) fn timed(ranks: usize, seconds: f64, sent_bytes: u64, collectives: u64) -> Outcome {
        let rank = |rank: usize| {
            let waiting_seconds = seconds * 0.02 * rank as f64;
            let communication_seconds = seconds * sent_bytes as f64 * 4e-9;
            RankSeconds {
                compute_seconds: seconds - waiting_seconds - communication_seconds,
                communication_seconds,
                waiting_seconds,
                hidden_seconds: 0.0,
            }
        };
        let spent: Vec<RankSeconds> = (0..ranks).map(rank).collect();
        let half = Sent {
            measured_bytes: sent_bytes / 2,
            formula_bytes: sent_bytes / 2,
        };
        let parallel = ranks > 1;
        Outcome::Timed(Box::new(Measured {
            equality: equality(if parallel { 3.1e-6 } else { 0.0 }),
            time: Timing::of(vec![
                (seconds * 1.04, spent.clone()),
                (seconds, spent.clone()),
                (seconds * 0.97, spent),
            ])
            .unwrap(),
            traffic: Traffic {
                // Of the parameters' gradients the last rank sends most.
                per_rank: (0..ranks)
                    .map(|rank| {
                        let bytes = 7_000_000 * rank as u64;
                        RankTraffic {
                            forward: half,
                            backward: half,
                            parameters: Sent {
                                measured_bytes: bytes,
                                formula_bytes: bytes,
                            },
                        }
                    })
                    .collect(),
                collectives: if parallel {
                    vec![
                        CollectiveCount {
                            kind: "all-to-all".into(),
                            forward: collectives,
                            backward: collectives,
                        },
                        CollectiveCount {
                            kind: "all-reduce".into(),
                            forward: 0,
                            backward: 1,
                        },
                    ]
                } else {
                    vec![]
                },
            },
            memory: Memory {
                peak_bytes: 2_100_000_000 + 90_000_000 * ranks as u64,
                before_bytes: 640_000_000,
            },
        }))
    }

    pub(crate) fn comparison(cores: usize) -> Comparison {
        let mut comparison = {
            let scenario = Scenario::load("default").unwrap();
            Comparison::begin(scenario, &Devices::default(), &Engine::Threads)
        };
        comparison.started_unix_seconds = 1_795_500_000;
        comparison.elapsed_seconds = 148.2;
        comparison.machine = Machine {
            cores,
            gpus: None,
            cpu: Some("Example 9000 at 3.1 GHz".into()),
            memory_bytes: Some(24_000_000_000),
            os: "Example Linux 12, x86_64".into(),
        };
        comparison.push("serial", 1, timed(1, 8.12, 0, 0));
        comparison.push("dsp", 1, timed(1, 8.14, 0, 0));
        comparison.push("ulysses", 1, timed(1, 8.15, 0, 0));
        comparison.push("dsp", 2, timed(2, 5.11, 18_874_368, 2));
        comparison.push("ulysses", 2, timed(2, 5.62, 37_748_736, 4));
        comparison.push("dsp", 4, timed(4, 5.43, 14_155_776, 2));
        comparison.push("ulysses", 4, timed(4, 6.01, 28_311_552, 4));
        comparison
    }
}

#[cfg(test)]
mod tests {
    use super::sample::{comparison, equality, timed};
    use super::*;

    #[test]
    fn a_comparison_survives_json_even_where_an_error_is_not_finite() {
        let mut before = comparison(2);
        let mut broken = equality(0.5);
        broken.output.relative = f64::INFINITY;
        broken.output.max_abs = f64::INFINITY;
        before.push("ring", 2, Outcome::Unequal { equality: broken });
        before.push(
            "usp",
            2,
            Outcome::Refused {
                reason: "a mesh needs 4 ranks".into(),
            },
        );
        before.push(
            "lss",
            2,
            Outcome::Error {
                message: "rank 1 panicked".into(),
            },
        );
        let json = serde_json::to_string(&before).unwrap();
        assert!(json.contains(r#""outcome":"timed""#), "{json}");
        let after: Comparison = serde_json::from_str(&json).unwrap();
        // All but the last digit of a float, which serde_json may round.
        assert!(after.rows[7] == before.rows[7], "infinities are kept");
        assert_eq!(after.finding(), before.finding());
        assert_eq!(after.scenario, before.scenario);
        assert_eq!(crate::table::render(&after), crate::table::render(&before));
    }

    #[test]
    fn differences_are_relative_to_the_largest_value_but_to_no_less_than_a_thousandth() {
        let d = Difference::between("t", &[1.0_f32, -4.0], &[1.0, -3.0]);
        assert_eq!((d.max_abs, d.relative), (1.0, 0.25));
        let d = Difference::between("t", &[0.0_f64, 1e-9], &[0.0, 0.0]);
        assert!((d.relative - 1e-6).abs() < 1e-18);
        let worst = Difference::between("a", &[100.0], &[101.0]).worst(Difference::between(
            "b",
            &[1.0],
            &[1.5],
        ));
        assert_eq!(
            (worst.tensor.as_str(), worst.max_abs, worst.relative),
            ("b", 1.0, 0.5)
        );
    }

    #[test]
    fn a_nan_or_a_wrong_length_is_never_equal() {
        for wrong in [
            Difference::between("t", &[1.0], &[f64::NAN]),
            Difference::between("t", &[f64::NAN], &[f64::NAN]),
            Difference::between("t", &[f64::INFINITY], &[f64::INFINITY]),
            Difference::between("t", &[1.0, 2.0], &[1.0]),
        ] {
            assert_eq!(wrong.relative, f64::INFINITY, "{wrong:?}");
            let mut equality = equality(0.0);
            assert!(equality.holds());
            equality.output = wrong;
            assert!(!equality.holds());
        }
        let mut equality = equality(0.0);
        equality.output.relative = f64::NAN;
        assert!(!equality.holds());
    }

    #[test]
    fn the_median_is_a_repeat_that_was_made_and_brings_its_own_ranks() {
        let spent = |compute_seconds| {
            vec![RankSeconds {
                compute_seconds,
                ..RankSeconds::default()
            }]
        };
        let timing = Timing::of(vec![
            (4.0, spent(4.0)),
            (1.0, spent(1.0)),
            (3.0, spent(3.0)),
            (2.0, spent(2.0)),
        ])
        .unwrap();
        assert_eq!(timing.median_seconds, 3.0);
        assert_eq!(timing.mean().compute_seconds, 3.0);
        assert_eq!((timing.min_seconds, timing.max_seconds), (1.0, 4.0));
        assert_eq!(timing.repeats_seconds, [4.0, 1.0, 3.0, 2.0]);
        assert!(Timing::of(vec![]).is_none());
    }

    #[test]
    fn cores_are_shared_by_the_threads_of_all_ranks() {
        let mut comparison = comparison(2);
        comparison.scenario.threads_per_rank = Some(2);
        comparison.push("ring", 1, timed(1, 8.0, 0, 0));
        comparison.push("ring", 2, timed(2, 5.0, 0, 0));
        let shared = comparison.rows.iter().rev().take(2);
        let shared: Vec<bool> = shared.map(|row| row.oversubscribed).collect();
        assert_eq!(shared, [true, false]);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [bytes(0), bytes(999), bytes(4_718_592)].join(" "),
            "0 B 999 B 4.7 MB"
        );
        assert_eq!(
            [bytes(999_949), bytes(999_950), bytes(2_000_000_000)].join(" "),
            "999.9 kB 1.0 MB 2.00 GB"
        );
        assert_eq!(
            [
                seconds(0.0042),
                seconds(0.043),
                seconds(5.123),
                seconds(12.34),
                seconds(148.2)
            ]
            .join(" "),
            "4.2 ms 43 ms 5.12 s 12.3 s 148 s"
        );
        assert_eq!(
            [
                scientific(0.0),
                scientific(3.04e-6),
                scientific(f64::INFINITY)
            ]
            .join(" "),
            "0 3e-6 not finite"
        );
        assert_eq!(
            [label("dsp+ulysses"), label("ulysses"), label("")].join(" "),
            "DSP + Ulysses Ulysses "
        );
    }

    #[test]
    fn this_machine_has_a_core() {
        let machine = Machine::under(&Engine::Threads);
        assert!(machine.cores >= 1);
        assert!(!machine.os.is_empty());
    }
}
