//! Ranks as processes with a GPU each, which exchange through NCCL, from device to device.
//!
//! ```text
//!  rank r                                                        rank p
//!  ┌──────────┐  a box   ┌──────┐   grouped send and receive   ┌──────┐  laid out, and   ┌──────────┐
//!  │    ▒▒▒   │ ───────▶ │▒▒▒   │ ───────────────────────────▶ │▒▒▒   │ ───────────────▶ │  ▒▒▒     │
//!  └──────────┘  copied  └──────┘   by pointer, no host copy   └──────┘ summed, by the   └──────────┘
//!                        without gaps                                   local transport's code
//! ```
//!
//! Every box of [`Blocks::transfers`](crate::blocks::Blocks::transfers) is a message of its own in one group of
//! sends and receives, of whatever size, so uneven and empty blocks are no special case; what arrives is summed
//! in rank order by the same code as among threads, and so gives the same bits.
//!
//! Before a box moves, the members have told the *hub* in rank 0's process what they call. It finds where they differ,
//! knows who waits for whom, and decides: the exchange is made, or the launch fails with one cause for all. It also says
//! in which order exchanges are made, so that one communicator of all processes serves all groups: messages are from
//! rank to rank, and a sub-group costs nothing and needs nobody but its members.
//!
//! | file | idea |
//! |---|---|
//! | `wire.rs` | what processes and hub tell each other |
//! | `hub.rs` | what the hub decides; no sockets, no clock |
//! | `meeting.rs` | how processes find it, and talk with it over ZeroMQ |
//! | `process.rs` | a process's launches, waits and failures; the thread that moves its boxes |
//! | `mover.rs` | what that thread needs of a GPU, as a trait |
//! | `communicator.rs`, `library.rs` | that, by NCCL; every wait is a poll with a deadline |
//! | `tensors.rs` | tensors as boxes: their addresses |
//!
//! # Cost
//! An exchange costs a message to the hub and one back, over TCP, beside what NCCL takes; entering it waits until the
//! device has made the boxes.
//!
//! # What was run
//! On one H100, which two and three ranks shared as if they were machines: the tests of collectives, of summed gradients and
//! of strategies, trainings, and ranks that are killed. Several GPUs have not been tried. Without any, it is tested that ranks
//! find each other, hub, failures, waits and the errors where library, driver or device are missing.
#![cfg_attr(
    not(feature = "nccl"),
    allow(dead_code, reason = "without tensors on CUDA, who would exchange them")
)]

mod communicator;
mod device;
mod hub;
mod library;
mod meeting;
mod mover;
mod process;
#[cfg(feature = "nccl")]
mod tensors;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use self::communicator::Gpu;
use self::library::Library;
#[cfg(feature = "nccl")]
pub(crate) use self::process::Job;
use self::process::Process;
use crate::error::CommError;
use crate::launch::LONGEST_TIMEOUT;
use crate::transport::job::Fails;
#[cfg(feature = "nccl")]
use crate::transport::job::{Place, Processes};

