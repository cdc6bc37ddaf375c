//! Softmax attention over keys and values that go round a ring of ranks, forward and backward.
//!
//! ```text
//!   step 0          step 1          step 2            Each rank attends with its own queries to the block it has,
//!   0: block 0      0: block 2      0: block 1        and merges the results; the next block is on its way meanwhile.
//!   1: block 1      1: block 0      1: block 2        Backward the blocks go round again, and behind each its
//!   2: block 2      2: block 1      2: block 0        gradient, which is added up on the way and goes home at the end.
//! ```
//!
//! A block goes only as far as a rank sees it: its *reach*, which the mask tells. Under a sliding window over
//! contiguous blocks that is a hop or two.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;

use super::{Dropout, HeadRange, Mask, Problem, Visibility, Within, backward, forward, merge};
use crate::blocks::{Blocks, DIMS, DimBlocks};
use crate::cost::Elements;
use crate::error::{CommError, Tracking};
use crate::group::{Group, InFlight, Request, Step};
use crate::layout::{Layout, MeshAxis, SeqAxis};
use crate::ledger::{Collective, Phase};
use crate::partition::Partition;
use crate::precision::computed;
use crate::strategy::{AttentionStage, ModelShape, PlanError, StageKind};

/// An attention whose keys and values go round a group.
#[derive(Debug, Clone)]
pub struct Ring {
    /// The ranks.
    pub group: Group,
    /// The heads that each of them computes: the same ones.
    pub heads: HeadRange,
    /// Which keys a query sees, for each folded sample.
    pub mask: Mask,
    /// What the scores are multiplied with.
    pub scale: f64,
    /// Which probabilities are dropped, if any.
    pub dropout: Option<Dropout>,
    /// The global numbers of the folded samples.
    pub samples: Vec<Range<usize>>,
    /// The positions of each rank's queries.
    pub queries: Vec<Vec<Range<usize>>>,
    /// The positions of each rank's keys.
    pub keys: Vec<Vec<Range<usize>>>,
    /// Whether a backward pass will answer.
    pub tracking: Tracking,
    /// The number of the group's first exchange in the forward pass.
    pub asked: u64,
}

/// How many hops each rank's block of keys must go until no rank further on sees any of it.
pub fn reach(
    mask: &Mask,
    samples: usize,
    queries: &[Vec<Range<usize>>],
    keys: &[Vec<Range<usize>>],
) -> Vec<usize> {
    let ranks = keys.len();
    let sees = |rank: usize, origin: usize| {
        mask.classify(0..samples, &queries[rank], &keys[origin]) != Visibility::None
    };
    let farthest = |origin: usize| (1..ranks).rfind(|hops| sees((origin + hops) % ranks, origin));
    (0..ranks)
        .map(|origin| farthest(origin).unwrap_or(0))
        .collect()
}

/// What `rank` sends: blocks of `rows` keys, `unit` elements of key and value each, go as far as `reach` says, and
/// backward once more, with their gradients behind them, which go home.
///
/// Where every block goes round, that is `unit·(L − l_{r+1})` forward and `unit·(2L − l_{r+1} − l_r)` backward.
pub fn sends(unit: usize, rows: &[usize], reach: &[usize], rank: usize) -> Elements {
    let ranks = rows.len();
    let mut sent = Elements::default();
    for origin in 0..ranks {
        let hops = (rank + ranks - origin) % ranks;
        let block = (unit * rows[origin]) as u64;
        if hops < reach[origin] {
            sent = sent + Elements::both(block, block);
        }
        if (1..=reach[origin]).contains(&hops) {
            sent.backward += block;
        }
    }
    sent
}

