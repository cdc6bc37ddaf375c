//! The seam between models and strategies: the [`SequenceParallel`] trait, and what passes through it.
//!
//! A model declares the *stages* of its forward pass (an attention over these axes, a feed-forward, …); a
//! strategy plans all of them at once, before any work; a [`Session`](crate::Session) walks the model through the plan. In
//! each stage the model calls four verbs, whatever the strategy:
//!
//! ```text
//!            x ─┬─ arrange ─┬──────────────────────────────────────────────── + ── x
//!               │           └─ norm ─ enter ─ q,k,v ─ attend ─ project ─ leave ┘
//!               │                       (or the feed-forward)
//! serial        -            -                -                  add bias
//! DSP           switch       -                -                  add bias
//! Ulysses       -            -                4 all-to-alls      add bias
//! ring, LSS     -            -                their exchange     add bias
//! Megatron-SP   -            all-gather       on its heads       reduce-scatter, add bias
//! ```
//!
//! A plan says how the residual stream is laid out in each stage (`residual`) and how activations are laid out
//! between `enter` and `leave` (`inner`). The verbs' defaults go from one to the other, so a strategy that
//! only moves activations needs to write nothing but its plan: a strategy that leaves the residual stream where it
//! is plans stage by stage ([`SequenceParallel::plan_stage`]), one that moves it plans the whole model
//! ([`SequenceParallel::plan`]). A mixture of strategies is a strategy that has each stage planned by one of its
//! parts and hands the verbs on ([`StagePlan::part`]).

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::attention::{self, Attended, Dropout, HeadRange, Heads, Logsumexp, Mask};
use crate::collective::relayout;
use crate::cost::Elements;
use crate::error::Error;
use crate::group::Group;
use crate::layout::{AxisSet, Layout, SeqAxis, Shard, Value};
use crate::partition::Partition;

/// The kind of an attention.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Form {
    /// `softmax(q·kᵀ/√d)·v`.
    Softmax,
    /// Linear attention, whose state decays by `decay[h]` a position for head `h`.
    Linear {
        /// The decay of each query head, in (0, 1].
        decay: Arc<[f64]>,
    },
}

/// What follows an attention in its sub-layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Closing {
    /// A projection, to which each head contributes a term of a sum, so that ranks may hold some of the heads:
    /// [`StageRun::project`](crate::session::StageRun::project).
    #[default]
    Projection,
    /// Something that needs all heads of a position, as a norm over them does:
    /// [`StageRun::join`](crate::session::StageRun::join).
    AllHeads,
}

/// A self-attention, as a strategy needs to know it.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionStage {
    /// The axes over which it runs; jointly, if several.
    pub axes: AxisSet,
    /// Its heads.
    pub heads: Heads,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Softmax or linear.
    pub form: Form,
    /// What the products of queries and keys are multiplied with.
    pub scale: f64,
    /// What follows it in its sub-layer.
    pub closing: Closing,
}

impl AttentionStage {
    /// Softmax attention with the usual scale, `1/√d`.
    pub fn softmax(axes: AxisSet, heads: Heads, mask: Mask) -> Self {
        Self {
            axes,
            heads,
            mask,
            form: Form::Softmax,
            scale: (heads.dim as f64).powf(-0.5),
            closing: Closing::Projection,
        }
    }

    /// Causal linear attention without a scale, whose state decays by `decay[h]` a position for query head `h`.
    pub fn linear(axes: AxisSet, heads: Heads, decay: Arc<[f64]>) -> Self {
        Self {
            axes,
            heads,
            mask: Mask::Causal,
            form: Form::Linear { decay },
            scale: 1.0,
            closing: Closing::Projection,
        }
    }

    /// How many sequences are attended: the batch times the positions of the axes that are not attended.
    pub fn samples(&self, batch: usize, lengths: [usize; 3]) -> usize {
        let beside = SeqAxis::ALL
            .into_iter()
            .filter(|&axis| !self.axes.contains(axis));
        batch * beside.map(|axis| lengths[axis.index()]).product::<usize>()
    }

