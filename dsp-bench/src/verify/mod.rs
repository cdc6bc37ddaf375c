//! `dsp verify`: runs serial and every applicable strategy on a reference file and compares every tensor.
//!
//! A kind of file knows how to turn it into [`Case`]s; a case runs under any strategy on any
//! number of ranks and returns its tensors by the file's names. Whatever tensor of the file is no input must
//! come back, and is compared; a gradient of a parameter after the sum over the ranks.

mod attention;
mod language;
mod linear;
mod merge;
mod shared;
mod stdit;
mod training;
mod vit;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{DType, Device};
use dsp_core::{Engine, Launch, LaunchError, PlanError, SequenceParallel};
use serde::{Deserialize, Serialize};

use crate::devices::Devices;
use crate::record::{RELATIVE_FLOOR, scientific};
use crate::reference::{Reference, ReferenceError, Stored};
use crate::scenario::Precision;
use crate::table;

/// The tensors that a run produced, by the reference file's names.
pub type Produced = BTreeMap<String, Stored>;

/// One model and its inputs out of a reference file.
pub trait Case: Send + Sync {
    /// Its name within the file; empty if the file is one case.
    fn name(&self) -> &str;

    /// The largest error that is allowed of a tensor, where others are allowed `tolerance`.
    fn tolerance(&self, _tensor: &str, _dtype: DType, tolerance: f64) -> f64 {
        tolerance
    }

    /// Runs it on this rank's device and returns the whole tensors; every rank returns the same.
    ///
    /// # Errors
    /// Whatever ends the run; a [`PlanError`] before any work is a refusal.
    fn run(
        &self,
        strategy: Arc<dyn SequenceParallel>,
        group: dsp_core::Group,
        device: &Device,
        dtype: DType,
    ) -> Result<Produced, CaseError>;
}

/// What ends a case on a rank.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// The strategy refuses the model.
    #[error(transparent)]
    Refused(#[from] PlanError),
    /// The case means nothing to the strategy.
    #[error("{0}")]
    NotApplicable(&'static str),
    /// The run failed.
    #[error(transparent)]
    Core(#[from] dsp_core::Error),
    /// The model failed.
    #[error("{0}")]
    Model(String),
}

impl From<dsp_core::CommError> for CaseError {
    fn from(error: dsp_core::CommError) -> Self {
        Self::Core(error.into())
    }
}

impl From<dsp_core::layout::LayoutError> for CaseError {
    fn from(error: dsp_core::layout::LayoutError) -> Self {
        Self::Core(error.into())
    }
}

type Open = fn(&Reference) -> Result<Vec<Arc<dyn Case>>, ReferenceError>;

/// The kinds of files that are known, and what opens them.
const KINDS: [(&str, Open); 13] = [
    ("attention", attention::open),
    ("ring_merge", merge::open),
    ("linear_attention_decay", linear::open_decay),
    ("linear_attention_fla", linear::open_fla),
    ("tnl_attention", language::open_attention),
    ("llama_lm", language::open_llama),
    ("llama_train_adamw", training::open),
    ("llama_train_adam", training::open),
    ("vit_timm", vit::open_timm),
    ("vit_torchvision", vit::open_torchvision),
    ("stdit3_block", stdit::open_block),
    ("stdit3_block_xmask", stdit::open_block),
    ("stdit3_model", stdit::open_model),
];

/// The kinds of files that are known.
pub fn kinds() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|(kind, _)| *kind)
}

/// What is verified, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The float type of the run.
    pub precision: Precision,
    /// The largest error allowed, relative to `max(max|reference|, 1e-3)`.
    pub tolerance: f64,
    /// The numbers of ranks.
    pub ranks: Vec<usize>,
    /// On what they run.
    pub engine: Engine,
    /// Where the ranks compute.
    pub devices: Devices,
}

/// One finding of a verification.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// A tensor compared with the file's.
    Comparison {
        /// The file.
        file: String,
        /// Its kind.
        kind: String,
        /// The case within it.
        case: String,
        /// The tensor.
        tensor: String,
        /// The strategy.
        strategy: String,
        /// The ranks.
        ranks: usize,
        /// The float type.
        dtype: Precision,
        /// `max|Δ| / max(max|reference|, 1e-3)`; null if not finite.
        error: f64,
        /// The largest error allowed.
        tolerance: f64,
        /// Whether it is within it.
        pass: bool,
    },
    /// A strategy that cannot run a case, and says so.
    Refusal {
        /// The file.
        file: String,
        /// Its kind.
        kind: String,
        /// The case within it.
        case: String,
        /// The strategy.
        strategy: String,
        /// The ranks.
        ranks: usize,
        /// Its reason.
        reason: String,
    },
    /// What the ranks of a run sent, where they are processes.
    Sent {
        /// The file.
        file: String,
        /// Its kind.
        kind: String,
        /// The case within it.
        case: String,
        /// The strategy.
        strategy: String,
        /// The ranks.
        ranks: usize,
        /// Per rank, what its ledger says.
        ledger_bytes: Vec<u64>,
        /// Per rank, what its process handed to the others.
        engine_bytes: Vec<u64>,
    },
}

