//! Ranks as MPI processes: one process is one rank, and what moves between them goes over MPI.
//!
//! [`Mpi::start`] initialises MPI on a thread of its own, the only one that calls it (`MPI_THREAD_FUNNELED` is
//! enough), so that messages make progress while the rank computes. Launches then follow each other on the
//! same processes, each with a world of its own: [`Launch::on`](crate::Launch::on).
//!
//! | file | idea |
//! |---|---|
//! | `wire.rs` | what processes tell each other, and which bytes are a message |
//! | `parcel.rs` | packing a rank's part of an exchange, unpacking what arrived |
//! | `boxes.rs` | boxes of a tensor, laid end to end or where they belong |
//! | `progress.rs` | the communication thread: exchanges, deadlines, how a launch fails and ends |
//! | `lent.rs` | memory that MPI uses while a message is under way |
//!
//! What fails, fails as among threads: the same [`CommError`]s, one root cause on every process. Beyond them a
//! process may be killed or never return. The others' deadlines find it, and a process whose rank goes on
//! after its launch has failed ends the job with `MPI_Abort`.

mod boxes;
mod lent;
mod parcel;
mod progress;
mod wire;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferrompi::ThreadLevel;

use self::lent::Outgoing;
use self::parcel::{Parcels, Unpacking};
use self::progress::{Command, Entry, Key, Progress};
use super::job::{Fails, Place, Processes};
use super::position::{GroupId, Position};
use super::{Arrival, Exchange, Pending, Transport, digest};
use crate::error::{Call, CommError};

/// After how long without a sign of life the communication thread counts as dead: it never blocks by itself.
const LIFELESS: Duration = Duration::from_secs(20);

/// Why MPI cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MpiError {
    /// It could not be initialised.
    #[error("MPI could not be initialised: {0}")]
    Init(String),
    /// Its thread could not be started.
    #[error("the thread for MPI could not be started")]
    Thread(#[source] std::io::Error),
}

/// This process among those that MPI started. Cloning shares it; the last clone that is dropped ends it.
///
/// A process that was not started by `mpirun` or the like is alone.
#[derive(Debug, Clone)]
pub struct Mpi {
    process: Arc<Process>,
}

#[derive(Debug)]
struct Process {
    place: Place,
    /// The cores that all processes have together.
    all_cores: usize,
    commands: Sender<Command>,
    pulse: Arc<AtomicU64>,
    launches: AtomicU64,
    /// Bytes of tensors that were handed to MPI.
    sent: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Mpi {
    /// Initialises MPI; once in a process.
    ///
    /// # Errors
    /// [`MpiError`] if that fails, as it does for the second time.
    pub fn start() -> Result<Self, MpiError> {
        let (commands, received) = mpsc::channel();
        let (started, starts) = mpsc::channel();
        let pulse = Arc::new(AtomicU64::new(0));
        let own_pulse = pulse.clone();
        let thread = std::thread::Builder::new()
            .name("MPI".to_owned())
            .spawn(move || communicate(&started, received, own_pulse))
            .map_err(MpiError::Thread)?;
        let (place, all_cores) = match starts.recv() {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return Err(MpiError::Init(error.to_string())),
            Err(_) => return Err(MpiError::Init("its thread ended".to_owned())),
        };
        Ok(Self {
            process: Arc::new(Process {
                place,
                all_cores,
                commands,
                pulse,
                launches: AtomicU64::new(0),
                sent: AtomicU64::new(0),
                thread: Mutex::new(Some(thread)),
            }),
        })
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.process.place.rank
    }

    /// The number of processes.
    pub fn size(&self) -> usize {
        self.process.place.size
    }

    /// This process's share of its machine's cores: those that it is bound to, or its part of those that it
    /// shares with the others there.
    pub fn cores(&self) -> usize {
        self.process.place.cores
    }

    /// The cores that all processes have together, those that some share counted once.
    pub fn all_cores(&self) -> usize {
        self.process.all_cores
    }

    /// The bytes of tensors that this process has handed to MPI so far, for others: control messages not counted.
    pub fn sent_bytes(&self) -> u64 {
        self.process.sent.load(Ordering::Relaxed)
    }
}

/// The communication thread, from beginning to end.
fn communicate(
    started: &Sender<ferrompi::Result<(Place, usize)>>,
    commands: Receiver<Command>,
    pulse: Arc<AtomicU64>,
) {
    let ready = ferrompi::Mpi::init_thread(ThreadLevel::Funneled).and_then(|mpi| {
        let world = mpi.world().duplicate()?;
        let share = share_of_cores(&world)?;
        let mut shares = vec![0.0; world.size() as usize];
        world.allgather(&[share], &mut shares)?;
        let place = Place {
            rank: world.rank() as usize,
            size: world.size() as usize,
            cores: (share as usize).max(1),
        };
        let all_cores = (shares.iter().sum::<f64>().round() as usize).max(1);
        Ok((mpi, world, lent::datatype_of_room()?, (place, all_cores)))
    });
    let (mpi, world, room, found) = match ready {
        Ok(ready) => ready,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(Ok(found));
    // No request is left when the thread's work ends, so nothing can go wrong here.
    let _ = ferrompi::scope(|scope| {
        Progress::new(&world, scope, &room, commands, pulse).run();
        Ok(())
    });
    drop(room);
    drop(world);
    drop(mpi);
}

/// How many cores this process has for itself, on average: those of a machine that may run on the same ones share them.
fn share_of_cores(world: &ferrompi::Communicator) -> ferrompi::Result<f64> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let allowed = status
        .lines()
        .find(|line| line.starts_with("Cpus_allowed:"));
    let machine = world.split_shared()?;
    let mut all = vec![0; machine.size() as usize];
    let own = digest(&allowed);
    machine.allgather(&[own], &mut all)?;
    let sharing = all.iter().filter(|&&other| other == own).count();
    Ok(cores as f64 / sharing as f64)
}

impl Process {
    fn command(&self, command: Command) {
        // The thread lives as long as this value; if not, the answer that is then missing says so.
        let _ = self.commands.send(command);
    }

