//! Runs a function on every rank, each with a pool of cores of its own, and ends all of them with one error if
//! one fails. What a rank is, a thread or a process, is a value: [`Engine`].

use std::any::Any;
use std::error::Error as StdError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::CommError;
use crate::group::Group;
use crate::transport::job::Fails;
#[cfg(any(feature = "mpi", feature = "nccl"))]
use crate::transport::job::{Place, Processes};
use crate::transport::local::World;
#[cfg(feature = "mpi")]
use crate::transport::mpi;
#[cfg(feature = "nccl")]
use crate::transport::nccl;

/// The error type that a rank's function may return: anything that converts into a boxed error.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// Why a launch failed: the first failure, which every rank was ended with.
#[derive(Debug, thiserror::Error)]
#[error("{root}{}", abandoned_note(abandoned))]
pub struct LaunchError {
    /// The root cause.
    pub root: CommError,
    /// The rank's own error, where the root cause is that a rank returned one.
    #[source]
    pub source: Option<BoxError>,
    /// Ranks whose threads did not end and were abandoned.
    pub abandoned: Vec<usize>,
}

fn abandoned_note(abandoned: &[usize]) -> String {
    if abandoned.is_empty() {
        String::new()
    } else {
        format!(" (the threads of ranks {abandoned:?} did not end and are abandoned)")
    }
}

/// What ranks are.
#[derive(Debug, Clone, Default)]
pub enum Engine {
    /// Threads of this process, which read each other's memory.
    #[default]
    Threads,
    /// Processes that MPI started, this one among them: each holds one rank.
    #[cfg(feature = "mpi")]
    Mpi(mpi::Mpi),
    /// Processes with a GPU each, this one among them: each holds one rank, whose tensors are on its GPU.
    #[cfg(feature = "nccl")]
    Nccl(nccl::Nccl),
}

impl Engine {
    /// Which of a launch's ranks this process holds.
    pub fn held(&self, ranks: usize) -> std::ops::Range<usize> {
        match self {
            Self::Threads => 0..ranks,
            #[cfg(feature = "mpi")]
            Self::Mpi(mpi) => mpi.rank().min(ranks)..(mpi.rank() + 1).min(ranks),
            #[cfg(feature = "nccl")]
            Self::Nccl(nccl) => nccl.rank().min(ranks)..(nccl.rank() + 1).min(ranks),
        }
    }

    /// The most ranks that a launch can have: as many as there are processes, where ranks are such.
    pub fn most_ranks(&self) -> usize {
        match self {
            Self::Threads => usize::MAX,
            #[cfg(feature = "mpi")]
            Self::Mpi(mpi) => mpi.size(),
            #[cfg(feature = "nccl")]
            Self::Nccl(nccl) => nccl.size(),
        }
    }

    /// Where the tensors of this process's rank must be, where the engine moves those of one device only.
    pub fn device(&self) -> Option<Device> {
        match self {
            Self::Threads => None,
            #[cfg(feature = "mpi")]
            Self::Mpi(_) => None,
            #[cfg(feature = "nccl")]
            Self::Nccl(nccl) => Some(nccl.device()),
        }
    }