    /// The elements of linear attention's states: a matrix for each head of each sample.
    pub fn state_elements(&self, batch: usize, lengths: [usize; 3]) -> usize {
        self.samples(batch, lengths) * self.heads.query * self.heads.dim * self.heads.dim
    }

    fn check(&self, stage: &str, model: &ModelShape) -> Result<(), PlanError> {
        let (batch, axes) = (model.batch, model.lengths.len());
        if self.axes.iter().next().is_none() {
            return Err(PlanError::AttendsNothing {
                stage: stage.to_owned(),
            });
        }
        if let Some(axis) = self.axes.iter().find(|axis| axis.index() >= axes) {
            return Err(PlanError::AttendsAbsent {
                stage: stage.to_owned(),
                axis,
                axes,
            });
        }
        if let Mask::KeyLengths(lengths) = &self.mask
            && lengths.len() != batch
        {
            return Err(PlanError::KeyLengths {
                stage: stage.to_owned(),
                lengths: lengths.len(),
                batch,
            });
        }
        let Form::Linear { decay } = &self.form else {
            return Ok(());
        };
        if self.mask != Mask::Causal {
            return Err(PlanError::NotCausal {
                stage: stage.to_owned(),
            });
        }
        let is_decay = |&decay: &f64| decay > 0.0 && decay <= 1.0;
        if decay.len() != self.heads.query || !decay.iter().all(is_decay) {
            return Err(PlanError::Decays {
                stage: stage.to_owned(),
                decays: decay.to_vec(),
                heads: self.heads.query,
            });
        }
        Ok(())
    }
}

/// What a sub-layer does with the sequence.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum StageKind {
    /// Attention of an activation to itself.
    Attention(AttentionStage),
    /// Attention of an activation to keys and values that every rank holds (text conditioning).
    CrossAttention {
        /// Its heads.
        heads: Heads,
    },
    /// A position-wise sub-layer.
    FeedForward {
        /// Its inner width.
        inner: usize,
    },
}

impl StageKind {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Attention(_) => "self-attention",
            Self::CrossAttention { .. } => "cross-attention",
            Self::FeedForward { .. } => "feed-forward",
        }
    }
}

/// One sub-layer of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// Its name, for errors, reports and traces.
    pub name: String,
    /// What it does.
    pub kind: StageKind,
}

impl Stage {
    /// A stage with a name.
    pub fn new(name: impl Into<String>, kind: StageKind) -> Self {
        Self {
            name: name.into(),
            kind,
        }
    }

    /// The attention over the axis along which the residual stream is split, with that axis and who holds what of it:
    /// for which something must move. None if there is no such attention, and every rank has all that it needs.
    pub fn attends_split<'a>(
        &'a self,
        residual: &'a Layout,
    ) -> Option<(&'a AttentionStage, SeqAxis, &'a Partition)> {
        let (axis, partition) = residual.split_axis()?;
        match &self.kind {
            StageKind::Attention(attention) if attention.axes.contains(axis) => {
                Some((attention, axis, partition))
            }
            _ => None,
        }
    }
}

/// How the output must be laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputLayout {
    /// As the input: the stages repeat, or the loss compares the two.
    AsInput,
    /// However it falls out.
    Free,
}

/// All that a strategy needs to know of a model, before any work.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// Samples.
    pub batch: usize,
    /// The lengths of the sequence axes that the model has: one to three.
    pub lengths: Vec<usize>,
    /// The width of the residual stream.
    pub hidden: usize,
    /// The sub-layers, in the order in which they run.
    pub stages: Vec<Stage>,
    /// How the output must be laid out.
    pub output: OutputLayout,
}

impl ModelShape {
    /// The lengths of all three axes, 1 for those that the model does not have.
    ///
    /// # Errors
    /// [`PlanError::Axes`] unless there are one to three lengths.
    pub fn lengths(&self) -> Result<[usize; 3], PlanError> {
        match self.lengths[..] {
            [a] => Ok([a, 1, 1]),
            [a, b] => Ok([a, b, 1]),
            [a, b, c] => Ok([a, b, c]),
            _ => Err(PlanError::Axes {
                axes: self.lengths.len(),
            }),
        }
    }