/// How the residual stream is split for rings, an axis at a time, longer axes first: in plain blocks, or where an
/// attention over the axis is causal in mirrored chunks, so that each rank computes as much. (Any split is right;
/// only the balance differs.)
///
/// # Errors
/// [`PlanError::Axes`].
pub fn balanced_layouts(model: &ModelShape, ranks: usize) -> Result<Vec<Layout>, PlanError> {
    let lengths = model.lengths()?;
    let layout = |axis: SeqAxis| {
        let length = lengths[axis.index()];
        let attended = model.stages.iter().find_map(|stage| match &stage.kind {
            StageKind::Attention(attention) if attention.axes.contains(axis) => {
                mirrored(attention, length, ranks)
            }
            _ => None,
        });
        match attended {
            Some(partition) if ranks > 1 => Layout::whole(lengths)
                .with_split(axis, partition, MeshAxis::whole(ranks))
                .unwrap_or_else(|_| Layout::split(lengths, axis, ranks)),
            _ => Layout::split(lengths, axis, ranks),
        }
    };
    Ok(model.axes_by_length().into_iter().map(layout).collect())
}

/// The partition that balances a mask's work, where plain blocks would not.
fn mirrored(attention: &AttentionStage, length: usize, ranks: usize) -> Option<Partition> {
    // Of several axes, positions along one are no positions of the mask.
    let is_alone = attention.axes.iter().count() == 1;
    match &attention.mask {
        Mask::Causal => Some(Partition::zigzag(length, ranks)),
        Mask::Packed {
            documents,
            within: Within::Full | Within::Causal,
        } if is_alone => {
            let ends: Vec<usize> = documents
                .ends()
                .iter()
                .map(|&end| end.min(length))
                .collect();
            Some(Partition::zigzag_documents(length, &ends, ranks))
        }
        _ => None,
    }
}

impl Ring {
    fn ranks(&self) -> usize {
        self.group.size()
    }

    /// Whose block a rank has after `step` hops.
    fn origin_at(&self, rank: usize, step: usize) -> usize {
        (rank + self.ranks() - step) % self.ranks()
    }

    fn problem(&self, origin: usize) -> Problem {
        Problem {
            heads: self.heads.clone(),
            mask: self.mask.clone(),
            query_positions: self.queries[self.group.rank()].clone(),
            key_positions: self.keys[origin].clone(),
            scale: self.scale,
            dropout: self.dropout,
            samples: self.samples.clone(),
        }
    }

    /// The output and the logsumexp, as [`forward`] returns them of all keys at once.
    ///
    /// # Shapes
    /// - `q`: `[samples, Lq, Hq, d]`, `k`, `v`: `[samples, Lk, Hkv, d]`, this rank's, untracked
    ///
    /// # Cost
    /// See [`sends`]. Memory: two blocks of keys and values.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn forward(&self, [q, k, v]: &[Tensor<4>; 3]) -> Result<(Tensor<4>, Tensor<3>), CommError> {
        let travel = Travel::new(self, q.dims()[0]);
        let dtype = q.dtype();
        let q = computed(q.clone());
        let part = |block: Tensor<4>, origin: usize| {
            let [k, v] = halves(computed(block));
            forward(q.clone(), k, v, &self.problem(origin))
        };
        let own = joined(k.clone(), v.clone());
        let mut step = 0;
        let mut next = travel.start(&own, step, Phase::Forward)?;
        let mut result = part(own, self.group.rank());
        while let Some(coming) = next {
            let block = folded(coming.wait()?);
            step += 1;
            next = travel.start(&block, step, Phase::Forward)?;
            if let Some(origin) = travel.seen_at(step) {
                result = merge(result, part(block, origin));
            }
        }
        let (output, lse) = result;
        Ok((output.cast(dtype), lse))
    }

    /// The gradients of `q`, `k` and `v`.
    ///
    /// Those of keys and values are added up in f32 at least, in the order of the hops.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn backward(
        &self,
        [q, k, v]: &[Tensor<4>; 3],
        (output, lse): (&Tensor<4>, &Tensor<3>),
        dout: Tensor<4>,
    ) -> Result<[Tensor<4>; 3], CommError> {
        let travel = Travel::new(self, q.dims()[0]);
        let dtype = q.dtype();
        let (q, output, dout) = (
            computed(q.clone()),
            computed(output.clone()),
            computed(dout),
        );
        let part = |block: Tensor<4>, origin: usize| {
            let [k, v] = halves(computed(block));
            let (q, output, dout) = (q.clone(), output.clone(), dout.clone());
            let problem = self.problem(origin);
            let (dq, dk, dv) = backward(q, k, v, output, lse.clone(), dout, &problem);
            (dq, joined(dk, dv))
        };
        let own = joined(k.clone(), v.clone());
        let mut step = 0;
        let mut next = travel.start(&own, step, Phase::Backward)?;
        let (mut dq, mut home) = part(own, self.group.rank());
        // The gradient that is on its way behind the block at hand.
        let mut behind: Option<InFlight> = None;
        while let Some(coming) = next {
            let block = folded(coming.wait()?);
            step += 1;
            next = travel.start(&block, step, Phase::Backward)?;
            let here = travel.seen_at(step).map(|origin| part(block, origin));
            let [mut sum, own] = travel.arrived(behind.take(), step)?;
            home = plus(home, own);
            if let Some((more_dq, gradient)) = here {
                dq = dq + more_dq;
                sum = Some(plus(gradient, sum));
            }
            behind = Some(travel.start_gradient(sum, step, &home)?);
        }
        let [_, own] = travel.arrived(behind, step + 1)?;
        let [dk, dv] = halves(plus(home, own));
        Ok([dq, dk, dv].map(|gradient| gradient.cast(dtype)))
    }
}