    /// The cores that all ranks may use together, on this machine or on all of MPI's; with NCCL this process's.
    pub fn cores(&self) -> usize {
        match self {
            #[cfg(feature = "mpi")]
            Self::Mpi(mpi) => mpi.all_cores(),
            _ => std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// The bytes of tensors that this process has handed to others so far; none where ranks are threads.
    pub fn sent_bytes(&self) -> Option<u64> {
        match self {
            Self::Threads => None,
            #[cfg(feature = "mpi")]
            Self::Mpi(mpi) => Some(mpi.sent_bytes()),
            #[cfg(feature = "nccl")]
            Self::Nccl(nccl) => Some(nccl.sent_bytes()),
        }
    }
}

/// How ranks are launched.
#[derive(Debug, Clone)]
pub struct Launch {
    ranks: usize,
    timeout: Duration,
    threads_per_rank: Option<usize>,
    engine: Engine,
}

/// A year: the longest that ranks wait, in place of any longer time, which some clocks could not be added to.
pub const LONGEST_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

impl Launch {
    /// `ranks` ranks, threads that share the machine's cores, at least one each, and wait a minute for each
    /// other.
    ///
    /// # Panics
    /// If `ranks` is 0.
    pub fn new(ranks: usize) -> Self {
        assert!(ranks > 0, "a launch needs at least one rank");
        Self {
            ranks,
            timeout: Duration::from_secs(60),
            threads_per_rank: None,
            engine: Engine::Threads,
        }
    }

    /// What the ranks are. Keep an engine of processes until a launch's outcome has been told of: dropped for the last time,
    /// it waits for the other processes, and ends the job where one is gone.
    #[must_use]
    pub fn on(mut self, engine: &Engine) -> Self {
        self.engine = engine.clone();
        self
    }

    /// How long a collective waits for the other ranks, and the launch for the last ones: at most [`LONGEST_TIMEOUT`].
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// The number of compute threads of each rank.
    #[must_use]
    pub fn threads_per_rank(mut self, threads: usize) -> Self {
        self.threads_per_rank = Some(threads.max(1));
        self
    }

    /// Runs `function` on every rank and returns, in rank order, what those return that this process holds
    /// ([`Engine::held`]): all of them, where ranks are threads. Where they are processes, every process of the
    /// job calls this, in the same order, also those that have no part in it.
    ///
    /// # Errors
    /// [`LaunchError`] with the first failure: a rank's own error, a panic, a collective that diverges or is
    /// not answered in time, or a rank that is stuck when the others have ended for longer than the time-out.
    /// Every process gets the same.
    pub fn run<T, E, F>(self, function: F) -> Result<Vec<T>, LaunchError>
    where
        T: Send + 'static,
        E: Into<BoxError>,
        F: Fn(Group) -> Result<T, E> + Send + Sync + 'static,
    {
        match self.engine.clone() {
            Engine::Threads => self.run_threads(function),
            #[cfg(feature = "mpi")]
            Engine::Mpi(mpi) => self.run_process(&mpi, function),
            #[cfg(feature = "nccl")]
            Engine::Nccl(nccl) => self.run_process(&nccl, function),
        }
    }

    /// Runs `function` on every rank, and returns on every process what all ranks return, in rank order.
    ///
    /// # Errors
    /// As for [`Launch::run`]; [`CommError::Engine`] if a value cannot be written or read back.
    pub fn run_shared<T, E, F>(self, function: F) -> Result<Vec<T>, LaunchError>
    where
        T: Serialize + DeserializeOwned + Send + Sync + 'static,
        E: Into<BoxError>,
        F: Fn(Group) -> Result<T, E> + Send + Sync + 'static,
    {
        match self.engine.clone() {
            Engine::Threads => self.run_threads(function),
            #[cfg(feature = "mpi")]
            Engine::Mpi(mpi) => {
                let timeout = self.timeout;
                let own = self.run_process(&mpi, function)?;
                // Everybody, so that those hear of it that had no part in the launch.
                let everybody = Self::new(mpi.size()).timeout(timeout);
                let all = everybody.run_process(&mpi, move |group| {
                    crate::share::share(&own, &Device::flex(), &group)
                })?;
                Ok(all.into_iter().flatten().flatten().collect())
            }
            #[cfg(feature = "nccl")]
            Engine::Nccl(nccl) => {
                let timeout = self.timeout;
                let own = self.run_process(&nccl, function)?;
                let all = nccl.share(&own, timeout).map_err(|root| LaunchError {
                    root,
                    source: None,
                    abandoned: vec![],
                })?;
                Ok(all.into_iter().flatten().collect())
            }
        }
    }

    fn run_threads<T, E, F>(self, function: F) -> Result<Vec<T>, LaunchError>
    where
        T: Send + 'static,
        E: Into<BoxError>,
        F: Fn(Group) -> Result<T, E> + Send + Sync + 'static,
    {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (self.threads_per_rank).unwrap_or((cores / self.ranks).max(1));
        let world = World::new(self.ranks);
        let function = Arc::new(function);
        let (sender, endings) = mpsc::channel();
        let mut started = 0;
        for rank in 0..self.ranks {
            let group = Group::new(world.transport(rank), self.timeout);
            let (rank_world, function, sender) = (world.clone(), function.clone(), sender.clone());
            let body = move || {
                let ending = run_rank(rank, threads, &*rank_world, || function(group));
                rank_world.end(rank);
                // The launch may have given this rank up.
                let _ = sender.send((rank, ending));
            };
            let spawned = std::thread::Builder::new()
                .name(format!("rank {rank}"))
                .spawn(body);
            if let Err(error) = spawned {
                world.fail(CommError::Spawn {
                    rank,
                    message: error.to_string(),
                });
                world.end(rank);
                break;
            }
            started += 1;
        }
        drop(sender);
        collect(started, self.timeout, &world, &endings)
    }

    /// This process's part of a launch on processes.
    #[cfg(any(feature = "mpi", feature = "nccl"))]
    fn run_process<T, E, F>(
        self,
        processes: &impl Processes,
        function: F,
    ) -> Result<Vec<T>, LaunchError>
    where
        T: Send + 'static,
        E: Into<BoxError>,
        F: Fn(Group) -> Result<T, E> + Send + Sync + 'static,
    {
        let failed = |root, source| LaunchError {
            root,
            source,
            abandoned: vec![],
        };
        let Place { rank, size, cores } = processes.place();
        if self.ranks > size {
            let (asked, started) = (self.ranks, size);
            return Err(failed(CommError::Processes { asked, started }, None));
        }
        let job = Arc::new(processes.open(self.ranks, self.timeout));
        let threads = self.threads_per_rank.unwrap_or(cores);
        let ending = processes.transport(&job).map(|transport| {
            let group = Group::new(transport, self.timeout);
            run_rank(rank, threads, &*job, || function(group))
        });
        let ended = processes.finish(&job);
        match (ending, ended) {
            (Some(Ok(value)), Ok(())) => Ok(vec![value]),
            (None, Ok(())) => Ok(vec![]),
            (Some(Err(source)), Err(root)) => Err(failed(root, source)),
            (_, Err(root)) => Err(failed(root, None)),
            (Some(Err(_)), Ok(())) => unreachable!("a rank that fails fails its launch"),
        }
    }
}

/// Runs `function` on `ranks` ranks with the defaults of [`Launch::new`].
///
/// ```
/// use dsp_core::{collective, launch};
/// use burn::tensor::{Device, Tensor};
///
/// let sums = launch(3, |group| {
///     let x = Tensor::<1>::from_floats([group.rank() as f32], &Device::flex());
///     collective::all_reduce(x, &group).map(|sum| sum.into_scalar::<f32>())
/// })?;
/// assert_eq!(sums, [3.0, 3.0, 3.0]);
/// # Ok::<(), dsp_core::LaunchError>(())
/// ```
///
/// # Errors
/// As for [`Launch::run`].
pub fn launch<T, E, F>(ranks: usize, function: F) -> Result<Vec<T>, LaunchError>
where
    T: Send + 'static,
    E: Into<BoxError>,
    F: Fn(Group) -> Result<T, E> + Send + Sync + 'static,
{
    Launch::new(ranks).run(function)
}

/// Runs one rank inside its own pool: two ranks that block in one pool would starve each other.
fn run_rank<T: Send, E: Into<BoxError>>(
    rank: usize,
    threads: usize,
    world: &impl Fails,
    body: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, Option<BoxError>> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(move |thread| match thread {
            0 => format!("rank {rank}"),
            _ => format!("rank {rank}, thread {thread}"),
        })
        .build();
    let pool = match pool {
        Ok(pool) => pool,
        Err(error) => {
            world.fail(CommError::Spawn {
                rank,
                message: error.to_string(),
            });
            return Err(None);
        }
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        pool.install(|| body().map_err(Into::into))
    }));
    let last = || world.last_call(rank);
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            let cause = CommError::Failed {
                rank,
                last: last(),
                message: chain(&*error),
            };
            let root = world.fail(cause.clone());
            // Only the rank that failed first has the source; the others' errors are its echoes.
            Err((root == cause).then_some(error))
        }
        // A collective that failed in a backward pass: the world has failed already.
        Err(payload) if payload.is::<CommError>() => {
            if let Ok(error) = payload.downcast::<CommError>() {
                world.fail(*error);
            }
            Err(None)
        }
        Err(payload) => {
            world.fail(CommError::Panicked {
                rank,
                last: last(),
                message: panic_message(&*payload),
            });
            Err(None)
        }
    }
}

