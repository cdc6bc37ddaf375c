//! [`Group`]: the ranks that work on one thing together, and this rank among them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Tensor;

use crate::blocks::{Blocks, DIMS};
use crate::error::{CommError, Tracking};
use crate::launch::LONGEST_TIMEOUT;
use crate::layout::MeshAxis;
use crate::ledger::{Collective, Entry, Ledger, Phase};
use crate::transport::local::World;
use crate::transport::{Exchange, Pending, Transport};

/// This rank's membership of a group of ranks. Cloning shares it.
///
/// Sub-groups keep their parent's ledger and time-out, so that a rank's account is one, however its ranks are
/// meshed.
#[derive(Debug, Clone)]
pub struct Group {
    transport: Arc<dyn Transport>,
    ledger: Arc<Ledger>,
    timeout: Duration,
}

impl Group {
    /// A group over any transport; every wait ends after `timeout`, or [`LONGEST_TIMEOUT`] if that is shorter.
    pub fn new(transport: Arc<dyn Transport>, timeout: Duration) -> Self {
        Self {
            transport,
            ledger: Arc::new(Ledger::default()),
            timeout: timeout.min(LONGEST_TIMEOUT),
        }
    }

    /// A group of this thread alone: the serial case, which sends nothing.
    pub fn alone() -> Self {
        Self::new(World::new(1).transport(0), Duration::from_secs(60))
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.transport.rank()
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.transport.size()
    }

    /// What this rank sent.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// How long a collective waits for the other ranks.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// A group of some of this group's ranks, in the given order. All members must ask for it alike.
    ///
    /// # Errors
    /// [`CommError::Members`] if this rank is not among `members`, or they are not distinct ranks.
    pub fn subgroup(&self, members: &[usize]) -> Result<Self, CommError> {
        Ok(Self {
            transport: self.transport.subgroup(members)?,
            ledger: self.ledger.clone(),
            timeout: self.timeout,
        })
    }

    /// The ranks that stand on the mesh axis `axis` together with this one.
    ///
    /// # Errors
    /// [`CommError::Members`] as for [`Group::subgroup`], or if the axis has no rank or its ranks do not stand apart.
    pub fn along(&self, axis: MeshAxis) -> Result<Self, CommError> {
        if axis.size == 0 || axis.stride == 0 {
            return Err(CommError::Members {
                rank: self.rank(),
                size: self.size(),
                members: vec![],
                rule: format!(
                    "a mesh axis of {} rank(s) that stand {} apart has no members; both must be at least 1",
                    axis.size, axis.stride
                )
                .into(),
            });
        }
        self.subgroup(&axis.members(self.rank()))
    }

    /// Ends every rank of the group, its parents and sub-groups with `cause`, unless they have failed before.
    pub fn abort(&self, cause: CommError) {
        self.transport.abort(cause);
    }

    /// The same group with a transport around its own, to watch what it does or to disturb it.
    #[must_use]
    pub fn through(self, wrap: impl FnOnce(Arc<dyn Transport>) -> Arc<dyn Transport>) -> Self {
        Self {
            transport: wrap(self.transport),
            ..self
        }
    }

    /// The sequence number that this group's next exchange will have.
    pub fn next_sequence(&self) -> u64 {
        self.transport.next_sequence()
    }

    /// Fails the group if blocks are those of another number of ranks than it has: some would go to nobody.
    ///
    /// # Errors
    /// [`CommError::Ranks`]
    pub(crate) fn check_ranks(
        &self,
        collective: Collective,
        of_blocks: [usize; 2],
    ) -> Result<(), CommError> {
        let size = self.size();
        let Some(&ranks) = of_blocks.iter().find(|&&ranks| ranks != size) else {
            return Ok(());
        };
        let cause = CommError::Ranks {
            rank: self.rank(),
            collective,
            ranks,
            size,
        };
        self.abort(cause.clone());
        Err(cause)
    }