/// Why a verification could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The file cannot be used.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A run failed.
    #[error("{}: {case}: {strategy} on {ranks} ranks failed", path.display())]
    Run {
        /// The file.
        path: PathBuf,
        /// The case.
        case: String,
        /// The strategy.
        strategy: String,
        /// The ranks.
        ranks: usize,
        /// The cause.
        source: Box<LaunchError>,
    },
}

/// Verifies one file. `progress` is told what runs.
///
/// # Errors
/// [`VerifyError`] if the file cannot be used or a run fails; an error past the tolerance is a record.
pub fn verify(
    path: &Path,
    options: &Options,
    progress: &dyn Fn(&str),
) -> Result<Vec<Record>, VerifyError> {
    let reference = Reference::read(path)?;
    let Some((kind, open)) = KINDS.iter().find(|(kind, _)| *kind == reference.kind()) else {
        return Err(ReferenceError::Kind {
            path: path.to_owned(),
            kind: reference.kind().to_owned(),
            known: kinds().collect(),
        }
        .into());
    };
    let cases = open(&reference)?;
    let expected = reference.expected();
    if expected.is_empty() {
        return Err(ReferenceError::Empty {
            path: path.to_owned(),
        }
        .into());
    }
    let file = path.display().to_string();
    let mut records = Vec::new();
    let mut compared = BTreeSet::new();
    for this in &cases {
        // What serial produces, which is the first to run, every other one has to.
        let mut due: Option<BTreeSet<String>> = None;
        for strategy in dsp_strategies::all() {
            for &ranks in &options.ranks {
                if strategy.name() == "serial" && ranks != 1 {
                    continue;
                }
                progress(&format!(
                    "{kind} {} · {} × {ranks}",
                    this.name(),
                    strategy.name()
                ));
                let labels = || (file.clone(), (*kind).to_owned(), this.name().to_owned());
                match run(this, &strategy, ranks, options) {
                    Ok((Ok(produced), sent)) => {
                        if let Some([ledger_bytes, engine_bytes]) = sent {
                            let (file, kind, case) = labels();
                            records.push(Record::Sent {
                                file,
                                kind,
                                case,
                                strategy: strategy.name().to_owned(),
                                ranks,
                                ledger_bytes,
                                engine_bytes,
                            });
                        }
                        for (tensor, stored) in with_missing(produced, &mut due) {
                            let Some(wanted) = expected.get(&tensor) else {
                                continue;
                            };
                            let error = stored
                                .map_or(f64::INFINITY, |stored| relative_error(&stored, wanted));
                            let allowed = this.tolerance(
                                &tensor,
                                options.precision.dtype(),
                                options.tolerance,
                            );
                            let (file, kind, case) = labels();
                            records.push(Record::Comparison {
                                file,
                                kind,
                                case,
                                tensor: tensor.clone(),
                                strategy: strategy.name().to_owned(),
                                ranks,
                                dtype: options.precision,
                                error,
                                tolerance: allowed,
                                pass: error <= allowed,
                            });
                            compared.insert(tensor);
                        }
                    }
                    Ok((Err(refusal), _)) => {
                        let (file, kind, case) = labels();
                        records.push(Record::Refusal {
                            file,
                            kind,
                            case,
                            strategy: strategy.name().to_owned(),
                            ranks,
                            reason: refusal,
                        });
                    }
                    Err(source) => {
                        return Err(VerifyError::Run {
                            path: path.to_owned(),
                            case: this.name().to_owned(),
                            strategy: strategy.name().to_owned(),
                            ranks,
                            source: Box::new(source),
                        });
                    }
                }
            }
        }
    }
    let unknown: Vec<String> = expected
        .keys()
        .filter(|name| !compared.contains(*name))
        .cloned()
        .collect();
    if !unknown.is_empty() {
        return Err(ReferenceError::Unknown {
            path: path.to_owned(),
            kind: (*kind).to_owned(),
            names: unknown,
        }
        .into());
    }
    Ok(records)
}