/// The blocks' way round the ring: who has which after how many hops.
struct Travel<'a> {
    ring: &'a Ring,
    samples: usize,
    reach: Vec<usize>,
    /// The farthest of all.
    steps: usize,
    /// Each rank's rows in the keys of all ranks, end to end.
    rows: Vec<Range<usize>>,
}

impl<'a> Travel<'a> {
    fn new(ring: &'a Ring, samples: usize) -> Self {
        let reach = reach(&ring.mask, samples, &ring.queries, &ring.keys);
        let mut end = 0;
        let rows = ring.keys.iter().map(|positions| {
            let count: usize = positions.iter().map(ExactSizeIterator::len).sum();
            end += count;
            end - count..end
        });
        Self {
            rows: rows.collect(),
            steps: reach.iter().copied().max().unwrap_or(0),
            reach,
            ring,
            samples,
        }
    }

    /// Who holds the rows of which origins.
    fn held(
        &self,
        [samples, _, heads, width]: [usize; 4],
        origins: impl Fn(usize) -> Vec<usize>,
    ) -> Arc<Blocks> {
        let ranks = self.ring.ranks();
        let length = self.rows.last().map_or(0, |rows| rows.end);
        let held = (0..ranks).map(|rank| {
            let rows = origins(rank).into_iter();
            rows.map(|origin| self.rows[origin].clone()).collect()
        });
        let held = DimBlocks::from_ranges(length, held.collect());
        let all = Blocks::replicated([samples, length, heads, width, 1], ranks);
        Arc::new(all.with_dim(1, held))
    }

    /// The origin of the block that a rank has after `step` hops, if the block goes so far.
    fn block_at(&self, rank: usize, step: usize) -> Option<usize> {
        let origin = self.ring.origin_at(rank, step);
        (step <= self.reach[origin]).then_some(origin)
    }

    /// Hands the blocks on, if any goes further.
    fn start(
        &self,
        block: &Tensor<4>,
        step: usize,
        phase: Phase,
    ) -> Result<Option<InFlight>, CommError> {
        if step == self.steps {
            return Ok(None);
        }
        let blocks = |step| {
            self.held(block.dims(), |rank| {
                self.block_at(rank, step).into_iter().collect()
            })
        };
        let request = (block.clone(), blocks(step), blocks(step + 1));
        self.exchange(request, phase).map(Some)
    }