    /// Refuses what no strategy could run, and a number of ranks on which none could. Every plan begins with it.
    ///
    /// # Errors
    /// [`PlanError::RankCount`], and as [`check`](Self::check).
    pub fn check_on(&self, ranks: usize) -> Result<(), PlanError> {
        if !(1..=MOST_RANKS).contains(&ranks) {
            return Err(PlanError::RankCount { ranks });
        }
        self.check()
    }

    /// Refuses what no strategy could run: too many axes, attention over none of them or over one that is not there,
    /// heads that do not form groups, key lengths that are not one a sample, linear attention that is not causal or
    /// whose decays are not one a head.
    ///
    /// # Errors
    /// [`PlanError::Axes`], [`PlanError::AttendsNothing`], [`PlanError::AttendsAbsent`], [`PlanError::HeadGroups`],
    /// [`PlanError::KeyLengths`], [`PlanError::Decays`], [`PlanError::NotCausal`].
    pub fn check(&self) -> Result<(), PlanError> {
        self.lengths()?;
        for stage in &self.stages {
            let heads = match &stage.kind {
                StageKind::Attention(attention) => {
                    attention.check(&stage.name, self)?;
                    attention.heads
                }
                StageKind::CrossAttention { heads } => *heads,
                StageKind::FeedForward { .. } => continue,
            };
            let Heads {
                query, key_value, ..
            } = heads;
            if key_value == 0 || query == 0 || query % key_value != 0 {
                return Err(PlanError::HeadGroups {
                    stage: stage.name.clone(),
                    query,
                    key_value,
                });
            }
        }
        Ok(())
    }

    /// The sequence axes that the model has.
    pub fn axes(&self) -> impl Iterator<Item = SeqAxis> {
        SeqAxis::ALL.into_iter().take(self.lengths.len())
    }

    /// The sequence axes that the model has, longer ones first.
    pub fn axes_by_length(&self) -> Vec<SeqAxis> {
        let mut axes: Vec<SeqAxis> = self.axes().collect();
        axes.sort_by_key(|axis| std::cmp::Reverse(self.lengths[axis.index()]));
        axes
    }
}

/// On how many ranks a model can be planned: more than any machine has, and few enough for a plan to list them.
pub const MOST_RANKS: usize = 1 << 20;

/// What each of several strategies says.
fn listed(refusals: &[PlanError]) -> String {
    let numbered = |(index, refusal)| format!("({}) {refusal}", index + 1);
    let numbered: Vec<String> = refusals.iter().enumerate().map(numbered).collect();
    numbered.join("; ")
}

