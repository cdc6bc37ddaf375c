//! A run: ranks that train, evaluate, write checkpoints and show what was learnt.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use dsp_core::collective::all_reduce_in;
use dsp_core::ledger::Phase;
use dsp_core::{
    CommError, Engine, Group, Launch, LaunchError, PlanError, SequenceParallel, Session,
};
use dsp_models::training::{
    Manifest, Recompute, Report, Snapshot, SnapshotError, Store, StoreError, Subject, Trainer,
};
use dsp_models::weights::{OriginalNames, WeightsError, cast};
use dsp_strategies::UnknownStrategy;
use serde::{Deserialize, Serialize};

use super::config::{RunConfig, RunConfigError};
use super::folder::{
    CHECKPOINTS, CONFIG, Lock, Metrics, REPORT, SAMPLES, failed, remove_report, write_config,
};
use super::task::{Baseline, Measure, Place, Samples, Shown, Stage, Task};
use crate::devices::{DeviceError, Devices};
use crate::subject::SubjectError;

/// Why a run did not begin or did not end well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] RunConfigError),
    /// No device to compute on.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A strategy that is not compiled in.
    #[error(transparent)]
    Strategy(#[from] UnknownStrategy),
    /// The model or its data.
    #[error(transparent)]
    Subject(#[from] SubjectError),
    /// The strategy refuses the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A checkpoint.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A checkpoint's weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The ranks.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A collective.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A folder that holds another run.
    #[error(
        "{}: holds a run already; go on with it by --resume {}, or name another folder by --out",
        folder.display(), folder.display()
    )]
    Taken {
        /// The folder.
        folder: PathBuf,
    },
    /// A folder that is another training's.
    #[error(
        "{}: another training writes here; wait for its end, or name another folder by --out",
        folder.display()
    )]
    Busy {
        /// The folder.
        folder: PathBuf,
    },
    /// Nothing to go on from.
    #[error("{}: has no checkpoint to go on from", folder.display())]
    Nothing {
        /// The folder.
        folder: PathBuf,
    },
    /// A damaged checkpoint beside others.
    #[error(
        "{source}; other checkpoints here are of the steps {others:?}: go on from one by --from-step"
    )]
    Damaged {
        /// What is wrong.
        source: StoreError,
        /// The others.
        others: Vec<u64>,
    },
    /// A checkpoint that is past the end, or at the end of a run that was shown.
    #[error(
        "the checkpoint is of step {step}, and the run has {steps} steps: name more by --steps"
    )]
    Done {
        /// The checkpoint's.
        step: u64,
        /// The run's.
        steps: u64,
    },
    /// The loss or its gradient is no number any more.
    #[error(
        "step {step} has the loss {loss} and a gradient of norm {gradient_norm}: the last checkpoint is of before; try a \
         smaller learning rate, or --watch finite from there, which names the layer"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// The loss.
        loss: f64,
        /// Its gradient's norm.
        gradient_norm: f64,
    },
    /// The held-out error is no number any more, though the step's loss was one.
    #[error(
        "after step {step} the held-out error is {error}: go on from an earlier checkpoint with a smaller learning rate, \
         or with --watch finite, which names the layer"
    )]
    HeldOut {
        /// After how many steps.
        step: u64,
        /// The error.
        error: f64,
    },
    /// Weights, or the optimizer's moments of them, that are no numbers any more, though the step's loss was one.
    #[error(
        "step {step} leaves weights or moments that are not finite, and no checkpoint is made of them: the last one is of \
         before; try a smaller learning rate or weight decay"
    )]
    NotFinite {
        /// The step.
        step: u64,
    },
    /// A file of the run.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl From<StoreError> for TrainError {
    fn from(error: StoreError) -> Self {
        Self::Snapshot(error.into())
    }
}

/// Where a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// With the model's first weights.
    Fresh,
    /// With the folder's last checkpoint.
    Latest,
    /// With the checkpoint of a step.
    Step(u64),
}

