//! Ranks as threads of one process.
//!
//! A rank posts a handle of its tensor and reads its peers' parts straight from their memory when all those
//! that it needs have posted. Nothing is serialised and nothing is packed: each element is copied once, by
//! the rank that receives it. A posted handle shares its tensor, so the poster may go on at once: Burn copies
//! on write. Ranks may be on different devices: what lies on another one is brought over. On a GPU a rank waits until its copies
//! are made (`copy.rs`).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};

use super::copy::{Crossing, Source, assemble};
use super::job::Fails;
use super::position::{GroupId, Position};
use super::waits::{self, Wait};
use super::{Arrival, Exchange, Pending, Transport};
use crate::blocks::{Blocks, DIMS, Transfer};
use crate::error::{Call, CommError, Difference, Side};

/// What the ranks of one launch share.
#[derive(Debug)]
pub(crate) struct World {
    state: Mutex<State>,
    changed: Condvar,
    ranks: usize,
    crossing: Crossing,
}

#[derive(Debug, Default)]
struct State {
    /// Exchanges that not every member has taken its part of.
    rounds: HashMap<(Arc<GroupId>, u64), Round>,
    /// The first failure. Once set it stays.
    fate: Option<CommError>,
    /// Per world rank: its last call, what it waits for, and whether it has returned.
    ranks: Vec<RankState>,
}

impl State {
    /// The error of `rank`'s wait, or of the one that it leads to.
    fn unanswered(&self, rank: usize) -> Option<CommError> {
        let until_now = |(call, missing, since): &(Call, Vec<usize>, Instant)| Wait {
            call: call.clone(),
            missing: missing.clone(),
            waited: since.elapsed(),
        };
        let waits = (self.ranks.iter()).map(|rank| rank.waits.as_ref().map(until_now));
        waits::unanswered(&waits.collect::<Vec<_>>(), rank)
    }
}

#[derive(Debug, Clone, Default)]
struct RankState {
    last: Option<Call>,
    /// What it waits for, whom, and since when.
    waits: Option<(Call, Vec<usize>, Instant)>,
    ended: bool,
}

#[derive(Debug)]
struct Round {
    posts: Vec<Option<Post>>,
    taken: usize,
}

#[derive(Debug, Clone)]
struct Post {
    call: Call,
    tensor: Tensor<DIMS>,
    before: Arc<Blocks>,
    after: Arc<Blocks>,
}