/// A model that a strategy cannot run, found before any work starts.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// More or fewer sequence axes than one to three.
    #[error("a model of {axes} sequence axes was given; one to three are possible")]
    Axes {
        /// How many.
        axes: usize,
    },
    /// A number of ranks for which nothing can be planned.
    #[error("a plan for {ranks} ranks was asked for; 1 to {MOST_RANKS} are possible")]
    RankCount {
        /// The ranks.
        ranks: usize,
    },
    /// An attention over no axis.
    #[error("stage {stage:?} is an attention over no sequence axis: it needs at least one")]
    AttendsNothing {
        /// The stage.
        stage: String,
    },
    /// An attention over an axis that the model does not have.
    #[error(
        "stage {stage:?} attends over {axis}, and the model has {axes} sequence axes, the first of which is 0"
    )]
    AttendsAbsent {
        /// The stage.
        stage: String,
        /// The axis.
        axis: SeqAxis,
        /// How many the model has.
        axes: usize,
    },
    /// A strategy that lays out the residual stream in no way at all.
    #[error(
        "{strategy} cannot run on {ranks} ranks: it names no layout of the residual stream, and needs at least one"
    )]
    NoResidual {
        /// The strategy.
        strategy: String,
        /// The ranks.
        ranks: usize,
    },
    /// A number of ranks that the strategy does not run on.
    #[error("{strategy} cannot run on {ranks} ranks: {rule}")]
    Ranks {
        /// The strategy.
        strategy: String,
        /// The ranks.
        ranks: usize,
        /// Its rule.
        rule: &'static str,
    },
    /// An attention over every axis that could have been split.
    #[error(
        "{strategy} cannot run stage {stage:?}: it attends over every one of the model's {axes} sequence axes, \
         so that none is left to be split; use a strategy that splits the attended axis"
    )]
    NoAxisLeft {
        /// The strategy.
        strategy: String,
        /// The stage.
        stage: String,
        /// The model's number of axes.
        axes: usize,
    },
    /// Too few heads for the ranks.
    #[error(
        "{strategy} cannot run stage {stage:?}: {heads} query heads over {ranks} ranks leave a rank without a head; \
         use at most {heads} ranks"
    )]
    Heads {
        /// The strategy.
        strategy: String,
        /// The stage.
        stage: String,
        /// The query heads.
        heads: usize,
        /// The ranks.
        ranks: usize,
    },
    /// Too few heads for the rows of a mesh, in which they are shared out.
    #[error(
        "{strategy} cannot run stage {stage:?}: {heads} query heads over each row of {row} of the {ranks} ranks leave a \
         rank without a head; use rows of at most {heads}"
    )]
    RowHeads {
        /// The strategy.
        strategy: String,
        /// The stage.
        stage: String,
        /// The query heads.
        heads: usize,
        /// The ranks of a row.
        row: usize,
        /// The ranks.
        ranks: usize,
    },
    /// A stage that none of a mixture's strategies can run.
    #[error(
        "{mixture} cannot run stage {stage:?}, for none of its strategies can: {}",
        listed(refusals)
    )]
    NoPart {
        /// The mixture.
        mixture: String,
        /// The stage.
        stage: String,
        /// What each of its strategies says.
        refusals: Vec<PlanError>,
    },
    /// A model of which a mixture can run each stage, but not all of them where one strategy has the residual stream.
    #[error(
        "{mixture} cannot run the model, whichever of its strategies lays out the residual stream: {}",
        listed(refusals)
    )]
    NoLeader {
        /// The mixture.
        mixture: String,
        /// What is in the way of each of its strategies.
        refusals: Vec<PlanError>,
    },
    /// A mesh whose rows the ranks do not fill.
    #[error(
        "{strategy} cannot form rows of {row} from {ranks} ranks: the first must divide the second"
    )]
    Mesh {
        /// The strategy.
        strategy: String,
        /// The ranks of a row.
        row: usize,
        /// The ranks.
        ranks: usize,
    },
    /// Heads that do not form groups.
    #[error(
        "stage {stage:?} has {query} query heads and {key_value} key-value heads: the first must be a multiple of the second, \
         and neither 0"
    )]
    HeadGroups {
        /// The stage.
        stage: String,
        /// Query heads.
        query: usize,
        /// Key-value heads.
        key_value: usize,
    },
    /// Another number of key lengths than samples.
    #[error(
        "stage {stage:?} has {lengths} key lengths for a batch of {batch}: give one for each sample, however many sequences \
         of it are attended"
    )]
    KeyLengths {
        /// The stage.
        stage: String,
        /// How many lengths.
        lengths: usize,
        /// The samples.
        batch: usize,
    },
    /// An attention that the strategy does not compute.
    #[error("{strategy} cannot run stage {stage:?}: {rule}")]
    Form {
        /// The strategy.
        strategy: String,
        /// The stage.
        stage: String,
        /// Its rule.
        rule: &'static str,
    },
    /// A stage that would have to run where the residual stream is laid out as it is not.
    #[error("{strategy} cannot run stage {stage:?} on {residual}: {rule}")]
    Residual {
        /// The strategy.
        strategy: String,
        /// The stage.
        stage: String,
        /// How the residual stream is laid out.
        residual: Box<Layout>,
        /// Its rule.
        rule: &'static str,
    },
    /// Linear attention with another number of decays than query heads, or a decay outside of (0, 1].
    #[error(
        "stage {stage:?} is linear attention of {heads} query heads with the decays {decays:?}: it needs one in (0, 1] \
         for each"
    )]
    Decays {
        /// The stage.
        stage: String,
        /// The decays.
        decays: Vec<f64>,
        /// The query heads.
        heads: usize,
    },
    /// Linear attention under another mask than the causal one.
    #[error(
        "stage {stage:?} is linear attention, whose state runs forward only: its mask must be causal"
    )]
    NotCausal {
        /// The stage.
        stage: String,
    },
}

