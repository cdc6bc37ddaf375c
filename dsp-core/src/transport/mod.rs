//! What moves tensors between ranks: one primitive, [`Transport::start`], and [`Pending::wait`].
//!
//! An [`Exchange`] says who holds what of a global tensor before and after; everything that a transport must
//! do follows from it ([`Blocks::transfers`]). The [`local`] transport hands tensors over by handle and copies
//! once, straight from the peers' memory; engines that send messages pack the same boxes, as `mpi` and `nccl` do (with
//! those features). A blocking collective is `start` and `wait`; overlapping one is doing something in between.

mod copy;
pub(crate) mod job;
pub mod local;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl-engine")]
pub mod nccl;
mod position;
#[cfg(feature = "flex")]
mod tiles;
mod waits;

use std::fmt;
#[cfg(any(feature = "mpi", feature = "nccl"))]
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Tensor;

use self::position::Position;

use crate::blocks::{Blocks, DIMS};
use crate::error::{Call, CommError, Tracking};
use crate::ledger::Collective;

/// One rank's part in a collective.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// Which collective, for errors and the ledger.
    pub collective: Collective,
    /// Whether a backward pass will answer it; all ranks must agree.
    pub tracking: Tracking,
    /// In a backward pass: the sequence number of the forward exchange that it answers; all ranks must agree.
    pub answers: Option<u64>,
    /// This rank's block, outside of any autodiff graph.
    pub tensor: Tensor<DIMS>,
    /// Who holds what now.
    pub before: Arc<Blocks>,
    /// Who holds what afterwards. What several ranks contribute to is summed in rank order.
    pub after: Arc<Blocks>,
}

impl Exchange {
    /// What is called here, as errors and other ranks hear of it.
    fn call(&self, sequence: u64) -> Call {
        Call {
            collective: self.collective,
            sequence,
            dtype: self.tensor.dtype(),
            shape: self.before.shape(),
            tracking: self.tracking,
            answers: self.answers,
        }
    }

    /// The error of a rank whose block has another shape than it says.
    fn check_shape(&self, position: &Position, call: &Call) -> Result<(), CommError> {
        let expected = self.before.local_shape(position.rank);
        let got = self.tensor.dims();
        if expected == got {
            return Ok(());
        }
        Err(CommError::Shape {
            rank: position.world_rank(),
            call: call.clone(),
            expected,
            got,
        })
    }
}

/// A number that stands for a value between the processes of one program.
#[cfg(any(feature = "mpi", feature = "nccl"))]
fn digest(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What an exchange brought.
#[derive(Debug)]
pub struct Arrival {
    /// This rank's block of `after`.
    pub tensor: Tensor<DIMS>,
    /// How long the other ranks were waited for.
    pub waited: Duration,
    /// How long moving the data took, once the rank waited for it.
    pub moved: Duration,
    /// How long the engine moved it before that, while the rank did something else.
    pub hidden: Duration,
}

/// When what happened to an exchange that an engine makes on a thread of its own.
#[cfg(any(feature = "mpi", feature = "nccl-engine"))]
#[cfg_attr(
    not(any(feature = "mpi", feature = "nccl")),
    allow(dead_code, reason = "without tensors on CUDA, nobody waits for boxes")
)]
#[derive(Debug, Clone, Copy)]
struct Times {
    /// When the engine had laid this rank's own part where it belongs, if it did so: until then nobody was waited for.
    laid: Option<Instant>,
    /// When all that send had entered.
    entered: Instant,
    /// When all had arrived.
    arrived: Instant,
}

#[cfg(any(feature = "mpi", feature = "nccl"))]
impl Times {
    /// How long a rank that came at `start` waited for the others.
    fn waited(&self, start: Instant) -> Duration {
        let since = self.laid.map_or(start, |laid| laid.max(start));
        self.entered.saturating_duration_since(since)
    }

    /// How long data were moved before it came.
    fn hidden(&self, start: Instant) -> Duration {
        (self.arrived.min(start)).saturating_duration_since(self.entered)
    }
}

/// An exchange under way.
pub trait Pending: Send {
    /// Whether [`wait`](Self::wait) would return at once, or fail. By default it is not known: never.
    fn is_ready(&self) -> bool {
        false
    }

    /// Waits for what the other ranks send.
    ///
    /// # Errors
    /// [`CommError`], the same root cause on every rank, if a rank fails, calls something else, or does not
    /// answer before `deadline`.
    fn wait(self: Box<Self>, deadline: Instant) -> Result<Arrival, CommError>;
}

/// One rank's end of an engine that moves tensors within a group.
pub trait Transport: fmt::Debug + Send + Sync {
    /// This rank within the group.
    fn rank(&self) -> usize;

    /// The number of ranks in the group.
    fn size(&self) -> usize;

    /// The sequence number that the next exchange of this group will have.
    fn next_sequence(&self) -> u64;

    /// Enters an exchange; returns at once.
    ///
    /// # Errors
    /// [`CommError::Mismatch`] if another rank is known to have called something else, or the root cause if
    /// the group has failed already.
    fn start(&self, exchange: Exchange) -> Result<Box<dyn Pending>, CommError>;

    /// The end of a sub-group. All its members call this in the same order, with the same `members`: ranks
    /// of this group, in the order of their ranks in the new one.
    ///
    /// # Errors
    /// [`CommError::Members`] if this rank is not a member, or the list is not one of distinct ranks.
    fn subgroup(&self, members: &[usize]) -> Result<Arc<dyn Transport>, CommError>;

    /// Fails the group, its parents and its sub-groups: every rank's next or present call returns the first
    /// `cause` that was given.
    fn abort(&self, cause: CommError);
}