/// What happens in a run, for those who watch.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// The run begins, at a step.
    Begins {
        /// The step.
        step: u64,
        /// The last step.
        steps: u64,
        /// What the error is.
        measure: Measure,
        /// The errors to beat.
        baselines: &'a [Baseline],
    },
    /// A step was made.
    Step(&'a Line),
    /// The held-out samples were evaluated.
    Evaluated {
        /// After how many steps.
        step: u64,
        /// The error, in the measure's unit.
        error: f64,
    },
    /// A checkpoint was written.
    Saved(&'a Path),
    /// The last step was made: what was learnt is shown now, which may take a while.
    Shows,
}

/// A line of the metrics' file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A step.
    Step {
        /// The step, counted from 1.
        step: u64,
        /// The loss before it.
        loss: f64,
        /// The norm of all gradients together.
        gradient_norm: f64,
        /// The learning rate.
        learning_rate: f64,
        /// Tokens a second.
        tokens_per_second: f64,
    },
    /// An evaluation.
    HeldOut {
        /// After how many steps.
        step: u64,
        /// The error of the held-out samples.
        held_out: f64,
    },
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The held-out error after the last step.
    pub error: f64,
    /// What it is.
    pub measure: Measure,
    /// What was to be beaten.
    pub baselines: Vec<Baseline>,
    /// What was learnt.
    pub shown: Vec<Shown>,
}

impl Outcome {
    /// Whether every error to beat was.
    pub fn beats_all(&self) -> bool {
        self.baselines
            .iter()
            .all(|baseline| self.error < baseline.error)
    }
}

/// What is to be trained, but for the task.
pub(super) struct Run<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) subject: Subject,
    pub(super) folder: &'a Path,
    pub(super) begin: Begin,
    pub(super) engine: &'a Engine,
    pub(super) watch: Arc<dyn Fn(Event<'_>) + Send + Sync>,
}

impl Run<'_> {
    /// Trains a task into the folder.
    ///
    /// # Errors
    /// [`TrainError`]: whatever can be known before the first step is.
    pub(super) fn of<T: Task>(self, task: T) -> Result<Outcome, TrainError> {
        let Self {
            config,
            subject,
            folder,
            begin,
            engine,
            watch,
        } = self;
        // The launch would refuse it too, after the folder has been written to.
        let (asked, started) = (config.mesh.ranks(), engine.most_ranks());
        if asked > started {
            return Err(CommError::Processes { asked, started }.into());
        }
        let strategy = dsp_strategies::by_name(&config.strategy)?;
        // Weights and their averages have one type, what is computed perhaps another.
        let devices = (config.device).open(engine, config.dtype.dtype())?;
        (config.device).open(engine, config.training.compute.dtype(config.dtype.dtype()))?;
        let largest = largest_part(config);
        strategy.plan(&task.shape(largest), config.mesh.sp)?;
        let checkpoints = folder.join(CHECKPOINTS);
        let template = cast(task.template(config.training.seed)?, config.dtype.dtype());
        let measure = task.measure();
        let baselines = task.baselines()?;

        // Where ranks are processes, one of them writes: what several tidied up they would take from each other.
        let writes = engine.held(1).contains(&0);
        if writes && begin == Begin::Fresh {
            fs::create_dir_all(folder).map_err(failed("cannot be made", folder))?;
        }
        // Before it is looked at what there is: another training would change it. (Here and not beside the writer, for ranks
        // may drop that a moment after the launch has returned.)
        let _lock = writes.then(|| Lock::take(folder)).transpose()?;
        let start = match begin {
            Begin::Fresh => {
                if Store::existing(&checkpoints)
                    .is_ok_and(|store| !matches!(store.steps().as_deref(), Ok([])))
                {
                    return Err(TrainError::Taken {
                        folder: folder.to_owned(),
                    });
                }
                None
            }
            Begin::Latest | Begin::Step(_) => {
                let of = (config, &subject);
                Some(load(&template, of, folder, &checkpoints, begin)?)
            }
        };
        let step = start.as_ref().map_or(0, |snapshot| snapshot.step);
        let samples = folder.join(SAMPLES);
        let writer = match writes {
            true => {
                let store = Store::open(&checkpoints)?;
                // Those of steps that are made again are another curve's.
                store.forget_after(step)?;
                remove_report(folder)?;
                write_config(config, folder)?;
                fs::create_dir_all(&samples).map_err(failed("cannot be made", &samples))?;
                let metrics = Mutex::new(Metrics::open(folder, step, config.training.steps)?);
                Some(Writer { store, metrics })
            }
            false => None,
        };
        watch(Event::Begins {
            step,
            steps: config.training.steps,
            measure,
            baselines: &baselines,
        });

        let launch = Launch::new(config.mesh.ranks())
            .timeout(Duration::from_secs_f64(config.deadline_seconds))
            .on(engine);
        let shared = Arc::new(Shared {
            task,
            config: config.clone(),
            subject,
            strategy,
            devices,
            template,
            start,
            writer,
            samples,
            watch,
        });
        let mut ends = launch.run(move |world| shared.on_rank(&world))?.into_iter();
        let (error, shown) = ends.next().unwrap_or((f64::NAN, vec![]));
        Ok(Outcome {
            error: error * measure.factor,
            measure,
            baselines,
            shown,
        })
    }
}