/// Why NCCL cannot be used, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum NcclError {
    /// No library.
    #[error(
        "NCCL's library was not found ({}); install NCCL (Debian: libnccl2; Python: nvidia-nccl-cu13) and have its \
         folder in LD_LIBRARY_PATH, or say where it is",
        reasons.join("; ")
    )]
    Library {
        /// What was tried, and why it failed.
        reasons: Vec<String>,
    },
    /// A library without one of the functions.
    #[error("{path} is not an NCCL that can be used, for it has no {name}: {message}")]
    Function {
        /// The function.
        name: &'static str,
        /// The library.
        path: String,
        /// What the system says.
        message: String,
    },
    /// A library that is too old.
    #[error(
        "{path} is NCCL {found}, and {needed} is needed (numbers as NCCL writes them: 22703 is 2.27.3)"
    )]
    TooOld {
        /// The library.
        path: String,
        /// Its version.
        found: i32,
        /// The oldest that will do.
        needed: i32,
    },
    /// No driver.
    #[error(
        "the CUDA driver (libcuda.so.1) was not found: this machine has no NVIDIA GPU, or not its driver"
    )]
    Driver,
    /// No such GPU.
    #[error("there is no CUDA device {device}: this machine has {devices}, counted from 0")]
    Device {
        /// The number that was asked for.
        device: usize,
        /// How many there are.
        devices: usize,
    },
    /// The CUDA driver failed.
    #[error("CUDA failed: {0}")]
    Cuda(#[from] cudarc::driver::DriverError),
    /// A call of NCCL's failed.
    #[error("{call} failed: {message}")]
    Call {
        /// Which.
        call: &'static str,
        /// What NCCL says.
        message: String,
    },
    /// Others did not do their part before the deadline.
    #[error("waited {} ms {what}, and the deadline passed: a rank is missing, or stuck", waited.as_millis())]
    Late {
        /// For what.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The launch failed meanwhile.
    #[error("the launch has failed meanwhile")]
    Aborted,
    /// A rank that is none.
    #[error("there is no rank {rank} among {size}")]
    Rank {
        /// The rank.
        rank: usize,
        /// How many there are.
        size: usize,
    },
    /// The place where the ranks meet cannot be used.
    #[error("the ranks meet at {address}, which cannot be used: {source}")]
    Address {
        /// The place.
        address: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The ranks did not all come, or do not fit together.
    #[error("the ranks did not find each other: {reason}")]
    Meeting {
        /// What is wrong.
        reason: String,
    },
    /// A thread could not be started.
    #[error("a thread for NCCL could not be started")]
    Thread(#[source] std::io::Error),
}

/// Which of a job's processes one is, and what it uses.
#[derive(Debug, Clone)]
pub struct NcclConfig {
    rank: usize,
    size: usize,
    address: String,
    device: usize,
    library: Option<PathBuf>,
    timeout: Duration,
}

impl NcclConfig {
    /// The process of `rank` among `size`, on the CUDA device of the same number. All meet at `address`
    /// (`host:port`), where rank 0 listens: an address of its machine, and a port that is free there.
    pub fn new(rank: usize, size: usize, address: impl Into<String>) -> Self {
        Self {
            rank,
            size,
            address: address.into(),
            device: rank,
            library: None,
            timeout: Duration::from_secs(60),
        }
    }

    /// The number of the CUDA device where the rank's tensors are. Each rank has a device of its own.
    #[must_use]
    pub fn with_device(mut self, device: usize) -> Self {
        self.device = device;
        self
    }

    /// Where NCCL's library is: the file, or its folder. Otherwise it is looked for as the system does.
    #[must_use]
    pub fn with_library(mut self, place: impl Into<PathBuf>) -> Self {
        self.library = Some(place.into());
        self
    }

    /// How long the ranks wait for each other to come, at most [`LONGEST_TIMEOUT`]; a minute, if nothing else is said.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// Loads NCCL, takes the device, and meets the other processes, which do the same.
    ///
    /// # Errors
    /// [`NcclError`] if library, driver or device are missing, or the others do not come in time.
    pub fn start(self) -> Result<Nccl, NcclError> {
        let Self {
            rank,
            size,
            address,
            device,
            ..
        } = self;
        if rank >= size {
            return Err(NcclError::Rank { rank, size });
        }
        let library = Library::load(self.library.as_deref())?;
        let context = device::context(device)?;
        let deadline = Instant::now() + self.timeout;
        let hub = match rank {
            0 => {
                let hub = meeting::serve(meeting::listen(&address)?, size, deadline);
                Some(hub.map_err(NcclError::Thread)?)
            }
            _ => None,
        };
        let line = meeting::connect(&address, (rank, size), deadline)?;
        let mover = move || Gpu::new(library, context, (rank, size));
        let process = Process::start((rank, size), line, hub, mover)?;
        Ok(Nccl {
            process: Arc::new(process),
            device,
        })
    }
}

/// This process among those of its job. Cloning shares it; the last clone that is dropped ends its part.
#[derive(Debug, Clone)]
pub struct Nccl {
    process: Arc<Process>,
    device: usize,
}

impl Nccl {
    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.process.rank()
    }

    /// The number of processes.
    pub fn size(&self) -> usize {
        self.process.size()
    }

    /// This process's share of the machine's cores, as if all processes were on it.
    pub fn cores(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (cores / self.size()).max(1)
    }

    /// The bytes of tensors that this process has handed to NCCL so far, for others.
    pub fn sent_bytes(&self) -> u64 {
        self.process.sent_bytes()
    }

    /// Where this rank's tensors are to be.
    #[cfg(feature = "nccl")]
    pub fn device(&self) -> burn::tensor::Device {
        burn::tensor::Device::cuda(self.device)
    }

    /// Every process's value, in rank order, on every process. All processes call this as they begin a launch.
    ///
    /// # Cost
    /// The values go to the hub as CBOR, and all of them from there to every process.
    ///
    /// # Errors
    /// The root cause, the same on every process, if one has failed; [`CommError::Engine`] if a value cannot be
    /// written or read back.
    pub(crate) fn share<T: Serialize + DeserializeOwned>(
        &self,
        value: &T,
        timeout: Duration,
    ) -> Result<Vec<T>, CommError> {
        let job = self.process.open(self.size(), timeout);
        let broken = |error: &dyn std::fmt::Display| CommError::Engine {
            rank: self.rank(),
            message: format!("a value for all ranks could not be written or read: {error}"),
        };
        let mut bytes = Vec::new();
        if let Err(error) = ciborium::into_writer(value, &mut bytes) {
            job.fail(broken(&error));
        }
        let all = job.finish(bytes)?;
        (all.iter())
            .map(|bytes| ciborium::from_reader(&bytes[..]).map_err(|error| broken(&error)))
            .collect()
    }
}

#[cfg(feature = "nccl")]
impl Processes for Nccl {
    type Job = Job;

    fn place(&self) -> Place {
        Place {
            rank: self.rank(),
            size: self.size(),
            cores: self.cores(),
        }
    }

    fn open(&self, ranks: usize, timeout: Duration) -> Job {
        self.process.open(ranks, timeout)
    }

    fn transport(&self, job: &Arc<Job>) -> Option<Arc<dyn super::Transport>> {
        tensors::transport(job, self.device)
    }

    fn finish(&self, job: &Job) -> Result<(), CommError> {
        job.finish(Vec::new()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Machines without a GPU have neither NCCL nor a driver, or not the device: one of them is missed first.
    #[test]
    fn without_library_driver_or_device_starting_is_an_error_that_says_which() {
        let config = NcclConfig::new(0, 1, "127.0.0.1:0").with_device(1000);
        let error = config.start().unwrap_err();
        assert!(
            matches!(
                error,
                NcclError::Library { .. } | NcclError::Driver | NcclError::Device { .. }
            ),
            "{error}"
        );
    }

    #[test]
    fn ranks_that_would_wait_for_ever_meet() {
        let config = NcclConfig::new(0, 1, "127.0.0.1:0").with_timeout(Duration::MAX);
        let deadline = Instant::now() + config.timeout;
        let mut door = meeting::listen(&config.address).unwrap();
        let address = door.address();
        let hub = meeting::serve(door, config.size, deadline).unwrap();
        drop(meeting::connect(&address, (config.rank, config.size), deadline).unwrap());
        hub.join().unwrap();
    }

    #[test]
    fn a_rank_beyond_the_job_is_refused() {
        let error = NcclConfig::new(2, 2, "127.0.0.1:0").start().unwrap_err();
        assert!(error.to_string().contains("no rank 2 among 2"), "{error}");
    }
}