/// Waits for the ranks that were started: the first so many.
fn collect<T>(
    ranks: usize,
    timeout: Duration,
    world: &World,
    endings: &mpsc::Receiver<(usize, Result<T, Option<BoxError>>)>,
) -> Result<Vec<T>, LaunchError> {
    let mut values: Vec<Option<T>> = (0..ranks).map(|_| None).collect();
    let mut running = vec![true; ranks];
    let mut source = None;
    let mut last_end: Option<Instant> = None;
    let mut failed = false;
    loop {
        // Nobody is hurried while all run; once one has ended, the others have a time-out's grace.
        let next = match last_end {
            None => endings.recv().ok(),
            Some(start) => endings
                .recv_timeout(timeout.saturating_sub(start.elapsed()))
                .ok(),
        };
        let Some((rank, ending)) = next else {
            break;
        };
        // Each ending begins a new grace, the first after a failure too. From then on the others only wake up and return.
        if !failed {
            last_end = Some(Instant::now());
        }
        failed = world.fate().is_some();
        running[rank] = false;
        match ending {
            Ok(value) => values[rank] = Some(value),
            Err(error) => source = source.or(error),
        }
    }
    let stuck: Vec<usize> = (0..ranks).filter(|&rank| running[rank]).collect();
    if let (Some(&rank), Some(start)) = (stuck.first(), last_end) {
        world.fail(CommError::Stuck {
            rank,
            last: world.last_call(rank),
            waited: start.elapsed(),
        });
    }
    world.check_all_answered();
    match world.fate() {
        Some(root) => Err(LaunchError {
            root,
            source,
            abandoned: stuck,
        }),
        None => Ok(values.into_iter().flatten().collect()),
    }
}

fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = error.source();
    }
    message
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    if let Some(message) = payload.downcast_ref::<&str>() {
        (*message).to_owned()
    } else if let Some(message) = payload.downcast_ref::<String>() {
        message.clone()
    } else {
        "a panic without a message".to_owned()
    }
}
