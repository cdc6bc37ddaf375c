//! `dsp compare`: runs a model on real data under every strategy on every number of ranks.
//!
//! Each case is first held to serial: output, input gradient, every parameter's gradient. One that differs is
//! not timed. Then it runs alone, several times, and each rank's ledger says what it sent and how long it
//! waited.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor, TensorData};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::{Phase, Traffic as LedgerReading};
use dsp_core::{
    CommError, Engine, Group, Launch, LaunchError, PlanError, SequenceParallel, Session,
};
use dsp_models::training::Reduce;
use dsp_strategies::UnknownStrategy;
use serde::{Deserialize, Serialize};

use crate::devices::Devices;
use crate::progress::Progress;
use crate::record::{
    CollectiveCount, Comparison, Difference, Equality, Measured, Memory, Outcome, RankSeconds,
    RankTraffic, Sent, Timing, Traffic, seconds,
};
use crate::scenario::{Passes, Scenario, ScenarioError};
use crate::subject::{Gradients, OnRank, Pass, Subject, SubjectError};

/// Why a comparison cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The scenario names something that is not there.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// A strategy that is not compiled in.
    #[error(transparent)]
    Strategy(#[from] UnknownStrategy),
    /// The model cannot be built or run.
    #[error(transparent)]
    Subject(#[from] SubjectError),
    /// Serial itself cannot run the model: there is nothing to compare with.
    #[error("serial cannot run the scenario's model: {0}")]
    SerialRefused(PlanError),
    /// Serial itself failed: there is nothing to compare with.
    #[error("serial failed, so there is nothing to compare with")]
    SerialFailed(#[source] LaunchError),
}

/// What a comparison asks of the process that it runs in.
pub trait Meter {
    /// Begins a new peak of memory, and returns what is held now, in bytes.
    fn reset_peak(&self) -> u64;

    /// The most that was held since, in bytes.
    fn peak(&self) -> u64;

    /// Whether spans are traced from now on.
    fn set_recording(&self, recording: bool);
}

/// A strategy on a number of ranks.
#[derive(Debug, Clone)]
pub struct CaseOf {
    /// The strategy's name.
    pub name: String,
    /// The strategy; of one of the scenario's mixtures, perhaps why there is none.
    pub strategy: Result<Arc<dyn SequenceParallel>, UnknownStrategy>,
    /// The ranks.
    pub ranks: usize,
}

/// A scenario that is ready to run: its input read, its model built.
#[derive(Debug)]
pub struct Comparer {
    scenario: Scenario,
    subject: Arc<dyn Subject>,
    cases: Vec<CaseOf>,
    engine: Engine,
    devices: Devices,
}

impl Comparer {
    /// Reads the input, builds the model and finds the strategies.
    ///
    /// # Errors
    /// [`CompareError`] before any work if any of these cannot be used.
    pub fn new(scenario: Scenario) -> Result<Self, CompareError> {
        let enabled = dsp_strategies::all();
        let names: Vec<&str> = enabled.iter().map(|strategy| strategy.name()).collect();
        // Serial comes first, on one rank: it is what the others are held to.
        let mut cases = vec![CaseOf {
            name: "serial".to_owned(),
            strategy: Ok(dsp_strategies::by_name("serial")?),
            ranks: 1,
        }];
        let chosen = scenario.chosen_strategies(&names);
        for &ranks in &scenario.ranks {
            for name in chosen.iter().filter(|name| *name != "serial") {
                let strategy = dsp_strategies::by_name(name);
                if scenario.strategies.is_some() {
                    // Who names a strategy wants it; a scenario's mixture of others may be refused.
                    strategy.clone()?;
                }
                cases.push(CaseOf {
                    name: name.clone(),
                    strategy,
                    ranks,
                });
            }
        }
        let subject = scenario.model.sizes().subject(&scenario)?;
        Ok(Self {
            scenario,
            subject,
            cases,
            engine: Engine::Threads,
            devices: Devices::default(),
        })
    }

    /// On what the ranks run. Where they are processes, all make the same comparison, and what comes of it is of use
    /// in the one that holds rank 0.
    #[must_use]
    pub fn on(self, engine: &Engine) -> Self {
        Self {
            engine: engine.clone(),
            ..self
        }
    }

    /// Where the ranks compute, if not on the processor.
    #[must_use]
    pub fn with_devices(self, devices: Devices) -> Self {
        Self { devices, ..self }
    }

    /// What will be run, in order.
    pub fn cases(&self) -> &[CaseOf] {
        &self.cases
    }

    /// Runs all cases.
    ///
    /// # Errors
    /// [`CompareError`] if serial fails; any other case's failure is its row.
    pub fn run(&self, progress: &Progress, meter: &dyn Meter) -> Result<Comparison, CompareError> {
        let started = Instant::now();
        let mut comparison = Comparison::begin(
            self.scenario.clone(),
            &self.devices.to_string(),
            &self.engine,
        );
        let mut reference = None;
        for (index, case) in self.cases.iter().enumerate() {
            let name = case.name.as_str();
            progress.begin(name, case.ranks);
            // Each case has its share of what is left of the whole time, its first run included.
            let left = self.scenario.time_budget_seconds - started.elapsed().as_secs_f64();
            let budget = left / (self.cases.len() - index) as f64;
            let outcome = match self.case(case, reference.as_ref(), budget, progress, meter) {
                Ok((outputs, outcome)) => {
                    reference = reference.or(outputs);
                    outcome
                }
                Err(Stop::Absent(absent)) => Outcome::Refused {
                    reason: absent.to_string(),
                },
                Err(Stop::Refused(refusal)) if index == 0 => {
                    return Err(CompareError::SerialRefused(refusal));
                }
                Err(Stop::Failed(failure)) if index == 0 => {
                    return Err(CompareError::SerialFailed(*failure));
                }
                Err(Stop::Refused(refusal)) => Outcome::Refused {
                    reason: refusal.to_string(),
                },
                Err(Stop::Failed(failure)) => Outcome::Error {
                    message: failure.to_string(),
                },
            };
            progress.end(&summary(&outcome));
            comparison.push(name, case.ranks, outcome);
        }
        comparison.elapsed_seconds = started.elapsed().as_secs_f64();
        Ok(comparison)
    }

    /// One case; of the first, serial, also what it gave: what the others are held to.
    ///
    /// All of it is one launch, so that what is timed runs on threads and memory that have run before: the
    /// first run is held to serial, and is the warm-up.
    fn case(
        &self,
        case: &CaseOf,
        reference: Option<&Outputs>,
        budget: f64,
        progress: &Progress,
        meter: &dyn Meter,
    ) -> Result<(Option<Outputs>, Outcome), Stop> {
        let name = case.name.as_str();
        let strategy = case.strategy.clone().map_err(Stop::Absent)?;
        // Refused before any work, or not at all.
        let shape = self.subject.shape();
        strategy.plan(&shape, case.ranks).map_err(Stop::Refused)?;

        progress.phase(name, case.ranks, "equality with serial");
        let (checked, first_run) = mpsc::channel();
        let (decide, decision) = mpsc::channel();
        let steps = Steps {
            subject: self.subject.clone(),
            strategy,
            model: self.scenario.model.kind().name(),
            devices: self.devices.clone(),
            dtype: self.scenario.dtype.dtype(),
            passes: self.scenario.passes,
            reduce: self.scenario.reduce,
            switch_parts: self.scenario.switch_parts,
            checked,
            decision: Mutex::new(decision),
        };
        let deadline = Duration::from_secs_f64(self.scenario.deadline_seconds);
        let launch = Launch::new(case.ranks).timeout(deadline).on(&self.engine);
        let launch = match self.scenario.threads_per_rank {
            Some(threads) => launch.threads_per_rank(threads),
            None => launch,
        };
        let (verdict, ranks) = thread::scope(|scope| {
            let ranks = scope.spawn(move || launch.run_shared(move |group| steps.run(group)));
            // Nothing comes if the launch fails first.
            let verdict = first_run.recv().ok().map(|(outputs, seconds)| {
                let serial = reference.unwrap_or(&outputs);
                let equality = outputs.equality(serial, self.scenario.tolerance);
                let repeats = self.repeats(budget, seconds);
                let outputs = reference.is_none().then_some(outputs);
                let before_bytes = meter.reset_peak();
                if equality.holds() {
                    progress.repeat(name, case.ranks, 1, repeats, Some(seconds));
                    meter.set_recording(true);
                    // A launch that has failed meanwhile says so when it is joined.
                    let _ = decide.send(repeats);
                }
                (outputs, equality, before_bytes)
            });
            drop(decide);
            (verdict, ranks.join())
        });
        meter.set_recording(false);
        let peak_bytes = meter.peak();
        let ranks = match ranks {
            Ok(ranks) => ranks.map_err(|error| Stop::Failed(Box::new(error)))?,
            Err(payload) => resume_unwind(payload),
        };
        let before_bytes = verdict.as_ref().map_or(0, |(_, _, before)| *before);
        let held = [peak_bytes, before_bytes];
        let [peak_bytes, before_bytes] = self.over_processes(held, case.ranks)?;
        let Some((outputs, equality, _)) = verdict else {
            return Ok((
                None,
                Outcome::Error {
                    message: "another process holds rank 0, and knows".to_owned(),
                },
            ));
        };
        if !equality.holds() {
            return Ok((None, Outcome::Unequal { equality }));
        }
        let measured = Measured {
            equality,
            time: timing(&ranks),
            traffic: traffic(&ranks),
            memory: Memory {
                peak_bytes,
                before_bytes,
            },
        };
        Ok((outputs, Outcome::Timed(Box::new(measured))))
    }

    /// The sum over the processes that hold a part of `ranks` ranks.
    fn over_processes(&self, own: [u64; 2], ranks: usize) -> Result<[u64; 2], Stop> {
        if matches!(self.engine, Engine::Threads) {
            return Ok(own);
        }
        let launch = Launch::new(ranks).on(&self.engine);
        let all = launch.run_shared(move |_| Ok::<_, CommError>(own));
        let all = all.map_err(|error| Stop::Failed(Box::new(error)))?;
        Ok([0, 1].map(|index| all.iter().map(|process| process[index]).sum()))
    }

    /// As many runs as fit into the case's share of the time after the first.
    fn repeats(&self, budget: f64, seconds: f64) -> usize {
        let repeats = (budget / seconds - 1.0).round() as usize;
        repeats.clamp(self.scenario.min_repeats, self.scenario.max_repeats)
    }
}

/// What every rank of a case does.
struct Steps {
    subject: Arc<dyn Subject>,
    strategy: Arc<dyn SequenceParallel>,
    /// The model's kind, for the trace.
    model: &'static str,
    devices: Devices,
    dtype: DType,
    passes: Passes,
    reduce: Reduce,
    switch_parts: NonZeroUsize,
    /// Where rank 0 sends what the first run gave, and its seconds.
    checked: mpsc::Sender<(Outputs, f64)>,
    /// From where it gets the number of timed runs; none if the first differed from serial.
    decision: Mutex<mpsc::Receiver<usize>>,
}

impl Steps {
    fn run(&self, group: Group) -> Result<RankRuns, SubjectError> {
        let session = Session::new(self.strategy.clone(), group, self.subject.shape())?
            .switching_in(self.switch_parts);
        let pass = Pass {
            device: self.devices.of_rank(session.group().rank()),
            dtype: self.dtype,
            passes: self.passes,
            reduce: self.reduce,
        };
        let subject = self.subject.on_rank(&session, pass.clone())?;
        self.first(&session, &*subject, &pass.device)?;
        let mut runs = Vec::new();
        for repeat in 0..self.repeats(&session)? {
            self.barrier(session.group())?;
            session.group().ledger().take();
            let (model, strategy) = (self.model, self.strategy.name());
            let _span = tracing::info_span!("step", model, strategy, repeat).entered();
            let start = Instant::now();
            let run = subject.forward()?;
            if self.passes == Passes::ForwardBackward {
                subject.backward(&run)?;
            }
            finish(&pass.device)?;
            let elapsed = start.elapsed().as_secs_f64();
            runs.push((elapsed, session.group().ledger().take()));
        }
        let width = self.dtype.size() as u64;
        let sends = session.expected_sends();
        let (backward, parameters) = match self.passes {
            Passes::Forward => (0, 0),
            Passes::ForwardBackward => (sends.backward, subject.expected_reduce()),
        };
        Ok(RankRuns {
            runs,
            formula: [sends.forward, backward, parameters].map(|elements| elements * width),
        })
    }

    /// The run that is held to serial: rank 0 hands over its outputs, whole; they are the same on all ranks.
    fn first(
        &self,
        session: &Session,
        subject: &dyn OnRank,
        device: &Device,
    ) -> Result<(), SubjectError> {
        let start = Instant::now();
        let run = subject.forward()?;
        let gradients = match self.passes {
            Passes::Forward => None,
            Passes::ForwardBackward => Some(subject.backward(&run)?),
        };
        finish(device)?;
        let seconds = start.elapsed().as_secs_f64();
        let output = subject.output(&run)?;
        let gradients = gradients.map(|gradients| subject.whole(gradients));
        let gradients = gradients.transpose()?;
        if session.group().rank() == 0 {
            // Whoever does not listen any more has given the case up.
            let _ = self.checked.send((Outputs { output, gradients }, seconds));
        }
        Ok(())
    }

    /// How many timed runs there shall be, as rank 0 is told.
    fn repeats(&self, session: &Session) -> Result<usize, SubjectError> {
        let own = match session.group().rank() {
            0 => {
                let decision = self.decision.lock().unwrap_or_else(PoisonError::into_inner);
                decision.recv().unwrap_or(0)
            }
            _ => 0,
        };
        let own = self.token(session.group()).add_scalar(own as f64);
        let all = all_reduce_in(own, Phase::Outside, session.group())?;
        Ok(all.into_scalar::<f64>() as usize)
    }

    /// Everybody waits for everybody, so that no rank's start is another's waiting.
    fn barrier(&self, group: &Group) -> Result<(), CommError> {
        all_reduce_in(self.token(group), Phase::Outside, group).map(drop)
    }

    /// One number, for the ranks to wait for each other by.
    fn token(&self, group: &Group) -> Tensor<1> {
        Tensor::zeros([1], (&self.devices.of_rank(group.rank()), self.dtype))
    }
}

/// Waits until a device has done all that it was told: GPUs work behind.
fn finish(device: &Device) -> Result<(), SubjectError> {
    let done = device.sync();
    done.map_err(|error| SubjectError::Device(error.to_string()))
}

enum Stop {
    Absent(UnknownStrategy),
    Refused(PlanError),
    Failed(Box<LaunchError>),
}

/// One rank's timed runs.
#[derive(Serialize, Deserialize)]
struct RankRuns {
    /// Seconds and the ledger of each.
    runs: Vec<(f64, LedgerReading)>,
    /// Bytes by formula: forward, backward, parameters' gradients.
    formula: [u64; 3],
}

/// What a run gave, whole.
struct Outputs {
    output: TensorData,
    gradients: Option<Gradients>,
}

impl Outputs {
    fn equality(&self, reference: &Self, tolerance: f64) -> Equality {
        let gradients = self.gradients.as_ref().zip(reference.gradients.as_ref());
        Equality {
            tolerance,
            output: difference("output", &reference.output, &self.output),
            input_gradient: gradients.and_then(|(own, serial)| {
                let serial = serial.input.as_ref()?;
                let missing = none();
                let own = own.input.as_ref().unwrap_or(&missing);
                Some(difference("input", serial, own))
            }),
            parameter_gradients: gradients.and_then(|(own, serial)| {
                let missing = none();
                let each = |(name, serial): (&String, &TensorData)| {
                    difference(name, serial, own.parameters.get(name).unwrap_or(&missing))
                };
                serial.parameters.iter().map(each).reduce(Difference::worst)
            }),
        }
    }
}

/// What equals no tensor.
fn none() -> TensorData {
    TensorData::new(Vec::<f32>::new(), [0])
}

fn difference(name: &str, reference: &TensorData, actual: &TensorData) -> Difference {
    let doubles = |data: &TensorData| data.iter::<f64>().collect::<Vec<f64>>();
    match (reference.as_slice::<f32>(), actual.as_slice::<f32>()) {
        (Ok(reference), Ok(actual)) => Difference::between(name, reference, actual),
        _ => Difference::between(name, &doubles(reference), &doubles(actual)),
    }
}

/// A repeat takes as long as its slowest rank.
fn timing(ranks: &[RankRuns]) -> Timing {
    let repeats = ranks.first().map_or(0, |rank| rank.runs.len());
    let repeat = |repeat: usize| {
        let spent: Vec<RankSeconds> = ranks
            .iter()
            .map(|rank| {
                let (elapsed, reading) = &rank.runs[repeat];
                let (mut waiting_seconds, mut communication_seconds) = (0.0, 0.0);
                let mut hidden_seconds = 0.0;
                for (phase, _, entry) in reading.iter() {
                    if phase != Phase::Outside {
                        waiting_seconds += entry.waited.as_secs_f64();
                        communication_seconds += entry.moved.as_secs_f64();
                        hidden_seconds += entry.hidden.as_secs_f64();
                    }
                }
                RankSeconds {
                    compute_seconds: elapsed - waiting_seconds - communication_seconds,
                    communication_seconds,
                    waiting_seconds,
                    hidden_seconds,
                }
            })
            .collect();
        let slowest = ranks
            .iter()
            .map(|rank| rank.runs[repeat].0)
            .fold(0.0, f64::max);
        (slowest, spent)
    };
    match Timing::of((0..repeats).map(repeat).collect()) {
        Some(timing) => timing,
        None => unreachable!("a case has at least one repeat"),
    }
}

fn traffic(ranks: &[RankRuns]) -> Traffic {
    let per_rank = ranks.iter().map(|rank| {
        let [forward, backward, parameters] = rank.formula;
        let sent = |phase, formula_bytes| Sent {
            measured_bytes: rank
                .runs
                .last()
                .map_or(0, |(_, reading)| reading.phase(phase).bytes),
            formula_bytes,
        };
        RankTraffic {
            forward: sent(Phase::Forward, forward),
            backward: sent(Phase::Backward, backward),
            parameters: sent(Phase::Gradients, parameters),
        }
    });
    let mut kinds: BTreeMap<String, CollectiveCount> = BTreeMap::new();
    let first = ranks.first().and_then(|rank| rank.runs.last());
    for (phase, collective, entry) in first.iter().flat_map(|(_, reading)| reading.iter()) {
        let kind = collective.to_string();
        let count = kinds.entry(kind.clone()).or_insert(CollectiveCount {
            kind,
            forward: 0,
            backward: 0,
        });
        match phase {
            Phase::Forward => count.forward += entry.calls,
            Phase::Backward | Phase::Gradients => count.backward += entry.calls,
            Phase::Outside => {}
        }
    }
    kinds.retain(|_, count| count.forward + count.backward > 0);
    Traffic {
        per_rank: per_rank.collect(),
        collectives: kinds.into_values().collect(),
    }
}

fn summary(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Timed(measured) => {
            let time = &measured.time;
            format!(
                "{} (median of {})",
                seconds(time.median_seconds),
                time.repeats_seconds.len()
            )
        }
        Outcome::Unequal { .. } => "not equal to serial".to_owned(),
        Outcome::Refused { .. } => "refused".to_owned(),
        Outcome::Error { .. } => "failed".to_owned(),
    }
}
