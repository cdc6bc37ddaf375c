//! What can go wrong, with the values that a person needs to mend it.

use std::borrow::Cow;
use std::ops::Range;
use std::time::Duration;

use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::blocks::DIMS;
use crate::layout::{LayoutError, SeqAxis};
use crate::ledger::{Collective, Phase};
use crate::partition::PartitionError;
use crate::session::StageError;
use crate::strategy::PlanError;

/// One call of a collective, as every rank of the group must make it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Which collective.
    pub collective: Collective,
    /// The how-manieth exchange of its group this is, from 0.
    pub sequence: u64,
    /// The element type.
    pub dtype: DType,
    /// The global shape of what is exchanged.
    pub shape: [usize; DIMS],
    /// Whether a backward pass will answer it.
    pub tracking: Tracking,
    /// In a backward pass: the sequence number of the forward exchange that it answers.
    pub answers: Option<u64>,
}

/// Whether a tensor takes part in automatic differentiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tracking {
    /// A gradient will flow through it.
    Tracked,
    /// None will.
    Untracked,
}

impl Tracking {
    /// That of what is computed from these tensors.
    pub fn of<'a, const D: usize>(inputs: impl IntoIterator<Item = &'a Tensor<D>>) -> Self {
        match inputs.into_iter().any(Tensor::is_tracked) {
            true => Self::Tracked,
            false => Self::Untracked,
        }
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            collective,
            sequence,
            dtype,
            shape,
            tracking,
            answers,
        } = self;
        write!(f, "{collective} #{sequence} of {shape:?} {dtype:?}")?;
        match (answers, tracking) {
            (Some(forward), _) => write!(f, " (the backward of #{forward})"),
            (None, Tracking::Tracked) => write!(f, " (tracked)"),
            (None, Tracking::Untracked) => write!(f, " (untracked)"),
        }
    }
}

fn after(last: &Option<Call>) -> String {
    match last {
        Some(call) => format!("after {call}"),
        None => "before any collective".to_owned(),
    }
}

/// Where two ranks' partitions of a tensor differ: the part of one rank along one dim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Whether it is held so before or after the call.
    pub side: Side,
    /// The dim.
    pub dim: usize,
    /// Whose part, numbered within the group.
    pub holder: usize,
    /// What it holds to the rank that noticed.
    pub own: Vec<Range<usize>>,
    /// What it holds to the other one.
    pub other: Vec<Range<usize>>,
}

/// A side of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// What ranks held.
    Before,
    /// What they get.
    After,
}

impl Difference {
    fn between(&self, rank: usize, other: usize) -> String {
        let side = match self.side {
            Side::Before => "before",
            Side::After => "after",
        };
        format!(
            ": {side} it, the part of the group's rank {} in dim {} is {:?} to rank {rank} and {:?} to rank {other}",
            self.holder, self.dim, self.own, self.other
        )
    }
}