/// The samples that a replica computes at once.
fn largest_part(config: &RunConfig) -> usize {
    let share = config.training.batch.div_ceil(config.mesh.dp);
    config.training.microbatch.unwrap_or(share).min(share)
}

fn load<M: OriginalNames>(
    template: &M,
    (config, subject): (&RunConfig, &Subject),
    folder: &Path,
    checkpoints: &Path,
    begin: Begin,
) -> Result<Snapshot<M>, TrainError> {
    let nothing = || TrainError::Nothing {
        folder: folder.to_owned(),
    };
    let store = Store::existing(checkpoints).map_err(|_| nothing())?;
    let step = match begin {
        Begin::Step(step) => step,
        _ => store.latest()?.ok_or_else(nothing)?,
    };
    let others = || -> Vec<u64> {
        let steps = store.steps().unwrap_or_default();
        steps.into_iter().filter(|&other| other != step).collect()
    };
    let loaded = store.load(step).map_err(|source| match others() {
        others if others.is_empty() => source.into(),
        others => TrainError::Damaged { source, others },
    })?;
    let training = &config.training;
    let here = Manifest::new(subject, step, training.batch, training.seed);
    Manifest::of(&loaded)?.check(&here, &loaded)?;
    let snapshot = Snapshot::from_files(template, &loaded, config.dtype.dtype())?;
    let (step, steps) = (snapshot.step, training.steps);
    let shown = || folder.join(REPORT).exists();
    match step > steps || step == steps && shown() {
        true => Err(TrainError::Done { step, steps }),
        false => Ok(snapshot),
    }
}

/// What all ranks of a run share. Tensors in it are in no graph.
struct Shared<T: Task> {
    task: T,
    config: RunConfig,
    subject: Subject,
    strategy: Arc<dyn SequenceParallel>,
    devices: Devices,
    template: T::Module,
    start: Option<Snapshot<T::Module>>,
    /// In the process that holds rank 0.
    writer: Option<Writer>,
    samples: PathBuf,
    watch: Arc<dyn Fn(Event<'_>) + Send + Sync>,
}

/// What rank 0 writes into.
struct Writer {
    store: Store,
    metrics: Mutex<Metrics>,
}

impl<T: Task> Shared<T> {
    /// The whole run on a rank: the held-out error, and what the rank shows.
    fn on_rank(&self, world: &Group) -> Result<(f64, Vec<Shown>), TrainError> {
        let (task, config) = (&self.task, &self.config);
        let training = &config.training;
        let [group, replicas] = config.mesh.groups(world)?;
        let replica = replicas.rank();
        let sessions = Sessions {
            first: Session::new(
                self.strategy.clone(),
                group,
                task.shape(largest_part(config)),
            )?
            .with_replicas(replicas)
            .watching(config.watch)
            .switching_in(config.switch_parts),
            others: RefCell::default(),
        };
        let session = &sessions.first;
        let device = self.devices.of_rank(world.rank()).autodiff();
        let device = match training.recompute {
            Recompute::Nothing => device,
            Recompute::Cheap => device.gradient_checkpointing(),
        };
        let role = |path: &str| task.role(path);
        let mut trainer = match &self.start {
            Some(snapshot) => Trainer::resume(snapshot, role, training.clone(), session, &device),
            None => Trainer::new(&self.template, role, training.clone(), session, &device),
        };
        let place = Place {
            device,
            dtype: training.compute.dtype(config.dtype.dtype()),
        };
        let mut error = f64::NAN;
        // A run that was ended after its last checkpoint, and not shown yet.
        if trainer.steps() == training.steps {
            error = self.held_out(&trainer, &sessions, replica, &place)?;
        }
        while trainer.steps() < training.steps {
            let begun = Instant::now();
            let report = self.step(&mut trainer, &sessions, replica, &place)?;
            // Before it is noted: JSON has no numbers that are none.
            if !(report.loss.is_finite() && report.gradient_norm.is_finite()) {
                return Err(TrainError::Diverged {
                    step: report.step,
                    loss: report.loss,
                    gradient_norm: report.gradient_norm,
                });
            }
            if world.rank() == 0 {
                let tokens = (training.batch * task.tokens()) as f64;
                self.note(&Line::Step {
                    step: report.step,
                    loss: report.loss,
                    gradient_norm: report.gradient_norm,
                    learning_rate: report.learning_rate,
                    tokens_per_second: tokens / begun.elapsed().as_secs_f64(),
                })?;
            }
            let is_last = report.step == training.steps;
            if is_last || report.step % config.evaluate_every == 0 {
                error = self.held_out(&trainer, &sessions, replica, &place)?;
            }
            if is_last || report.step % config.checkpoint_every == 0 {
                if !trainer.is_finite(session)? {
                    return Err(TrainError::NotFinite { step: report.step });
                }
                // The other replicas hold the same.
                let of_replica = (replica == 0).then(|| trainer.snapshot(session));
                let snapshot = of_replica.transpose()?.filter(|_| world.rank() == 0);
                self.save(snapshot, world, &place.device)?;
            }
        }
        if world.rank() == 0 {
            (self.watch)(Event::Shows);
        }
        let module = trainer.computed().valid();
        let shown = task.show(
            &module,
            &Stage {
                place: without_graph(&place),
                session: &sessions.of(1)?,
                seed: training.seed,
                folder: &self.samples,
            },
        )?;
        Ok((error, shown))
    }

