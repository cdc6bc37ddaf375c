//! `dsp compare`: runs a model on real data under every strategy on every number of ranks.
//!
//! Each case is first held to serial: output, input gradient, every parameter's gradient. One that differs is
//! not timed. Then the cases take turns, round by round: what a machine that others use does to one of them it does to
//! all of them. Each rank's ledger says what it sent and how long it waited.
//!
//! | file | idea |
//! |---|---|
//! | `rank` | what every rank of a case does |
//! | `measure` | from what ranks say of their runs to what a case took and sent |

mod measure;
mod rank;

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use dsp_core::{CommError, Engine, Launch, LaunchError, PlanError, SequenceParallel};
use dsp_strategies::UnknownStrategy;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::devices::Devices;
use crate::progress::Progress;
use crate::record::{Comparison, Equality, Measured, Memory, Outcome};
use crate::scenario::{Scenario, ScenarioError};
use crate::subject::{Subject, SubjectError};
use rank::{Outputs, RankRun, Steps};

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
    /// Ranks that are processes cannot tell each other how to go on.
    #[error("the processes cannot agree on how to go on")]
    Disagree(#[source] LaunchError),
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

/// A run on the processor that takes longer needs no other before it (benchmarks/RESULTS.md).
const LONG_SECONDS: f64 = 1.0;

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
        let mut comparison = Comparison::begin(self.scenario.clone(), &self.devices, &self.engine);
        let mut states = self.check(progress)?;
        let rounds = self.rounds(started.elapsed())?;
        let equal = |state: &&State| matches!(state, State::Equal(_));
        progress.rounds(rounds, states.iter().filter(equal).count());
        for round in 0..rounds {
            self.round(round, &mut states, progress, meter)?;
        }
        for (case, state) in self.cases.iter().zip(states) {
            let outcome = match state {
                State::Ended(outcome) => outcome,
                State::Equal(equal) => self.measured(equal, case.ranks)?,
            };
            comparison.push(&case.name, case.ranks, outcome);
        }
        comparison.elapsed_seconds = started.elapsed().as_secs_f64();
        Ok(comparison)
    }

    /// Holds every case to the first, serial.
    fn check(&self, progress: &Progress) -> Result<Vec<State>, CompareError> {
        let mut reference = None;
        let mut states = Vec::new();
        for case in &self.cases {
            progress.check(&case.name, case.ranks);
            let state = match self.held_to_serial(case, &mut reference) {
                Ok(state) => state,
                Err(stop) => State::Ended(stop.outcome(states.len())?),
            };
            progress.checked(state.verdict());
            states.push(state);
        }
        Ok(states)
    }

    /// One case; the first, serial, becomes what the others are held to.
    fn held_to_serial(
        &self,
        case: &CaseOf,
        reference: &mut Option<Arc<Outputs>>,
    ) -> Result<State, Stop> {
        let steps = self.steps(case)?;
        let (whole, gathered) = mpsc::channel();
        let ranks = {
            let steps = steps.clone();
            self.launch(case.ranks)
                .run_shared(move |group| steps.checked(group, &whole))
        };
        ranks.map_err(Stop::failed)?;
        // The process that holds rank 0 has all that there is to compare.
        let found = gathered.try_recv().ok().map(|(outputs, seconds)| {
            let outputs = Arc::new(outputs);
            let serial = reference.get_or_insert_with(|| outputs.clone());
            (outputs.equality(serial, self.scenario.tolerance), seconds)
        });
        let found = self.told(found).map_err(Stop::failed)?;
        let Some((equality, seconds)) = found else {
            unreachable!("rank 0 sends before it ends, and its process tells all others");
        };
        if !equality.holds() {
            return Ok(State::Ended(Outcome::Unequal { equality }));
        }
        // On a GPU this run may have waited for its kernels to be compiled, and says nothing of the next.
        let is_long = seconds >= LONG_SECONDS && self.devices.gpus(&self.engine).is_none();
        Ok(State::Equal(Box::new(Equal {
            equality,
            steps,
            warm_ups: usize::from(!is_long),
            runs: Vec::new(),
            memory: Memory::default(),
        })))
    }

    /// How often each case is timed: as often as fits into what the check of all has left of the time.
    fn rounds(&self, check: Duration) -> Result<usize, CompareError> {
        let fit = self.scenario.time_budget_seconds / check.as_secs_f64() - 1.0;
        let fit = self.told(Some(fit.max(0.0) as usize));
        let fit = fit.map_err(CompareError::Disagree)?.unwrap_or_default();
        Ok(fit.clamp(self.scenario.min_repeats, self.scenario.max_repeats))
    }

    /// Times every case once: there and back again, so that none always follows the same other.
    fn round(
        &self,
        round: usize,
        states: &mut [State],
        progress: &Progress,
        meter: &dyn Meter,
    ) -> Result<(), CompareError> {
        let mut order: Vec<usize> = (0..states.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let (case, state) = (&self.cases[index], &mut states[index]);
            let State::Equal(equal) = state else { continue };
            progress.time(&case.name, case.ranks, round);
            // One round is enough of a trace.
            meter.set_recording(round == 0);
            let timed = self.time(equal, case.ranks, round, meter);
            meter.set_recording(false);
            match timed {
                Ok(seconds) => progress.timed(&case.name, case.ranks, round, seconds),
                Err(stop) => *state = State::Ended(stop.outcome(index)?),
            }
        }
        Ok(())
    }

    /// Times a case once, and returns the seconds.
    fn time(
        &self,
        equal: &mut Equal,
        ranks: usize,
        round: usize,
        meter: &dyn Meter,
    ) -> Result<f64, Stop> {
        let (steps, warm_ups) = (equal.steps.clone(), equal.warm_ups);
        let before_bytes = meter.reset_peak();
        let ran = self
            .launch(ranks)
            .run_shared(move |group| steps.timed(group, round, warm_ups));
        let peak_bytes = meter.peak();
        let ran: Vec<RankRun> = ran.map_err(Stop::failed)?;
        let seconds = measure::slowest(&ran);
        equal.runs.push(ran);
        if peak_bytes > equal.memory.peak_bytes {
            equal.memory = Memory {
                peak_bytes,
                before_bytes,
            };
        }
        Ok(seconds)
    }

    fn measured(&self, equal: Box<Equal>, ranks: usize) -> Result<Outcome, CompareError> {
        let Some(time) = measure::timing(&equal.runs) else {
            unreachable!("a scenario has at least one round");
        };
        Ok(Outcome::Timed(Box::new(Measured {
            time,
            traffic: measure::traffic(&equal.runs),
            memory: self.over_processes(equal.memory, ranks)?,
            equality: equal.equality,
        })))
    }

    /// What the ranks of a case do; refused before any work, or not at all.
    fn steps(&self, case: &CaseOf) -> Result<Steps, Stop> {
        let strategy = case.strategy.clone().map_err(Stop::Absent)?;
        let shape = self.subject.shape();
        strategy.plan(&shape, case.ranks).map_err(Stop::Refused)?;
        Ok(Steps {
            subject: self.subject.clone(),
            strategy,
            model: self.scenario.model.kind().name(),
            devices: self.devices.clone(),
            dtype: self.scenario.dtype.dtype(),
            passes: self.scenario.passes,
            reduce: self.scenario.reduce,
            switch_parts: self.scenario.switch_parts,
        })
    }

    fn launch(&self, ranks: usize) -> Launch {
        let deadline = Duration::from_secs_f64(self.scenario.deadline_seconds);
        let launch = Launch::new(ranks).timeout(deadline).on(&self.engine);
        match self.scenario.threads_per_rank {
            Some(threads) => launch.threads_per_rank(threads),
            None => launch,
        }
    }

    /// What the process that holds rank 0 has found, on every process.
    fn told<T>(&self, own: Option<T>) -> Result<Option<T>, LaunchError>
    where
        T: Clone + Serialize + DeserializeOwned + Send + Sync + 'static,
    {
        if matches!(self.engine, Engine::Threads) {
            return Ok(own);
        }
        let told = self.launch(1);
        let told = told.run_shared(move |_| Ok::<_, CommError>(own.clone()))?;
        Ok(told.into_iter().flatten().next())
    }

    /// The sum over the processes that hold a part of `ranks` ranks.
    fn over_processes(&self, own: Memory, ranks: usize) -> Result<Memory, CompareError> {
        if matches!(self.engine, Engine::Threads) {
            return Ok(own);
        }
        let all = self.launch(ranks);
        let all = all.run_shared(move |_| Ok::<_, CommError>(own));
        let all = all.map_err(CompareError::Disagree)?;
        Ok(Memory {
            peak_bytes: all.iter().map(|memory| memory.peak_bytes).sum(),
            before_bytes: all.iter().map(|memory| memory.before_bytes).sum(),
        })
    }
}