/// What a run produced, and what it should have: the names that the first run left in `due`.
fn with_missing(
    produced: Produced,
    due: &mut Option<BTreeSet<String>>,
) -> Vec<(String, Option<Stored>)> {
    let found: BTreeSet<String> = produced.keys().cloned().collect();
    let due = due.get_or_insert_with(|| found.clone());
    let missing = due.difference(&found).cloned();
    (missing.map(|tensor| (tensor, None)))
        .chain((produced.into_iter()).map(|(tensor, stored)| (tensor, Some(stored))))
        .collect()
}

/// What a rank of a case gives, also to other processes: what was produced, or the strategy's refusal; what its
/// ledger says that it sent, and what its process did, if ranks are processes.
#[derive(Serialize, Deserialize)]
struct OnRank {
    outcome: Result<Produced, String>,
    ledger_bytes: u64,
    engine_bytes: Option<u64>,
}

/// What a case produced, or the strategy's refusal; and by rank, what was sent by ledger and by engine.
type Run = (Result<Produced, String>, Option<[Vec<u64>; 2]>);

/// Runs a case.
fn run(
    case: &Arc<dyn Case>,
    strategy: &Arc<dyn SequenceParallel>,
    ranks: usize,
    options: &Options,
) -> Result<Run, LaunchError> {
    let (case, strategy) = (case.clone(), strategy.clone());
    let (dtype, engine) = (options.precision.dtype(), options.engine.clone());
    let devices = options.devices.clone();
    let launch = Launch::new(ranks)
        .timeout(Duration::from_secs(120))
        .on(&options.engine);
    let runs = launch.run_shared(move |group| {
        let before = engine.sent_bytes();
        let device = devices.of_rank(group.rank());
        let outcome = match case.run(strategy.clone(), group.clone(), &device, dtype) {
            Ok(produced) => Ok(produced),
            // Every rank refuses alike, before any work: no failure of the launch.
            Err(CaseError::Refused(refusal)) => Err(refusal.to_string()),
            Err(CaseError::NotApplicable(reason)) => Err(reason.to_owned()),
            Err(error) => return Err(error),
        };
        let ledger = group.ledger().read();
        Ok(OnRank {
            outcome,
            ledger_bytes: ledger.iter().map(|(_, _, entry)| entry.bytes).sum(),
            engine_bytes: (engine.sent_bytes().zip(before)).map(|(now, before)| now - before),
        })
    })?;
    let ledger = runs.iter().map(|run| run.ledger_bytes).collect();
    let engine: Option<Vec<u64>> = runs.iter().map(|run| run.engine_bytes).collect();
    let sent = engine.map(|engine| [ledger, engine]);
    let first = runs.into_iter().next().map(|run| run.outcome);
    Ok((first.unwrap_or_else(|| Ok(Produced::new())), sent))
}

/// `max|Δ| / max(max|reference|, 1e-3)`; infinite for another shape or a value that is not finite.
fn relative_error(produced: &Stored, reference: &Stored) -> f64 {
    if produced.shape != reference.shape {
        return f64::INFINITY;
    }
    let pairs = produced.values.iter().zip(&reference.values);
    let mut worst = 0.0_f64;
    for (a, b) in pairs {
        // A query that sees nothing has the logsumexp −∞ in both.
        let difference = if a == b { 0.0 } else { (a - b).abs() };
        if !difference.is_finite() {
            return f64::INFINITY;
        }
        worst = worst.max(difference);
    }
    let finite = reference.values.iter().filter(|value| value.is_finite());
    let largest = finite.fold(0.0_f64, |largest, value| largest.max(value.abs()));
    worst / largest.max(RELATIVE_FLOOR)
}

/// A file's records as a table: per case and tensor, the largest error of each strategy over all ranks.
pub fn tabulate(records: &[Record]) -> String {
    let mut strategies: Vec<&str> = Vec::new();
    let mut rows: BTreeMap<(&str, &str), BTreeMap<&str, (f64, usize, bool)>> = BTreeMap::new();
    for record in records {
        let Record::Comparison {
            case,
            tensor,
            strategy,
            ranks,
            error,
            pass,
            ..
        } = record
        else {
            continue;
        };
        if !strategies.contains(&strategy.as_str()) {
            strategies.push(strategy);
        }
        let cell = rows
            .entry((case, tensor))
            .or_default()
            .entry(strategy)
            .or_insert((0.0, *ranks, true));
        if *error >= cell.0 {
            (cell.0, cell.1) = (*error, *ranks);
        }
        cell.2 &= *pass;
    }
    let errors = strategies
        .iter()
        .map(|strategy| format!("{strategy}: error (ranks)"));
    let mut table = table::empty(["tensor".to_owned()].into_iter().chain(errors));
    for ((_, tensor), cells) in &rows {
        let errors = strategies.iter().map(|strategy| match cells.get(strategy) {
            Some((error, ranks, pass)) => {
                let mark = if *pass { "" } else { "  FAILS" };
                format!("{} ({ranks}){mark}", scientific(*error))
            }
            None => "-".to_owned(),
        });
        table.add_row([(*tensor).to_owned()].into_iter().chain(errors));
    }
    table.to_string()
}