    fn step(
        &self,
        trainer: &mut Trainer<T::Module>,
        sessions: &Sessions,
        replica: usize,
        place: &Place,
    ) -> Result<Report, TrainError> {
        let training = &self.config.training;
        let first = trainer.steps() * training.batch as u64;
        let share = self.config.mesh.share(replica, training.batch);
        let parts = parts(share, largest_part(&self.config));
        let parts = parts.map(|part| {
            move |module: &T::Module| {
                let weight = part.len() as f64 / training.batch as f64;
                let samples = Samples::Drawn {
                    seed: training.seed,
                    numbers: first + part.start as u64..first + part.end as u64,
                };
                let session = sessions.of(part.len())?;
                let loss = self.task.loss(module, &samples, place, &session)?;
                Ok::<_, TrainError>(weighted(loss, weight))
            }
        });
        trainer.step(&sessions.first, parts)
    }

    /// The mean error of the held-out samples, the same on every rank: a number, and noted by the first.
    fn held_out(
        &self,
        trainer: &Trainer<T::Module>,
        sessions: &Sessions,
        replica: usize,
        place: &Place,
    ) -> Result<f64, TrainError> {
        let step = trainer.steps();
        let error = self.evaluate(trainer, sessions, replica, place)?;
        if !error.is_finite() {
            return Err(TrainError::HeldOut { step, error });
        }
        if replica == 0 && sessions.first.group().rank() == 0 {
            let held_out = error * self.task.measure().factor;
            self.note(&Line::HeldOut { step, held_out })?;
        }
        Ok(error)
    }

    /// The mean error of the held-out samples, the same on every rank.
    fn evaluate(
        &self,
        trainer: &Trainer<T::Module>,
        sessions: &Sessions,
        replica: usize,
        place: &Place,
    ) -> Result<f64, TrainError> {
        let place = &without_graph(place);
        let module = trainer.computed().valid();
        let all = self.task.held_out();
        let mut sum = 0.0;
        for part in parts(
            self.config.mesh.share(replica, all),
            largest_part(&self.config),
        ) {
            let weight = part.len() as f64 / all as f64;
            let session = sessions.of(part.len())?;
            let samples = Samples::HeldOut(part);
            sum += weight * self.task.error(&module, &samples, place, &session)?;
        }
        let own = TensorData::new(vec![sum], [1]);
        let own = Tensor::from_data(own, (&place.device, self.config.dtype.dtype()));
        Ok(sessions.first.sum_over_ranks(own)?.into_scalar::<f64>())
    }