/// How far a case has come.
enum State {
    /// It is not timed, or no longer.
    Ended(Outcome),
    /// It is.
    Equal(Box<Equal>),
}

/// A case that is equal to serial, and its runs so far.
struct Equal {
    equality: Equality,
    steps: Steps,
    /// Runs before each that is timed.
    warm_ups: usize,
    runs: Vec<Vec<RankRun>>,
    memory: Memory,
}

impl State {
    /// In a few words.
    fn verdict(&self) -> &'static str {
        match self {
            Self::Equal(_) => "equal to serial",
            Self::Ended(Outcome::Unequal { .. }) => "NOT equal to serial",
            Self::Ended(Outcome::Refused { .. }) => "refused",
            Self::Ended(_) => "failed",
        }
    }
}

/// Why a case goes no further.
enum Stop {
    Absent(UnknownStrategy),
    Refused(PlanError),
    Failed(Box<LaunchError>),
}

impl Stop {
    fn failed(error: LaunchError) -> Self {
        Self::Failed(Box::new(error))
    }

    /// The row of the case of this index; without the first, serial, there is nothing to compare with.
    fn outcome(self, index: usize) -> Result<Outcome, CompareError> {
        match self {
            Self::Refused(refusal) if index == 0 => Err(CompareError::SerialRefused(refusal)),
            Self::Failed(failure) if index == 0 => Err(CompareError::SerialFailed(*failure)),
            Self::Absent(absent) => Ok(Outcome::Refused {
                reason: absent.to_string(),
            }),
            Self::Refused(refusal) => Ok(Outcome::Refused {
                reason: refusal.to_string(),
            }),
            Self::Failed(failure) => Ok(Outcome::Error {
                message: failure.to_string(),
            }),
        }
    }
}
