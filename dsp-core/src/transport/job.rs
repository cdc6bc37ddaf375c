//! What a launch asks of its engine: where a failure is made known, and of processes, how they begin and end together.

#[cfg(any(feature = "mpi", feature = "nccl"))]
use std::{sync::Arc, time::Duration};

#[cfg(any(feature = "mpi", feature = "nccl"))]
use super::Transport;
use crate::error::{Call, CommError};

/// A launch, in which a rank's failure is made known.
pub(crate) trait Fails: Sync {
    /// Fails the launch, unless it has failed before; returns the root cause.
    fn fail(&self, cause: CommError) -> CommError;

    /// The last collective that `rank` called, one that is held here.
    fn last_call(&self, rank: usize) -> Option<Call>;
}

/// Processes, of which each holds one rank.
#[cfg(any(feature = "mpi", feature = "nccl"))]
pub(crate) trait Processes {
    /// A launch on the first of them, as this one sees it.
    type Job: Fails;

    /// Which of them this is.
    fn place(&self) -> Place;

    /// Begins a launch on the first `ranks`. All processes begin the same ones in the same order.
    fn open(&self, ranks: usize, timeout: Duration) -> Self::Job;

    /// This process's end of the group of all ranks; none if it has no part in the launch.
    fn transport(&self, job: &Arc<Self::Job>) -> Option<Arc<dyn Transport>>;

    /// Says that this process's rank has returned, and waits for the others.
    ///
    /// # Errors
    /// The root cause, the same on every process, if the launch has failed.
    fn finish(&self, job: &Self::Job) -> Result<(), CommError>;
}

/// A process among others.
#[cfg(any(feature = "mpi", feature = "nccl"))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Its number, from 0, of how many.
    pub(crate) rank: usize,
    pub(crate) size: usize,
    /// Its share of its machine's cores.
    pub(crate) cores: usize,
}