/// How one stage runs.
#[derive(Debug, Clone, PartialEq)]
pub struct StagePlan {
    /// The layout of the residual stream.
    pub residual: Layout,
    /// The layout between `enter` and `leave`.
    pub inner: Layout,
    /// What the sub-layer gives before `leave`: values, or each rank's terms of a sum, for which its last
    /// projection must be sharded by rows.
    pub value: Value,
    /// What each rank sends to bring the residual stream here, by formula.
    pub arranges: Vec<Elements>,
    /// What each rank sends to enter, to attend and to leave, by formula.
    pub sends: Vec<Elements>,
    /// In a mixture: which of its strategies runs the stage, and that one's own plan of it.
    pub part: Option<Arc<PartPlan>>,
}

/// A stage of a mixture, as the part that runs it planned it.
#[derive(Debug, Clone, PartialEq)]
pub struct PartPlan {
    /// Which of the mixture's strategies.
    pub index: usize,
    /// Its plan.
    pub plan: StagePlan,
}

impl StagePlan {
    /// A stage in which nothing moves.
    pub fn local(residual: &Layout, ranks: usize) -> Self {
        Self {
            residual: residual.clone(),
            inner: residual.clone(),
            value: Value::Complete,
            arranges: vec![Elements::default(); ranks],
            sends: vec![Elements::default(); ranks],
            part: None,
        }
    }

    /// The same stage in which each rank sends what `sends` says.
    pub fn sending(mut self, sends: impl Fn(usize) -> Elements) -> Self {
        for (rank, sent) in self.sends.iter_mut().enumerate() {
            *sent = sends(rank);
        }
        self
    }
}

/// How a strategy runs a model: the same on every rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The layout of the input.
    pub input: Layout,
    /// Each stage.
    pub stages: Vec<StagePlan>,
    /// The layout of the output.
    pub output: Layout,
    /// What each rank sends to bring the last stage's residual stream into the output's layout.
    pub output_sends: Vec<Elements>,
}

impl Plan {
    /// What `rank` sends in one forward and one backward pass, by formula.
    pub fn sends(&self, rank: usize) -> Elements {
        let stage = |stage: &StagePlan| stage.arranges[rank] + stage.sends[rank];
        let stages: Elements = self.stages.iter().map(stage).sum();
        stages + self.output_sends[rank]
    }

    /// What all ranks together send in one forward and one backward pass, by formula.
    pub fn sends_of_all(&self) -> u64 {
        let sent = (0..self.output_sends.len()).map(|rank| self.sends(rank));
        sent.map(|sent| sent.forward + sent.backward).sum()
    }
}

/// What a parameter is for, where that decides which part of it a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Norms, tables, embeddings, biases added after a reduction: every rank needs all of it.
    Replicated,
    /// A table with a row for each position of a sequence axis, along `dim`.
    Table {
        /// The dim of the parameter.
        dim: usize,
        /// The axis.
        axis: SeqAxis,
    },
    /// The output features of a projection into heads or into an inner width, along `dim`: `fused`
    /// projections end to end, each in all of `units`.
    Columns {
        /// The dim of the parameter.
        dim: usize,
        /// How many projections are fused (3 for a query-key-value projection).
        fused: usize,
        /// The units that must not be cut.
        units: Units,
    },
    /// The input features of the projection back, along `dim`, in all of `units`.
    Rows {
        /// The dim of the parameter.
        dim: usize,
        /// The units that must not be cut.
        units: Units,
    },
}