/// A group of ranks that cannot go on. Every rank of the group returns the same one: the root cause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CommError {
    /// Two ranks of a group called different collectives at the same point.
    #[error(
        "the ranks diverged: rank {rank} called {call} where rank {other} called {other_call}; \
         all ranks of a group must call the same collectives in the same order"
    )]
    Mismatch {
        /// The rank that noticed.
        rank: usize,
        /// What it called.
        call: Call,
        /// The rank that called something else.
        other: usize,
        /// What that was.
        other_call: Call,
    },
    /// Two ranks agree on the call, but not on which rank holds what.
    #[error(
        "the ranks diverged: rank {rank} and rank {other} both called {call}, but with different partitions{}",
        difference.as_ref().map_or_else(String::new, |found| found.between(*rank, *other))
    )]
    Partitions {
        /// The rank that noticed.
        rank: usize,
        /// What both called.
        call: Call,
        /// The rank whose partition is another.
        other: usize,
        /// Where they differ first; unknown where ranks are processes, which compare digests.
        difference: Option<Box<Difference>>,
    },
    /// A rank's block has another shape than the call says.
    #[error(
        "rank {rank} passed a block of shape {got:?} to {call}, where its part is {expected:?}"
    )]
    Shape {
        /// The rank.
        rank: usize,
        /// The call.
        call: Call,
        /// The shape of the rank's part.
        expected: [usize; DIMS],
        /// The shape that it passed.
        got: [usize; DIMS],
    },
    /// Blocks, or a partition, of another number of ranks than the group has.
    #[error(
        "rank {rank} called {collective} on blocks of {ranks} rank(s) in a group of {size}: every rank of the group, \
         and no other, holds a block"
    )]
    Ranks {
        /// The rank.
        rank: usize,
        /// What it called.
        collective: Collective,
        /// Over how many ranks its blocks are.
        ranks: usize,
        /// How many the group has.
        size: usize,
    },
    /// A collective that not every rank called before the deadline.
    #[error(
        "rank {rank} waited {} ms in {call}, and rank(s) {missing:?} did not call it before the deadline",
        waited.as_millis()
    )]
    Unanswered {
        /// The rank that waited.
        rank: usize,
        /// The call.
        call: Call,
        /// Who did not answer.
        missing: Vec<usize>,
        /// How long it waited.
        waited: Duration,
    },
    /// A rank that ended although others still need it.
    #[error("rank {rank} called {call}, but rank {ended} had already returned")]
    PeerEnded {
        /// The rank that waits.
        rank: usize,
        /// The call.
        call: Call,
        /// Who returned too early.
        ended: usize,
    },
    /// A rank that panicked.
    #[error("rank {rank} panicked {}: {message}", after(last))]
    Panicked {
        /// The rank.
        rank: usize,
        /// The last collective that it called.
        last: Option<Call>,
        /// The panic's message.
        message: String,
    },
    /// A rank whose own code returned an error.
    #[error("rank {rank} failed {}: {message}", after(last))]
    Failed {
        /// The rank.
        rank: usize,
        /// The last collective that it called.
        last: Option<Call>,
        /// The error and its causes.
        message: String,
    },
    /// A rank that neither ends nor calls a collective. Its thread is abandoned.
    #[error(
        "rank {rank} is stuck {}: the other ranks ended {} ms ago; its thread is abandoned",
        after(last), waited.as_millis()
    )]
    Stuck {
        /// The rank.
        rank: usize,
        /// The last collective that it called.
        last: Option<Call>,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A sub-group that does not contain its caller, repeats a rank, or names one that does not exist.
    #[error("rank {rank} of {size} asked for a sub-group of {members:?}: {rule}")]
    Members {
        /// The rank that asked.
        rank: usize,
        /// The size of the group.
        size: usize,
        /// Who was to be in it.
        members: Vec<usize>,
        /// What is wrong with them.
        rule: Cow<'static, str>,
    },
    /// The machine would not start a thread.
    #[error("the thread of rank {rank} could not be started: {message}")]
    Spawn {
        /// The rank.
        rank: usize,
        /// What the operating system says.
        message: String,
    },
    /// A number that is none, where a session watches for them.
    #[error(
        "rank {rank} has a NaN or an infinity in stage {stage:?}, where it is to {verb}, in its {}",
        match pass {
            Phase::Backward => "gradient",
            _ => "activation",
        }
    )]
    NotFinite {
        /// The first rank that has one.
        rank: usize,
        /// The stage's name.
        stage: String,
        /// The verb that was to take it.
        verb: Cow<'static, str>,
        /// On the way forward or back.
        pass: Phase,
    },
    /// A launch of more ranks than processes were started for it.
    #[error(
        "a launch of {asked} ranks on {started} processes: a process is a rank here, so start {asked} of them"
    )]
    Processes {
        /// The ranks that were asked for.
        asked: usize,
        /// The processes that there are.
        started: usize,
    },
    /// The engine beneath failed.
    #[error("the engine failed on rank {rank}: {message}")]
    Engine {
        /// The rank.
        rank: usize,
        /// What the engine says.
        message: String,
    },
}

impl CommError {
    /// The ranks that let a deadline pass, if that is what failed.
    #[cfg(feature = "mpi")]
    pub(crate) fn late(&self) -> &[usize] {
        match self {
            Self::Unanswered { missing, .. } => missing,
            Self::Stuck { rank, .. } => std::slice::from_ref(rank),
            _ => &[],
        }
    }
}

/// Any error of this crate, as a model's forward pass returns it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The ranks cannot go on.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A tensor is not laid out as it must be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A strategy cannot run this model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A model does not walk through the stages that it declared.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// A partition does not cover its length.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// A tensor whose shape does not fit.
    #[error("{what} has shape {got:?}, where {rule}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What was expected.
        rule: String,
    },
    /// An attention over an axis of which this rank holds only a part.
    #[error(
        "attention over {axis} runs on one rank's keys alone, but {axis} is split: \
         the strategy must bring it together first"
    )]
    AttendsSplitAxis {
        /// The axis.
        axis: SeqAxis,
    },
    /// Dropout of an attention without probabilities.
    #[error(
        "dropout with probability {probability} of a linear attention: it has a state and no probabilities that \
         could be dropped; attend without it, or drop elements of its output"
    )]
    LinearDropout {
        /// The probability that was asked for.
        probability: f64,
    },
}
