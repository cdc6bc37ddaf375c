//! Faults at random points of a training: whatever a rank does wrong, in whatever collective, every other rank
//! ends with the right error, in time, on threads and on MPI.
//!
//! The points are exchanges, forward, backward and in between, counted on the culprit: its transport is wrapped
//! by one that does the wrong thing at the n-th. On MPI the jobs are this same binary, started by `mpirun`, in
//! which [`a_rank_of_a_job`] is one rank.
#![cfg(feature = "flex")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that fails to run has failed; a job's ranks say what they saw"
)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor, TensorData};
use dsp_core::blocks::Blocks;
use dsp_core::launch::BoxError;
use dsp_core::ledger::Collective;
use dsp_core::transport::{Exchange, Pending, Transport};
use dsp_core::{CommError, Engine, Group, Launch, Loss, Session};
use dsp_models::error::ModelError;
use dsp_models::flow::{Batch, Noised, Sampling, loss};
use dsp_models::random::{Draws, Purpose};
use dsp_models::training::{Reduce, Trainer, TrainingConfig};
use dsp_models::video_dit::{Init, Text, VideoDit, VideoDitConfig, roles};
use serde::{Deserialize, Serialize};

const RANKS: usize = 3;
const STEPS: u64 = 8;
/// A step takes milliseconds.
const DEADLINE: Duration = Duration::from_millis(1500);
const SLACK: Duration = Duration::from_secs(5);

/// What a rank does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Fault {
    /// It panics.
    Panics,
    /// It sleeps for ever.
    Sleeps,
    /// Its function returns as if all were done.
    Returns,
    /// It calls another collective than the others.
    OtherCollective,
    /// It calls the same collective on another shape.
    OtherShape,
    /// Its process exits, with success.
    Exits,
    /// Its process is killed.
    Killed,
}

/// Which rank does it, and in which of its exchanges.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Injection {
    fault: Fault,
    culprit: usize,
    at: u64,
    /// When gradients are summed: buckets are under way in the midst of other exchanges.
    reduce: Reduce,
}

/// What a rank unwinds with that returns early.
struct Left;

/// A transport that does the wrong thing in one of its exchanges.
#[derive(Debug)]
struct Disturbed {
    inner: Arc<dyn Transport>,
    entered: Arc<AtomicU64>,
    injection: Option<Injection>,
}

impl Transport for Disturbed {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn next_sequence(&self) -> u64 {
        self.inner.next_sequence()
    }

    fn start(&self, mut exchange: Exchange) -> Result<Box<dyn Pending>, CommError> {
        let number = self.entered.fetch_add(1, Ordering::Relaxed);
        match self.injection.filter(|injection| injection.at == number) {
            None => {}
            Some(Injection { fault, .. }) => match fault {
                Fault::Panics => panic!("out of luck"),
                Fault::Sleeps => loop {
                    std::thread::sleep(Duration::from_secs(3600));
                },
                Fault::Returns => panic_any(Left),
                Fault::OtherCollective => {
                    exchange.collective = match exchange.collective {
                        Collective::RingShift => Collective::AllToAll,
                        _ => Collective::RingShift,
                    };
                }
                Fault::OtherShape => {
                    let shape = [7, 1, 1, 1, 1];
                    let dtype = exchange.tensor.dtype();
                    exchange.tensor = Tensor::zeros(shape, (&exchange.tensor.device(), dtype));
                    exchange.before = Arc::new(Blocks::replicated(shape, self.size()));
                    exchange.after = exchange.before.clone();
                }
                Fault::Exits => std::process::exit(0),
                Fault::Killed => {
                    let own = std::process::id().to_string();
                    std::process::Command::new("kill")
                        .args(["-9", &own])
                        .status()
                        .unwrap();
                    unreachable!("a process that was killed");
                }
            },
        }
        self.inner.start(exchange)
    }

    fn subgroup(&self, members: &[usize]) -> Result<Arc<dyn Transport>, CommError> {
        Ok(Arc::new(Self {
            inner: self.inner.subgroup(members)?,
            entered: self.entered.clone(),
            injection: self.injection,
        }))
    }