/// What a projection's features come in, each unit as wide as the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Units {
    /// The query heads of these heads, each of their `dim` features. A projection that has other features a head, as
    /// into one gate for each, has units of its own: the same heads with that `dim`.
    Query(Heads),
    /// Their key-value heads, of their `dim` too.
    KeyValue(Heads),
    /// So many features of an inner width, or blocks of it as wide as each other.
    Features(usize),
}

impl Units {
    /// How many there are.
    pub fn count(self) -> usize {
        match self {
            Self::Query(heads) => heads.query,
            Self::KeyValue(heads) => heads.key_value,
            Self::Features(count) => count,
        }
    }
}

/// A role that a parameter's shape does not fit: a strategy that cut by it would leave out what nobody else holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "parameter {path:?} of shape {shape:?} was placed with the role {role:?}, which does not fit: {misfit}"
)]
pub struct RoleError {
    /// The parameter.
    pub path: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its role.
    pub role: Role,
    /// What does not fit.
    pub misfit: Misfit,
}

/// What of a role does not fit a parameter's shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// There is no such dim.
    #[error("it has {dims} dim(s), the first of which is 0, and none is {dim}")]
    Dim {
        /// The role's.
        dim: usize,
        /// How many there are.
        dims: usize,
    },
    /// Of no projection at all.
    #[error("0 projections are fused, where a projection alone counts 1")]
    Fused,
    /// Units that are not all as wide.
    #[error("the {length} features of dim {dim} are not {fused} × {count} units of equal width")]
    Features {
        /// The dim.
        dim: usize,
        /// Its extent.
        length: usize,
        /// How many projections are fused.
        fused: usize,
        /// The units of each.
        count: usize,
    },
    /// Heads that are wider or narrower than they are.
    #[error(
        "the {length} features of dim {dim} are not {fused} × {count} heads of {width}; say how many projections are \
         fused, and where a head has other features here, give heads of that dim"
    )]
    Heads {
        /// The dim.
        dim: usize,
        /// Its extent.
        length: usize,
        /// How many projections are fused.
        fused: usize,
        /// The heads of each.
        count: usize,
        /// The features of each head.
        width: usize,
    },
}

impl Role {
    /// Holds a parameter's shape to this role, whether or not a strategy cuts by it.
    ///
    /// # Errors
    /// [`RoleError`] with the parameter and what does not fit.
    pub fn check(self, path: &str, shape: &[usize]) -> Result<(), RoleError> {
        self.misfit(shape).map_err(|misfit| RoleError {
            path: path.to_owned(),
            shape: shape.to_vec(),
            role: self,
            misfit,
        })
    }

    fn misfit(self, shape: &[usize]) -> Result<(), Misfit> {
        let (dim, cut) = match self {
            Self::Replicated => return Ok(()),
            Self::Table { dim, .. } => (dim, None),
            Self::Columns { dim, fused, units } => (dim, Some((fused, units))),
            Self::Rows { dim, units } => (dim, Some((1, units))),
        };
        let dims = shape.len();
        let &length = shape.get(dim).ok_or(Misfit::Dim { dim, dims })?;
        let Some((fused, units)) = cut else {
            return Ok(());
        };
        let count = units.count();
        let all = fused.saturating_mul(count);
        match units {
            _ if fused == 0 => Err(Misfit::Fused),
            Units::Query(heads) | Units::KeyValue(heads)
                if length != all.saturating_mul(heads.dim) =>
            {
                Err(Misfit::Heads {
                    dim,
                    length,
                    fused,
                    count,
                    width: heads.dim,
                })
            }
            Units::Features(_) if !length.is_multiple_of(all) => Err(Misfit::Features {
                dim,
                length,
                fused,
                count,
            }),
            _ => Ok(()),
        }
    }