impl World {
    pub(crate) fn new(ranks: usize) -> Arc<Self> {
        let state = State {
            ranks: vec![RankState::default(); ranks],
            ..State::default()
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            ranks,
            crossing: Crossing::default(),
        })
    }

    /// The end of `rank` in the group of all ranks.
    pub(crate) fn transport(self: &Arc<Self>, rank: usize) -> Arc<dyn Transport> {
        Arc::new(LocalTransport {
            world: self.clone(),
            position: Position::new(GroupId::world(self.ranks), rank),
            sequence: AtomicU64::new(0),
        })
    }

    /// The root cause, if the world has failed.
    pub(crate) fn fate(&self) -> Option<CommError> {
        self.lock().fate.clone()
    }

    /// Fails the world if a rank called a collective that another has returned without calling. Ranks that
    /// need nothing of each other do not notice that themselves.
    pub(crate) fn check_all_answered(&self) {
        let state = self.lock();
        let unanswered = state.rounds.iter().filter_map(|((id, sequence), round)| {
            let world_rank = |position: usize| id.members[position];
            let (caller, post) = (round.posts.iter().enumerate())
                .find_map(|(position, post)| post.as_ref().map(|post| (position, post)))?;
            let missing = round.posts.iter().position(Option::is_none)?;
            let key = (id.members.clone(), *sequence);
            let error = CommError::PeerEnded {
                rank: world_rank(caller),
                call: post.call.clone(),
                ended: world_rank(missing),
            };
            Some((key, error))
        });
        // The same one of several in every run.
        let first = unanswered.min_by(|(a, _), (b, _)| a.cmp(b));
        drop(state);
        if let Some((_, error)) = first {
            self.fail(error);
        }
    }

    /// Notes that a rank has returned.
    pub(crate) fn end(&self, rank: usize) {
        self.lock().ranks[rank].ended = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of ours panics while it holds the lock; a poisoned state would still be consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fails for World {
    fn fail(&self, cause: CommError) -> CommError {
        let fate = self.lock().fate.get_or_insert(cause).clone();
        self.changed.notify_all();
        fate
    }

    fn last_call(&self, rank: usize) -> Option<Call> {
        self.lock().ranks[rank].last.clone()
    }
}

#[derive(Debug)]
struct LocalTransport {
    world: Arc<World>,
    position: Position,
    sequence: AtomicU64,
}

impl Transport for LocalTransport {
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
        let call = exchange.call(sequence);
        let fits = exchange.check_shape(&self.position, &call);
        let Exchange {
            tensor,
            before,
            after,
            ..
        } = exchange;
        let rank = self.position.rank;
        let transfers = (0..self.size()).map(|source| before.transfers(&after, source, rank));
        let pending = LocalPending {
            world: self.world.clone(),
            id: self.position.id.clone(),
            rank,
            call: call.clone(),
            transfers: transfers.collect(),
            shape: after.local_shape(rank),
            device: tensor.device(),
        };
        let post = Post {
            call,
            tensor,
            before,
            after,
        };
        let mut state = self.world.lock();
        state.ranks[self.position.world_rank()].last = Some(post.call.clone());
        if let Some(fate) = &state.fate {
            return Err(fate.clone());
        }
        let round = state
            .rounds
            .entry((self.position.id.clone(), sequence))
            .or_insert_with(|| Round {
                posts: vec![None; self.size()],
                taken: 0,
            });
        let earlier = round.posts.iter().enumerate();
        let earlier = earlier.filter_map(|(rank, post)| post.as_ref().map(|post| (rank, post)));
        if let Some(error) = earlier
            .filter_map(|(other, theirs)| self.disagreement(&post, other, theirs))
            .next()
        {
            drop(state);
            return Err(self.world.fail(error));
        }
        if let Err(error) = fits {
            drop(state);
            return Err(self.world.fail(error));
        }
        round.posts[rank] = Some(post);
        drop(state);
        self.world.changed.notify_all();
        Ok(Box::new(pending))
    }

    fn subgroup(&self, members: &[usize]) -> Result<Arc<dyn Transport>, CommError> {
        Ok(Arc::new(Self {
            world: self.world.clone(),
            position: self.position.subgroup(members)?,
            sequence: AtomicU64::new(0),
        }))
    }

    fn abort(&self, cause: CommError) {
        self.world.fail(cause);
    }
}

impl LocalTransport {
    fn disagreement(&self, mine: &Post, other: usize, theirs: &Post) -> Option<CommError> {
        let rank = self.position.world_rank();
        let other = self.position.id.members[other];
        if mine.call != theirs.call {
            return Some(CommError::Mismatch {
                rank,
                call: mine.call.clone(),
                other,
                other_call: theirs.call.clone(),
            });
        }
        (mine.before != theirs.before || mine.after != theirs.after).then(|| {
            let sides = [
                (Side::Before, &mine.before, &theirs.before),
                (Side::After, &mine.after, &theirs.after),
            ];
            CommError::Partitions {
                rank,
                call: mine.call.clone(),
                other,
                difference: (sides.into_iter())
                    .find_map(|(side, own, other)| difference(side, own, other))
                    .map(Box::new),
            }
        })
    }
}

/// The first part that is another one.
fn difference(side: Side, own: &Blocks, other: &Blocks) -> Option<Difference> {
    let ranks = own.ranks().min(other.ranks());
    let parts = (0..DIMS).flat_map(|dim| (0..ranks).map(move |holder| (dim, holder)));
    let part = |blocks: &Blocks, (dim, holder)| blocks.dim(dim).ranges(holder).to_vec();
    let differs = |&at: &(usize, usize)| part(own, at) != part(other, at);
    let at @ (dim, holder) = parts.into_iter().find(differs)?;
    Some(Difference {
        side,
        dim,
        holder,
        own: part(own, at),
        other: part(other, at),
    })
}

struct LocalPending {
    world: Arc<World>,
    id: Arc<GroupId>,
    rank: usize,
    call: Call,
    /// From each rank, the boxes that land here.
    transfers: Vec<Vec<Transfer>>,
    /// Of this rank's block afterwards.
    shape: [usize; DIMS],
    /// Where this rank's tensors are: the peers' may be elsewhere.
    device: Device,
}