    fn abort(&self, cause: CommError) {
        self.inner.abort(cause);
    }
}

/// A training whose losses are returned, and how many exchanges this rank entered.
fn train(
    template: &VideoDit,
    reduce: Reduce,
    injection: Option<Injection>,
    group: Group,
) -> Result<(Vec<f64>, u64), BoxError> {
    let own = group.rank();
    let entered = Arc::new(AtomicU64::new(0));
    let counter = entered.clone();
    let group = group.through(move |inner| {
        Arc::new(Disturbed {
            inner,
            entered: counter,
            injection: injection.filter(|injection| injection.culprit == own),
        })
    });
    let trained = catch_unwind(AssertUnwindSafe(|| steps(template, reduce, group)));
    match trained {
        Ok(losses) => Ok((losses?, entered.load(Ordering::Relaxed))),
        Err(left) if left.is::<Left>() => Ok((vec![], 0)),
        Err(payload) => resume_unwind(payload),
    }
}

fn config() -> VideoDitConfig {
    VideoDitConfig::new()
        .with_in_channels(2)
        .with_hidden_size(8)
        .with_num_heads(2)
        .with_depth(1)
        .with_mlp_ratio(1.0)
        .with_caption_channels(4)
        .with_model_max_length(2)
}

fn template() -> VideoDit {
    config()
        .init(Init::AsPublished, 1, &Device::flex())
        .unwrap()
}

fn steps(template: &VideoDit, reduce: Reduce, group: Group) -> Result<Vec<f64>, ModelError> {
    let device = Device::flex().autodiff();
    let config = config();
    let strategy = dsp_strategies::by_name("dsp").unwrap();
    let session = Session::new(strategy, group, config.shape(1, 4, 3, 4))?;
    let training = TrainingConfig::new(STEPS, 1, 3e-3)
        .with_clip_norm(Some(1.0))
        .with_reduce(reduce);
    let roles = roles(&config.block());
    let mut trainer = Trainer::new(template, roles, training, &session, &device);
    let mut draws = Draws::new(3, Purpose::Other, 0);
    let mut tensor =
        |shape: &[usize]| TensorData::new(draws.normals(shape.iter().product()), shape.to_vec());
    let batch = Batch {
        video: Tensor::from_data(tensor(&[1, 2, 4, 3, 4]), (&device, DType::F32)),
        fps: vec![24.0],
        resolution: [48.0, 96.0],
        text: Text {
            tokens: Tensor::from_data(tensor(&[1, 2, 4]), (&device, DType::F32)),
            lengths: [2].into(),
        },
        frame_mask: None,
    };
    let sampling = Sampling::LogitNormal {
        location: 0.0,
        scale: 1.0,
    };
    let noised = Noised::draw(&batch, sampling, 5, 0);
    (0..STEPS)
        .map(|_| {
            let part = |model: &VideoDit| -> Result<Loss, ModelError> {
                Ok(Loss::OfShard(loss(model, &batch, &noised, &session)?))
            };
            Ok(trainer.step(&session, [part])?.loss)
        })
        .collect()
}

/// How many exchanges a rank enters in the whole training.
fn exchanges(reduce: Reduce) -> u64 {
    let template = template();
    let ends = Launch::new(RANKS)
        .run(move |group| train(&template, reduce, None, group))
        .unwrap();
    assert!(
        ends.iter()
            .all(|(losses, _)| losses.len() == STEPS as usize)
    );
    ends[0].1
}

/// `count` injections of each fault: culprits in turn, points spread at random over the whole training.
fn injections(faults: &[Fault], count: u64) -> Vec<Injection> {
    let ways = [Reduce::AtOnce, Reduce::Overlapped].map(|reduce| (reduce, exchanges(reduce)));
    for (_, exchanges) in ways {
        assert!(
            exchanges >= 5 * STEPS,
            "a training of {exchanges} exchanges is none"
        );
    }
    let mut draws = Draws::new(11, Purpose::Other, 0);
    let mut all = Vec::new();
    for &fault in faults {
        // One of each equally long part, so that the beginning and the end have theirs.
        for (part, drawn) in (0..count).zip(draws.normals(count as usize)) {
            let drawn = f64::from(drawn as f32).abs().fract();
            let (reduce, exchanges) = ways[all.len() / RANKS % 2];
            all.push(Injection {
                fault,
                culprit: all.len() % RANKS,
                at: ((part as f64 + drawn) * exchanges as f64 / count as f64) as u64,
                reduce,
            });
        }
    }
    all
}