    /// This role in the stage at a position of the model's list: only there may a mixture's strategy shard it.
    pub fn in_stage(self, stage: usize) -> Part {
        Part {
            role: self,
            stage: Some(stage),
        }
    }
}

/// What a parameter is for, and in which stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// What it is for.
    pub role: Role,
    /// The position of its stage in [`ModelShape::stages`]; none if it belongs to no stage.
    pub stage: Option<usize>,
}

impl From<Role> for Part {
    fn from(role: Role) -> Self {
        Self { role, stage: None }
    }
}

/// A parameter, as [`SequenceParallel::placement`] is told of it.
#[derive(Debug, Clone, Copy)]
pub struct Parameter<'a> {
    /// What it is for. Its shape fits it.
    pub role: Role,
    /// Its whole shape.
    pub shape: &'a [usize],
    /// The plan of the whole model.
    pub plan: &'a Plan,
    /// The plan of the stage that it belongs to.
    pub stage: Option<&'a StagePlan>,
}

/// Which part of a parameter a rank holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// All of it: its gradient is the sum over the ranks.
    Replicated,
    /// The given ranges of one dim, which no other rank holds: its gradient is whole already.
    Sharded {
        /// The dim.
        dim: usize,
        /// The ranges, in order.
        ranges: Vec<Range<usize>>,
    },
    /// The given ranges of one dim, some of which other ranks hold too: its gradient is the sum over those.
    Shared {
        /// The dim.
        dim: usize,
        /// The ranges, in order.
        ranges: Vec<Range<usize>>,
    },
}

/// A way of splitting the sequence over ranks.
///
/// An implementation is a value without state: the plan and the group reach it as arguments, so that one value
/// serves any number of ranks and models. Everything that it refuses it refuses in [`plan`](Self::plan).
pub trait SequenceParallel: fmt::Debug + Send + Sync {
    /// Its name in reports and errors.
    fn name(&self) -> &str;

    /// Plans a model for a group of `ranks`. By default the residual stream stays laid out as one of
    /// [`residuals`](Self::residuals), that with which the ranks together send least; of equals, the first.
    ///
    /// # Errors
    /// [`PlanError`] with the numbers and the rule if the strategy cannot run the model.
    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError> {
        model.check_on(ranks)?;
        let mut best: Option<Plan> = None;
        let mut refusal = None;
        for residual in self.residuals(model, ranks)? {
            let stages = model.stages.iter();
            let planned = stages
                .map(|stage| self.plan_stage(model, stage, &residual, ranks))
                .collect();
            match planned {
                Ok(stages) => {
                    let plan = Plan {
                        input: residual.clone(),
                        stages,
                        output: residual,
                        output_sends: vec![Elements::default(); ranks],
                    };
                    if best
                        .as_ref()
                        .is_none_or(|best| plan.sends_of_all() < best.sends_of_all())
                    {
                        best = Some(plan);
                    }
                }
                Err(error) => {
                    refusal.get_or_insert(error);
                }
            }
        }
        match (best, refusal) {
            (Some(plan), _) => Ok(plan),
            (None, Some(refusal)) => Err(refusal),
            (None, None) => Err(PlanError::NoResidual {
                strategy: self.name().to_owned(),
                ranks,
            }),
        }
    }

    /// How the residual stream could be laid out for a whole model, in the order of preference. By default one of
    /// the axes is split in balanced blocks, longer ones first, which split most evenly.
    ///
    /// # Errors
    /// [`PlanError`] if there is no layout for this number of ranks.
    fn residuals(&self, model: &ModelShape, ranks: usize) -> Result<Vec<Layout>, PlanError> {
        let lengths = model.lengths()?;
        let split = |axis| Layout::split(lengths, axis, ranks);
        Ok(model.axes_by_length().into_iter().map(split).collect())
    }