/// What each process sent in all runs, by its ledger and by what it handed to the others, where ranks are processes:
/// a line for each, and whether all are equal.
pub fn ledgers(records: &[Record]) -> (Vec<String>, bool) {
    let mut sums: BTreeMap<usize, [u64; 2]> = BTreeMap::new();
    let mut equal = true;
    for record in records {
        let Record::Sent {
            ledger_bytes,
            engine_bytes,
            ..
        } = record
        else {
            continue;
        };
        for (process, (ledger, engine)) in ledger_bytes.iter().zip(engine_bytes).enumerate() {
            let [ledgers, engines] = sums.entry(process).or_default();
            *ledgers += ledger;
            *engines += engine;
            equal &= ledger == engine;
        }
    }
    let lines = sums.into_iter().map(|(process, [ledger, engine])| {
        let verdict = if ledger == engine { "equal" } else { "NOT EQUAL" };
        format!(
            "process {process}: {ledger} bytes by its ledger, {engine} bytes handed to others: {verdict}"
        )
    });
    (lines.collect(), equal)
}

/// The refusals among the records: a line for each case and strategy, with the reason on the fewest ranks.
pub fn refusals(records: &[Record]) -> Vec<String> {
    let mut groups: BTreeMap<(&str, &str), (Vec<String>, &str)> = BTreeMap::new();
    for record in records {
        if let Record::Refusal {
            case,
            strategy,
            ranks,
            reason,
            ..
        } = record
        {
            let group = groups
                .entry((strategy, case))
                .or_insert((Vec::new(), reason));
            group.0.push(ranks.to_string());
        }
    }
    let lines = groups.into_iter().map(|((strategy, _), (ranks, reason))| {
        let ranks = ranks.join(", ");
        format!("{strategy} on {ranks} ranks is not applicable: {reason}")
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(values: &[f64]) -> Stored {
        Stored {
            shape: vec![values.len()],
            values: values.to_vec(),
        }
    }

    #[test]
    fn what_the_first_run_produced_is_due_of_every_other_one() {
        let mut due = None;
        let produced = |names: &[&str]| -> Produced {
            (names
                .iter()
                .map(|name| ((*name).to_owned(), stored(&[1.0]))))
            .collect()
        };
        let names = |found: Vec<(String, Option<Stored>)>| -> Vec<(String, bool)> {
            (found
                .into_iter()
                .map(|(name, stored)| (name, stored.is_some())))
            .collect()
        };
        let [a, b, c] = ["a", "b", "c"].map(str::to_owned);
        let first = names(with_missing(produced(&["a", "b"]), &mut due));
        assert_eq!(first, [(a, true), (b.clone(), true)]);
        let second = names(with_missing(produced(&["b", "c"]), &mut due));
        assert_eq!(second, [("a".to_owned(), false), (b, true), (c, true)]);
    }

    #[test]
    fn an_error_is_relative_to_the_largest_reference_value_and_to_no_less_than_a_thousandth() {
        assert_eq!(
            relative_error(&stored(&[1.0, 4.5]), &stored(&[1.0, 4.0])),
            0.125
        );
        let tiny = relative_error(&stored(&[1e-6]), &stored(&[0.0]));
        assert!((tiny - 1e-3).abs() < 1e-15, "{tiny}");
    }

    #[test]
    fn another_shape_a_nan_and_an_unmatched_infinity_are_never_equal() {
        let reference = stored(&[1.0, f64::NEG_INFINITY]);
        assert_eq!(relative_error(&stored(&[1.0]), &reference), f64::INFINITY);
        assert_eq!(
            relative_error(&stored(&[f64::NAN, f64::NEG_INFINITY]), &reference),
            f64::INFINITY
        );
        assert_eq!(
            relative_error(&stored(&[1.0, 5.0]), &reference),
            f64::INFINITY
        );
        assert_eq!(relative_error(&reference, &reference), 0.0);
    }
}