    /// The origin of the block at hand after `step` hops, if this rank's queries see any of it.
    fn seen_at(&self, step: usize) -> Option<usize> {
        let ring = self.ring;
        let (queries, keys) = (&ring.queries[ring.group.rank()], &ring.keys);
        let sees = |&origin: &usize| {
            ring.mask.classify(0..self.samples, queries, &keys[origin]) != Visibility::None
        };
        self.block_at(ring.group.rank(), step).filter(sees)
    }

    /// The gradients that ranks have after `step`: that of the block at hand, on its way, and then the own one, if it
    /// has just come home.
    fn gradients_at(&self, rank: usize, step: usize) -> [Option<usize>; 2] {
        [
            self.block_at(rank, step),
            (self.reach[rank] + 1 == step && step > 1).then_some(rank),
        ]
    }

    /// Hands the gradients on behind their blocks, or home from the last rank that saw them. Where there is none yet,
    /// zeros set out; they are like the own ones at `home`.
    fn start_gradient(
        &self,
        sum: Option<Tensor<4>>,
        step: usize,
        home: &Tensor<4>,
    ) -> Result<InFlight, CommError> {
        let sum = sum.unwrap_or_else(|| {
            let origin = self.block_at(self.ring.group.rank(), step);
            let rows = origin.map_or(0, |origin| self.rows[origin].len());
            let [samples, _, heads, width] = home.dims();
            Tensor::zeros(
                [samples, rows, heads, width],
                (&home.device(), home.dtype()),
            )
        });
        let before = self.held(sum.dims(), |rank| {
            self.block_at(rank, step).into_iter().collect()
        });
        let after = self.held(sum.dims(), |rank| {
            let [travelling, home] = self.gradients_at(rank, step + 1);
            travelling.into_iter().chain(home).collect()
        });
        self.exchange((sum, before, after), Phase::Backward)
    }

    /// What has come after `step`: the travelling gradient of the block at hand, unless it begins here, and the own
    /// one, if it is home.
    fn arrived(
        &self,
        behind: Option<InFlight>,
        step: usize,
    ) -> Result<[Option<Tensor<4>>; 2], CommError> {
        let Some(behind) = behind else {
            return Ok([None, None]);
        };
        let arrived = folded(behind.wait()?);
        let mut end = 0;
        let gradients = self.gradients_at(self.ring.group.rank(), step);
        Ok(gradients.map(|origin| {
            let rows = self.rows[origin?].len();
            end += rows;
            (rows > 0).then(|| arrived.clone().narrow(1, end - rows, rows))
        }))
    }

    fn exchange(
        &self,
        (tensor, before, after): (Tensor<4>, Arc<Blocks>, Arc<Blocks>),
        phase: Phase,
    ) -> Result<InFlight, CommError> {
        self.ring.group.start(Request {
            collective: Collective::RingShift,
            phase,
            tracking: match phase {
                Phase::Forward => self.ring.tracking,
                _ => Tracking::Untracked,
            },
            tensor: tensor.unsqueeze_dim::<DIMS>(4),
            before,
            after,
            step: Step::First,
            answers: (phase == Phase::Backward).then_some(self.ring.asked),
        })
    }
}

fn folded(x: Tensor<DIMS>) -> Tensor<4> {
    x.squeeze_dim(4)
}

fn plus(sum: Tensor<4>, term: Option<Tensor<4>>) -> Tensor<4> {
    match term {
        Some(term) => sum + term,
        None => sum,
    }
}

/// Keys and values as one tensor, which travels as one.
fn joined(key: Tensor<4>, value: Tensor<4>) -> Tensor<4> {
    Tensor::cat(vec![key, value], 3)
}

fn halves(both: Tensor<4>) -> [Tensor<4>; 2] {
    let width = both.dims()[3] / 2;
    [0, width].map(|start| both.clone().narrow(3, start, width))
}