impl Pending for LocalPending {
    fn is_ready(&self) -> bool {
        let state = self.world.lock();
        let posts = state.rounds.get(&self.key()).map(|round| &round.posts);
        let has_posted = |rank: usize| posts.is_some_and(|posts| posts[rank].is_some());
        let mut members = 0..self.id.members.len();
        state.fate.is_some() || members.all(|rank| !self.sends(rank) || has_posted(rank))
    }

    fn wait(self: Box<Self>, deadline: Instant) -> Result<Arrival, CommError> {
        let start = Instant::now();
        let tensors = {
            let _span = tracing::info_span!("waiting", call = %self.call).entered();
            self.gather(start, deadline)?
        };
        let waited = start.elapsed();
        let sources: Vec<Source> = tensors
            .into_iter()
            .zip(&self.transfers)
            .filter(|(_, transfers)| !transfers.is_empty())
            .map(|(tensor, transfers)| Source {
                tensor,
                transfers: transfers.clone(),
            })
            .collect();
        let _span = tracing::info_span!("communication", call = %self.call).entered();
        let tensor = if sources.is_empty() {
            Tensor::zeros(self.shape, (&self.device, self.call.dtype))
        } else {
            assemble(self.shape, &sources, &self.device, &self.world.crossing)
        };
        // A GPU reads the peers' tensors later: until then they are held, and so not written to.
        if let Err(error) = self.device.sync() {
            return Err(self.world.fail(CommError::Engine {
                rank: self.id.members[self.rank],
                message: error.to_string(),
            }));
        }
        drop(sources);
        self.take();
        Ok(Arrival {
            tensor,
            waited,
            moved: start.elapsed() - waited,
            // Who copies is the rank that waits.
            hidden: Duration::ZERO,
        })
    }
}

impl LocalPending {
    fn key(&self) -> (Arc<GroupId>, u64) {
        (self.id.clone(), self.call.sequence)
    }

    /// Whether something of a rank's lands here.
    fn sends(&self, rank: usize) -> bool {
        !self.transfers[rank].is_empty()
    }

    /// Waits until every rank that sends here has posted, and returns all tensors that were posted by then,
    /// the rank's own in place of those that are not needed.
    fn gather(&self, start: Instant, deadline: Instant) -> Result<Vec<Tensor<DIMS>>, CommError> {
        let key = self.key();
        let mut state = self.world.lock();
        loop {
            if let Some(fate) = &state.fate {
                return Err(fate.clone());
            }
            let Some(round) = state.rounds.get(&key) else {
                unreachable!("a round lasts until every member has taken its part");
            };
            let missing: Vec<usize> = (0..self.id.members.len())
                .filter(|&rank| self.sends(rank) && round.posts[rank].is_none())
                .collect();
            let rank = self.id.members[self.rank];
            if missing.is_empty() {
                let own = round.posts[self.rank].as_ref();
                let tensors = (round.posts.iter())
                    .filter_map(|post| post.as_ref().or(own))
                    .map(|post| post.tensor.clone())
                    .collect();
                state.ranks[rank].waits = None;
                return Ok(tensors);
            }
            let missing: Vec<usize> = missing.iter().map(|&rank| self.id.members[rank]).collect();
            let ended = missing.iter().find(|&&rank| state.ranks[rank].ended);
            let ended = ended.map(|&ended| CommError::PeerEnded {
                rank,
                call: self.call.clone(),
                ended,
            });
            state.ranks[rank].waits = Some((self.call.clone(), missing, start));
            let error = ended.or_else(|| {
                let over = Instant::now() >= deadline;
                over.then(|| state.unanswered(rank)).flatten()
            });
            if let Some(error) = error {
                drop(state);
                return Err(self.world.fail(error));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            (state, _) = self
                .world
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Notes that this rank has its part; the last to do so ends the round and frees the tensors.
    fn take(&self) {
        let key = self.key();
        let mut state = self.world.lock();
        let size = self.id.members.len();
        let done = state.rounds.get_mut(&key).is_some_and(|round| {
            round.taken += 1;
            round.taken == size
        });
        let freed = if done {
            state.rounds.remove(&key)
        } else {
            None
        };
        drop(state);
        drop(freed);
    }
}