    /// The communication thread's answer.
    #[allow(clippy::print_stderr, reason = "nobody is left to return this to")]
    fn answer<T>(&self, answer: &Receiver<T>) -> T {
        let mut seen = (self.pulse.load(Ordering::Relaxed), Instant::now());
        loop {
            match answer.recv_timeout(Duration::from_secs(1)) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    eprintln!("rank {}: the communication thread is gone", self.place.rank);
                    std::process::abort();
                }
            }
            let pulse = self.pulse.load(Ordering::Relaxed);
            if pulse != seen.0 {
                seen = (pulse, Instant::now());
            } else if seen.1.elapsed() > LIFELESS {
                let rank = self.place.rank;
                eprintln!("rank {rank}: MPI has not returned for {LIFELESS:?}");
                std::process::abort();
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.command(Command::Stop);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            // It ends when all processes do, or ends the job if they do not.
            let _ = thread.join();
        }
    }
}

/// A launch on MPI processes, as one of them sees it.
#[derive(Debug)]
pub(crate) struct Job {
    process: Arc<Process>,
    launch: u64,
    ranks: usize,
    fate: Arc<OnceLock<CommError>>,
    last: Mutex<Option<Call>>,
}

impl Fails for Job {
    fn fail(&self, cause: CommError) -> CommError {
        if let Some(fate) = self.fate.get() {
            return fate.clone();
        }
        let (answer, answers) = mpsc::channel();
        self.process.command(Command::Fail {
            launch: self.launch,
            cause,
            answer,
        });
        self.process.answer(&answers)
    }

    fn last_call(&self, _: usize) -> Option<Call> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone()
    }
}

impl Processes for Mpi {
    type Job = Job;

    fn place(&self) -> Place {
        self.process.place
    }

    fn open(&self, ranks: usize, timeout: Duration) -> Job {
        let launch = self.process.launches.fetch_add(1, Ordering::Relaxed);
        let fate = Arc::new(OnceLock::new());
        self.process.command(Command::Open {
            launch,
            ranks,
            timeout,
            fate: fate.clone(),
        });
        Job {
            process: self.process.clone(),
            launch,
            ranks,
            fate,
            last: Mutex::new(None),
        }
    }