    /// Writes the snapshot, which rank 0 has.
    fn save(
        &self,
        snapshot: Option<Snapshot<T::Module>>,
        world: &Group,
        device: &Device,
    ) -> Result<(), TrainError> {
        let (config, training) = (&self.config, &self.config.training);
        let work = match (&self.writer, snapshot) {
            // To read tensors back takes time too, and no device minds which thread does it.
            (Some(writer), Some(snapshot)) => Some(move || {
                let step = snapshot.step;
                let manifest = Manifest::new(&self.subject, step, training.batch, training.seed);
                let mut files = snapshot.to_files(&manifest)?;
                files.push((CONFIG, config.to_toml()?.into_bytes()));
                let keep = NonZeroUsize::new(config.keep).unwrap_or(NonZeroUsize::MIN);
                let path = writer.store.save(step, &files, keep)?;
                (self.watch)(Event::Saved(&path));
                Ok(())
            }),
            _ => None,
        };
        while_others_wait(work, world, device)
    }

    fn note(&self, line: &Line) -> Result<(), TrainError> {
        if let Some(writer) = &self.writer {
            let metrics = writer.metrics.lock();
            metrics.unwrap_or_else(PoisonError::into_inner).add(line)?;
        }
        (self.watch)(match line {
            Line::Step { .. } => Event::Step(line),
            Line::HeldOut { step, held_out } => Event::Evaluated {
                step: *step,
                error: *held_out,
            },
        });
        Ok(())
    }
}

/// Does some work, which one rank has, while the others wait for its end, however late that is: all of them meet
/// again and again meanwhile, each time within the group's time-out, in which it is found out if a rank is gone.
fn while_others_wait(
    work: Option<impl FnOnce() -> Result<(), TrainError> + Send>,
    world: &Group,
    device: &Device,
) -> Result<(), TrainError> {
    let device = &device.clone().without_autodiff();
    std::thread::scope(|scope| {
        let (end, ends) = mpsc::channel();
        if let Some(work) = work {
            scope.spawn(move || end.send(work()));
        } else {
            drop(end);
        }
        loop {
            let own = match ends.recv_timeout(world.timeout() / 4) {
                Ok(ended) => {
                    ended?;
                    0.0
                }
                Err(RecvTimeoutError::Timeout) => 1.0,
                Err(RecvTimeoutError::Disconnected) => 0.0,
            };
            let own = Tensor::<1>::from_floats([own], device);
            let working = all_reduce_in(own, Phase::Outside, world)?;
            if working.into_scalar::<f32>() == 0.0 {
                return Ok(());
            }
        }
    })
}

/// A session for each number of samples, planned once.
struct Sessions {
    first: Session,
    others: RefCell<BTreeMap<usize, Session>>,
}

impl Sessions {
    fn of(&self, samples: usize) -> Result<Session, PlanError> {
        if samples == self.first.model().batch {
            return Ok(self.first.clone());
        }
        if let Some(session) = self.others.borrow().get(&samples) {
            return Ok(session.clone());
        }
        let session = self.first.with_batch(samples)?;
        self.others.borrow_mut().insert(samples, session.clone());
        Ok(session)
    }
}

/// A range in parts of at most `largest`.
fn parts(
    range: std::ops::Range<usize>,
    largest: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let end = range.end;
    range
        .step_by(largest.max(1))
        .map(move |start| start..(start + largest.max(1)).min(end))
}

fn weighted(loss: dsp_core::Loss, weight: f64) -> dsp_core::Loss {
    use dsp_core::Loss::{OfShard, OfWhole};
    match loss {
        OfShard(loss) => OfShard(loss.mul_scalar(weight)),
        OfWhole(loss) => OfWhole(loss.mul_scalar(weight)),
    }
}

fn without_graph(place: &Place) -> Place {
    Place {
        device: place.device.clone().without_autodiff(),
        dtype: place.dtype,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_may_take_longer_than_ranks_wait_for_each_other_and_its_failure_is_everybodys() {
        const TIMEOUT: Duration = Duration::from_millis(500);
        let works = |ranks: usize, outcome: fn() -> Result<(), TrainError>| {
            Launch::new(ranks).timeout(TIMEOUT).run(move |world| {
                let work = (world.rank() == 0).then_some(|| {
                    std::thread::sleep(3 * TIMEOUT);
                    outcome()
                });
                while_others_wait(work, &world, &Device::flex())
            })
        };
        for ranks in [1, 3] {
            works(ranks, || Ok(())).unwrap();
        }
        let full = || {
            Err(TrainError::Nothing {
                folder: "full".into(),
            })
        };
        let error = works(3, full).unwrap_err().to_string();
        assert!(error.contains("full: has no checkpoint"), "{error}");
    }
}