    /// Starts an exchange of untracked tensors; [`InFlight::wait`] ends it.
    ///
    /// `before` says who holds what of the global tensor now and `after` who shall hold what; terms from
    /// several ranks are summed in rank order. All ranks must pass the same.
    ///
    /// # Errors
    /// [`CommError::Ranks`] if they speak of another number of ranks than the group has, else [`CommError`] as
    /// [`Transport::start`] says.
    pub fn start(&self, request: Request) -> Result<InFlight, CommError> {
        let Request {
            collective,
            phase,
            tracking,
            tensor,
            before,
            after,
            step,
            answers,
        } = request;
        self.check_ranks(collective, [before.ranks(), after.ranks()])?;
        let rank = self.rank();
        let sent = (0..self.size())
            .filter(|&peer| peer != rank)
            .map(|peer| before.elements(&after, rank, peer) as u64);
        let mut entry = Entry {
            calls: u64::from(step == Step::First),
            ..Entry::default()
        };
        for elements in sent {
            entry.messages += u64::from(elements > 0);
            entry.elements += elements;
        }
        entry.bytes = entry.elements * tensor.dtype().size() as u64;
        let pending = self.transport.start(Exchange {
            collective,
            tracking,
            answers,
            tensor,
            before,
            after,
        })?;
        Ok(InFlight {
            pending,
            ledger: self.ledger.clone(),
            key: (phase, collective),
            entry,
            timeout: self.timeout,
        })
    }

    /// Starts an exchange and waits for it.
    ///
    /// # Errors
    /// [`CommError`] if the group fails.
    pub fn exchange(&self, request: Request) -> Result<Tensor<DIMS>, CommError> {
        self.start(request)?.wait()
    }
}

/// What a rank asks of its group: see [`Group::start`].
#[derive(Debug, Clone)]
pub struct Request {
    /// Which collective it is.
    pub collective: Collective,
    /// In which part of the step.
    pub phase: Phase,
    /// Whether a backward pass will answer it.
    pub tracking: Tracking,
    /// This rank's block, outside of any autodiff graph.
    pub tensor: Tensor<DIMS>,
    /// Who holds what now.
    pub before: Arc<Blocks>,
    /// Who holds what afterwards.
    pub after: Arc<Blocks>,
    /// Which of the collective's exchanges it is.
    pub step: Step,
    /// In a backward pass: [`Group::next_sequence`] before the forward exchange that it answers. Two ranks
    /// that walk their graphs back in different orders are found by it, even where the exchanges look alike.
    pub answers: Option<u64>,
}

/// Which exchange of a collective: most have one, an all-reduce has two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The first, or the only one: the ledger counts a call.
    First,
    /// A later one of the same call.
    Further,
}

/// An exchange that has been started.
#[must_use = "an exchange that is never waited for leaves the other ranks' data where it is"]
pub struct InFlight {
    pending: Box<dyn Pending>,
    ledger: Arc<Ledger>,
    key: (Phase, Collective),
    entry: Entry,
    timeout: Duration,
}

impl std::fmt::Debug for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InFlight")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl InFlight {
    /// Whether [`wait`](Self::wait) would return at once, or fail.
    pub fn is_ready(&self) -> bool {
        self.pending.is_ready()
    }

    /// Waits for this rank's block of what was asked for, and enters it into the ledger. The time-out counts from
    /// here: what a rank did since the start is no waiting.
    ///
    /// # Errors
    /// [`CommError`] if the group fails or the time-out passes.
    pub fn wait(self) -> Result<Tensor<DIMS>, CommError> {
        let arrival = self.pending.wait(Instant::now() + self.timeout)?;
        let (phase, collective) = self.key;
        self.ledger.record(
            phase,
            collective,
            Entry {
                waited: arrival.waited,
                moved: arrival.moved,
                hidden: arrival.hidden,
                ..self.entry
            },
        );
        Ok(arrival.tensor)
    }
}