/// Whether `error` says what was wrong, and of whom.
fn is_right(error: &CommError, injection: Injection) -> bool {
    let culprit = injection.culprit;
    match (injection.fault, error) {
        (Fault::Panics, CommError::Panicked { rank, message, .. }) => {
            *rank == culprit && message == "out of luck"
        }
        (Fault::Returns, CommError::PeerEnded { ended, .. }) => *ended == culprit,
        (Fault::Sleeps | Fault::Exits | Fault::Killed, error) => match error {
            CommError::Unanswered { rank, missing, .. } => {
                *rank != culprit && *missing == [culprit]
            }
            // Where nobody needed anything of it any more.
            CommError::Stuck { rank, .. } => *rank == culprit,
            _ => false,
        },
        (
            Fault::OtherCollective,
            CommError::Mismatch {
                call,
                other_call,
                rank,
                other,
            },
        ) => call.collective != other_call.collective && [rank, other].contains(&&culprit),
        (
            Fault::OtherShape,
            CommError::Mismatch {
                call,
                other_call,
                rank,
                other,
            },
        ) => {
            call.collective == other_call.collective
                && call.shape != other_call.shape
                && [rank, other].contains(&&culprit)
        }
        _ => false,
    }
}

/// Trains with a fault; what this process's ranks saw of it.
fn disturbed(engine: &Engine, injection: Injection) -> (Option<CommError>, Vec<Option<CommError>>) {
    let template = template();
    let views = Arc::new(Mutex::new(vec![None; RANKS]));
    let seen = views.clone();
    let body = move |group: Group| {
        let rank = group.rank();
        let note = |error: Option<&CommError>| seen.lock().unwrap()[rank] = error.cloned();
        match catch_unwind(AssertUnwindSafe(|| {
            train(&template, injection.reduce, Some(injection), group)
        })) {
            Ok(result) => result.map(drop).inspect_err(|error| {
                let error = error.downcast_ref::<ModelError>();
                note(error.and_then(comm_error));
            }),
            Err(payload) => {
                let payload: Box<dyn Any + Send> = payload;
                note(payload.downcast_ref());
                resume_unwind(payload)
            }
        }
    };
    let launch = Launch::new(RANKS)
        .timeout(DEADLINE)
        .threads_per_rank(1)
        .on(engine);
    let root = launch.run(body).err().map(|error| error.root);
    let views = views.lock().unwrap().clone();
    (root, views)
}

/// The ranks' error in a model's.
fn comm_error(error: &ModelError) -> Option<&CommError> {
    match error {
        ModelError::Core(dsp_core::Error::Comm(error)) => Some(error),
        _ => None,
    }
}

#[test]
fn every_fault_on_threads_ends_every_rank_in_time_with_the_right_error() {
    // Threads that panic say so; these do on purpose.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let payload = panic.payload();
        if !payload.is::<Left>() && payload.downcast_ref() != Some(&"out of luck") {
            usual(panic);
        }
    }));
    let faults = [
        Fault::Panics,
        Fault::Returns,
        Fault::OtherCollective,
        Fault::OtherShape,
        Fault::Sleeps,
    ];
    for injection in injections(&faults, 12) {
        let start = Instant::now();
        let (root, views) = disturbed(&Engine::Threads, injection);
        let root = root.unwrap_or_else(|| panic!("{injection:?} was not noticed"));
        let took = start.elapsed();
        assert!(is_right(&root, injection), "{injection:?}: {root}");
        assert!(took < DEADLINE + SLACK, "{injection:?} took {took:?}");
        for (rank, view) in views.iter().enumerate() {
            // A rank that had nothing left to do has seen nothing.
            if rank != injection.culprit && view.is_some() {
                assert_eq!(view.as_ref(), Some(&root), "{injection:?}: rank {rank}");
            }
        }
    }
}