    fn transport(&self, job: &Arc<Job>) -> Option<Arc<dyn Transport>> {
        let rank = self.rank();
        (rank < job.ranks).then(|| {
            let position = Position::new(GroupId::world(job.ranks), rank);
            Arc::new(MpiTransport::new(job.clone(), position)) as Arc<dyn Transport>
        })
    }

    fn finish(&self, job: &Job) -> Result<(), CommError> {
        let (answer, answers) = mpsc::channel();
        job.process.command(Command::Finish {
            launch: job.launch,
            answer,
        });
        job.process.answer(&answers)
    }
}

#[derive(Debug)]
struct MpiTransport {
    job: Arc<Job>,
    position: Position,
    /// The group, as it is called between processes.
    group: u64,
    sequence: AtomicU64,
}

impl MpiTransport {
    fn new(job: Arc<Job>, position: Position) -> Self {
        Self {
            job,
            group: digest(&position.id),
            position,
            sequence: AtomicU64::new(0),
        }
    }
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.position.rank
    }

    fn size(&self) -> usize {
        self.position.size()
    }

    fn next_sequence(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    fn start(&self, exchange: Exchange) -> Result<Box<dyn Pending>, CommError> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let (rank, job) = (self.position.rank, &self.job);
        let call = exchange.call(sequence);
        *job.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(call.clone());
        if let Some(fate) = job.fate.get() {
            return Err(fate.clone());
        }
        (exchange.check_shape(&self.position, &call)).map_err(|error| job.fail(error))?;
        let (_span, begun) = (
            tracing::info_span!("packing", call = %call).entered(),
            Instant::now(),
        );
        let Parcels {
            outgoing,
            incoming,
            laying,
            unpacking,
        } = Parcels::pack(&exchange, rank);
        let bytes: usize = outgoing.iter().flatten().map(Outgoing::len).sum();
        job.process.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        let arrived = Arc::new(AtomicBool::new(false));
        // A rank with a core of its own lays its part beside the communication thread. Where both have one core, the
        // thread does it: two that want to run make each other, and other ranks, wait for the system to change.
        let (by_thread, by_rank) = match job.process.place.cores {
            1 => (laying, None),
            _ => (None, laying),
        };
        job.process.command(Command::Enter(Box::new(Entry {
            launch: job.launch,
            group: self.group,
            members: self.position.id.members.clone(),
            rank,
            call: call.clone(),
            digest: digest(&(&exchange.before, &exchange.after)),
            outgoing,
            incoming,
            laying: by_thread,
            arrived: arrived.clone(),
        })));
        if let Some(laying) = by_rank {
            laying.lay();
        }
        Ok(Box::new(MpiPending {
            packing: begun.elapsed(),
            job: job.clone(),
            arrived,
            key: (self.group, sequence),
            call,
            unpacking,
        }))
    }

    fn subgroup(&self, members: &[usize]) -> Result<Arc<dyn Transport>, CommError> {
        let position = self.position.subgroup(members)?;
        Ok(Arc::new(Self::new(self.job.clone(), position)))
    }

    fn abort(&self, cause: CommError) {
        self.job.fail(cause);
    }
}

struct MpiPending {
    /// How long the rank moved data when it entered.
    packing: Duration,
    job: Arc<Job>,
    /// A hint: what arrived is taken from the communication thread's answer.
    arrived: Arc<AtomicBool>,
    key: Key,
    call: Call,
    unpacking: Unpacking,
}

impl Pending for MpiPending {
    fn is_ready(&self) -> bool {
        self.arrived.load(Ordering::Relaxed) || self.job.fate.get().is_some()
    }

    fn wait(self: Box<Self>, deadline: Instant) -> Result<Arrival, CommError> {
        let start = Instant::now();
        let times = {
            let _span = tracing::info_span!("waiting", call = %self.call).entered();
            let (answer, answers) = mpsc::channel();
            self.job.process.command(Command::Wait {
                launch: self.job.launch,
                key: self.key,
                deadline,
                answer,
            });
            self.job.process.answer(&answers)?
        };
        let (waited, hidden) = (times.waited(start), times.hidden(start));
        let _span = tracing::info_span!("communication", call = %self.call, ?hidden).entered();
        let tensor = self.unpacking.unpack();
        Ok(Arrival {
            tensor,
            waited,
            moved: self.packing + start.elapsed().saturating_sub(waited),
            hidden,
        })
    }
}