    /// Plans one stage where the residual stream is laid out as `residual`: for the strategy's own plan, or for
    /// a mixture that hands it the stage. Only one axis of `residual` is split, over all ranks.
    ///
    /// # Errors
    /// [`PlanError`] with the numbers and the rule if the strategy cannot run the stage so.
    fn plan_stage(
        &self,
        model: &ModelShape,
        stage: &Stage,
        residual: &Layout,
        ranks: usize,
    ) -> Result<StagePlan, PlanError>;

    /// Which part of a parameter `rank` holds. By default all of it.
    fn placement(&self, parameter: &Parameter<'_>, rank: usize, ranks: usize) -> Placement {
        let _ = (parameter, rank, ranks);
        Placement::Replicated
    }

    /// The heads whose projections `rank` holds in a stage, as [`placement`](Self::placement) cut them. By
    /// default all.
    fn held_heads(&self, heads: Heads, plan: &StagePlan, rank: usize, ranks: usize) -> HeadRange {
        let _ = (plan, rank, ranks);
        HeadRange::all(heads)
    }

    /// Brings the residual stream into the stage's layout.
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    fn arrange(&self, x: Shard, scope: &Scope<'_>) -> Result<Shard, Error> {
        relayout(x, &scope.plan.residual, scope.group)
    }

    /// Brings the sub-layer's input into the layout in which it is computed.
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    fn enter(&self, x: Shard, scope: &Scope<'_>) -> Result<Shard, Error> {
        relayout(x, &scope.plan.inner, scope.group)
    }

    /// The self-attention. By default each rank attends within what it holds, which is exact if the attended
    /// axes are whole.
    ///
    /// # Shapes
    /// - `qkv`: `[B, s1, s2, s3, heads·d]` each, of the heads whose weights the rank holds
    /// - returns: laid out as the query
    ///
    /// # Errors
    /// [`Error`] if an attended axis is split and the strategy did not bring it together, or the ranks fail.
    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        attention::attend_local(qkv, scope)
    }

    /// Brings an attention's output to where the residual stream is, with all heads of each position, for what needs
    /// them all; the sub-layer then ends there, without [`leave`](Self::leave).
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    fn join(&self, x: Shard, scope: &AttentionScope<'_>) -> Result<Shard, Error> {
        relayout(x, &scope.scope.plan.residual, scope.scope.group)
    }

    /// Brings the sub-layer's output back into the residual stream's layout, and adds its bias: once, after
    /// any reduction. Where the plan has complete values in the residual stream's own layout, it may do nothing else: a
    /// session that [switches in parts](crate::Session::switching_in) does that itself.
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    fn leave(&self, x: Shard, bias: Option<Tensor<1>>, scope: &Scope<'_>) -> Result<Shard, Error> {
        let x = relayout(x, &scope.plan.residual, scope.group)?;
        add_bias(x, bias)
    }
}

/// Adds a bias over the channels.
///
/// # Errors
/// [`Error`] never in practice: the shape does not change.
pub fn add_bias(x: Shard, bias: Option<Tensor<1>>) -> Result<Shard, Error> {
    match bias {
        Some(bias) => Ok(x.map(|x| x + bias.reshape([1, 1, 1, 1, -1]))?),
        None => Ok(x),
    }
}

/// What a verb is told: this rank's group, the stage and its plan.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// The ranks.
    pub group: &'a Group,
    /// What the model declared.
    pub stage: &'a Stage,
    /// What the strategy planned.
    pub plan: &'a StagePlan,
}

/// What [`SequenceParallel::attend`] is told.
#[derive(Debug, Clone, Copy)]
pub struct AttentionScope<'a> {
    /// The ranks, the stage, the plan.
    pub scope: Scope<'a>,
    /// The attention.
    pub attention: &'a AttentionStage,
    /// The heads that this rank's queries, keys and values are of.
    pub heads: &'a HeadRange,
    /// Whether the logsumexp is wanted too.
    pub logsumexp: Logsumexp,
    /// Which of the attention's probabilities are dropped, if any.
    pub dropout: Option<Dropout>,
}