#[cfg(feature = "mpi")]
mod on_mpi {
    use std::process::Command;

    use dsp_core::transport::mpi::Mpi;

    use super::*;

    const INJECTION: &str = "DSP_TEST_INJECTION";
    /// How long `mpirun` and the processes may take to begin.
    const START: Duration = Duration::from_secs(5);

    /// One rank of a job that [`inject`] starts; by itself nothing.
    #[test]
    fn a_rank_of_a_job() {
        let Ok(injection) = std::env::var(INJECTION) else {
            return;
        };
        let injection: Injection = serde_json::from_str(&injection).unwrap();
        let mpi = Mpi::start().unwrap();
        let rank = mpi.rank();
        // The processes end together when the engine is dropped: what was seen is said before.
        let engine = Engine::Mpi(mpi);
        let (root, _) = disturbed(&engine, injection);
        let root = root.expect("the fault is noticed");
        println!("\nSAW {rank} {}", serde_json::to_string(&root).unwrap());
        panic!("{root}");
    }

    #[test]
    fn every_fault_of_a_living_rank_ends_every_process_in_time_with_the_right_error() {
        inject(&[
            Fault::Panics,
            Fault::Returns,
            Fault::OtherCollective,
            Fault::OtherShape,
        ]);
    }

    #[test]
    fn a_process_that_sleeps_exits_or_is_killed_ends_the_others_with_the_right_error() {
        inject(&[Fault::Sleeps, Fault::Exits, Fault::Killed]);
    }

    /// Seven injections of each fault, a job each.
    fn inject(faults: &[Fault]) {
        if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() {
            return;
        }
        for injection in injections(faults, 7) {
            let start = Instant::now();
            let mut mpirun = Command::new("mpirun");
            mpirun.args([
                "-n",
                &RANKS.to_string(),
                "--oversubscribe",
                "--allow-run-as-root",
            ]);
            if matches!(injection.fault, Fault::Exits | Fault::Killed) {
                // Else `mpirun` ends the others before they can say what they saw.
                mpirun.args(["--mca", "orte_abort_on_non_zero_status", "0"]);
                mpirun.args(["--mca", "orte_allowed_exit_without_sync", "1"]);
            }
            let job = mpirun
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", "on_mpi::a_rank_of_a_job", "--nocapture"])
                .arg("--test-threads=1")
                .env(INJECTION, serde_json::to_string(&injection).unwrap())
                .output()
                .unwrap();
            let took = start.elapsed();
            let output = String::from_utf8_lossy(&job.stdout);
            let context = || {
                let errors = String::from_utf8_lossy(&job.stderr);
                format!("{injection:?} after {took:?}:\n{output}\n{errors}")
            };
            assert!(!job.status.success(), "{}", context());
            assert!(took < START + DEADLINE + SLACK, "{}", context());
            let mut seen = vec![None; RANKS];
            for line in output.lines() {
                if let Some(saw) = line.strip_prefix("SAW ") {
                    let (rank, error) = saw.split_once(' ').unwrap();
                    let error: CommError = serde_json::from_str(error).unwrap();
                    seen[rank.parse::<usize>().unwrap()] = Some(error);
                }
            }
            let first = seen.iter().flatten().next().cloned();
            for (rank, error) in seen.iter().enumerate() {
                let gone = matches!(
                    injection.fault,
                    Fault::Exits | Fault::Killed | Fault::Sleeps
                );
                if gone && rank == injection.culprit {
                    continue;
                }
                let error = error
                    .as_ref()
                    .unwrap_or_else(|| panic!("rank {rank}: {}", context()));
                assert!(is_right(error, injection), "rank {rank}: {}", context());
                assert_eq!(Some(error), first.as_ref(), "{}", context());
            }
        }
    }
}
