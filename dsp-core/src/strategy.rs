//! The seam between models and strategies: the [`SequenceParallel`] trait, and what passes through it.
//!
//! A model declares the *stages* of its forward pass (an attention over these axes, a feed-forward, …); a
//! strategy plans all of them at once, before any work; a [`Session`] walks the model through the plan. In
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
//! only moves activations needs to write nothing but [`SequenceParallel::plan`]. A mixture of strategies is a
//! strategy that plans each stage with one of its parts and hands the verbs on
//! ([`StagePlan::delegate`]).

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Gradients, Tensor};

use crate::attention::{self, Attended, Heads, Logsumexp, Mask};
use crate::blocks::DIMS;
use crate::collective::relayout;
use crate::cost::{self, Elements};
use crate::error::{CommError, Error};
use crate::gradients;
use crate::group::Group;
use crate::layout::{AxisSet, Layout, LayoutError, SeqAxis, Shard};
use crate::linear::project_without_bias;
use crate::place::{self, Placed};

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
        }
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
    fn name(&self) -> &'static str {
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

    /// The sequence axes that the model has.
    pub fn axes(&self) -> impl Iterator<Item = SeqAxis> {
        SeqAxis::ALL.into_iter().take(self.lengths.len())
    }
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
    /// A number of ranks that the strategy does not run on.
    #[error("{strategy} cannot run on {ranks} ranks: {rule}")]
    Ranks {
        /// The strategy.
        strategy: &'static str,
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
        strategy: &'static str,
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
        strategy: &'static str,
        /// The stage.
        stage: String,
        /// The query heads.
        heads: usize,
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
    /// A form of attention that the strategy does not compute.
    #[error("{strategy} cannot run stage {stage:?}: {rule}")]
    Form {
        /// The strategy.
        strategy: &'static str,
        /// The stage.
        stage: String,
        /// Its rule.
        rule: &'static str,
    },
}

/// A model that does not walk through the stages it declared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// The next stage is of another kind.
    #[error(
        "the model runs a {wanted} where it declared stage {index} ({name:?}) to be a {declared}"
    )]
    Kind {
        /// The stage's position.
        index: usize,
        /// Its name.
        name: String,
        /// What was declared.
        declared: &'static str,
        /// What the model runs.
        wanted: &'static str,
    },
    /// There is no next stage.
    #[error("the model runs a {wanted} after all {declared} stages that it declared")]
    TooMany {
        /// How many were declared.
        declared: usize,
        /// What the model runs.
        wanted: &'static str,
    },
    /// Stages were left over.
    #[error("the model ran {run} of the {declared} stages that it declared")]
    TooFew {
        /// How many ran.
        run: usize,
        /// How many were declared.
        declared: usize,
    },
}

/// How one stage runs.
#[derive(Debug, Clone, PartialEq)]
pub struct StagePlan {
    /// The layout of the residual stream.
    pub residual: Layout,
    /// The layout between `enter` and `leave`.
    pub inner: Layout,
    /// What each rank sends in the stage, by formula: to arrange, to enter, to attend and to leave.
    pub sends: Vec<Elements>,
    /// In a mixture: which of its strategies runs the stage.
    pub delegate: usize,
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
        let stages: Elements = self.stages.iter().map(|stage| stage.sends[rank]).sum();
        stages + self.output_sends[rank]
    }
}

/// What a parameter is for, where that decides which part of it a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Norms, tables, embeddings, biases added after a reduction: every rank needs all of it.
    Replicated,
    /// The output features of a projection into heads or into an inner width, along `dim`: `fused`
    /// projections end to end, each in `units` of equal size (its heads, or its features).
    Columns {
        /// The dim of the parameter.
        dim: usize,
        /// How many projections are fused (3 for a query-key-value projection).
        fused: usize,
        /// The units that must not be cut.
        units: usize,
    },
    /// The input features of the projection back, along `dim`, in `units` of equal size.
    Rows {
        /// The dim of the parameter.
        dim: usize,
        /// The units that must not be cut.
        units: usize,
    },
}

impl Role {
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
    /// What it is for.
    pub role: Role,
    /// Its whole shape.
    pub shape: &'a [usize],
    /// The plan of the stage that it belongs to.
    pub stage: Option<&'a StagePlan>,
}

/// Which part of a parameter a rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// All of it: its gradient is the sum over the ranks.
    Replicated,
    /// The given ranges of one dim: its gradient is whole already.
    Sharded {
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
    fn name(&self) -> &'static str;

    /// Plans a model for a group of `ranks`.
    ///
    /// # Errors
    /// [`PlanError`] with the numbers and the rule if the strategy cannot run the model.
    fn plan(&self, model: &ModelShape, ranks: usize) -> Result<Plan, PlanError>;

    /// Which part of a parameter `rank` holds. By default all of it.
    fn placement(&self, parameter: &Parameter<'_>, rank: usize, ranks: usize) -> Placement {
        let _ = (parameter, rank, ranks);
        Placement::Replicated
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
    /// - `qkv`: `[B, s1, s2, s3, heads·d]` each; how many heads is read from the shapes
    /// - returns: laid out as the query
    ///
    /// # Errors
    /// [`Error`] if an attended axis is split and the strategy did not bring it together, or the ranks fail.
    fn attend(&self, qkv: [Shard; 3], scope: &AttentionScope<'_>) -> Result<Attended, Error> {
        attention::attend_local(qkv, scope.attention, scope.logsumexp)
    }

    /// Brings the sub-layer's output back into the residual stream's layout, and adds its bias: once, after
    /// any reduction.
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

/// Refuses a stage's heads that do not form groups, and linear attention for a strategy that knows softmax
/// only: what every softmax strategy's plan begins with.
///
/// # Errors
/// [`PlanError::HeadGroups`], [`PlanError::Form`], [`PlanError::Axes`].
pub fn check_softmax(strategy: &'static str, model: &ModelShape) -> Result<(), PlanError> {
    model.lengths()?;
    for stage in &model.stages {
        let heads = match &stage.kind {
            StageKind::Attention(attention) => {
                if attention.form != Form::Softmax {
                    return Err(PlanError::Form {
                        strategy,
                        stage: stage.name.clone(),
                        rule: "it computes softmax attention, and this one is linear",
                    });
                }
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
    /// Whether the logsumexp is wanted too.
    pub logsumexp: Logsumexp,
}

/// A loss, and on how many ranks it was computed.
///
/// What is differentiated is the sum over the ranks of their losses, so each term must count once.
#[derive(Debug, Clone)]
pub enum Loss {
    /// The loss of this rank's own part: its terms over the *global* count of terms. The ranks' losses add up
    /// to the whole.
    OfShard(Tensor<1>),
    /// The loss of everything, computed alike on every rank, as after [`Session::gather`].
    OfWhole(Tensor<1>),
}

/// A model's run under a strategy, on one rank.
#[derive(Debug, Clone)]
pub struct Session {
    strategy: Arc<dyn SequenceParallel>,
    group: Group,
    model: Arc<ModelShape>,
    plan: Arc<Plan>,
}

impl Session {
    /// Plans `model` for the group. Nothing is sent.
    ///
    /// # Errors
    /// [`PlanError`] if the strategy cannot run the model on this many ranks.
    pub fn new(
        strategy: Arc<dyn SequenceParallel>,
        group: Group,
        model: ModelShape,
    ) -> Result<Self, PlanError> {
        let plan = strategy.plan(&model, group.size())?;
        debug_assert_eq!(plan.stages.len(), model.stages.len());
        Ok(Self {
            strategy,
            group,
            model: Arc::new(model),
            plan: Arc::new(plan),
        })
    }

    /// The ranks.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// The strategy's plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What the model declared.
    pub fn model(&self) -> &ModelShape {
        &self.model
    }

    /// This rank's part of a module: replicated parameters are shared, sharded ones cut, and each becomes a
    /// leaf of this rank's own autodiff graph, which no other rank's touches.
    ///
    /// `roles` gives the [`Role`] of the parameter at a path such as `blocks.0.attn.qkv.weight`, or the
    /// [`Part`] with its stage.
    pub fn place<M: Module, P: Into<Part>>(
        &self,
        module: &M,
        roles: impl Fn(&str) -> P,
        device: &Device,
    ) -> Placed<M> {
        let placement = |path: &str, shape: &[usize]| {
            let Part { role, stage } = roles(path).into();
            let parameter = Parameter {
                role,
                shape,
                stage: stage.and_then(|stage| self.plan.stages.get(stage)),
            };
            let (rank, ranks) = (self.group.rank(), self.group.size());
            self.strategy.placement(&parameter, rank, ranks)
        };
        place::place(module, placement, device)
    }

    /// This rank's part of an input that every rank holds whole.
    ///
    /// # Errors
    /// [`LayoutError`] if the tensor's lengths are not those that the model declared.
    pub fn split(&self, whole: Tensor<DIMS>) -> Result<Shard, LayoutError> {
        Shard::split(whole, &self.plan.input, self.group.rank())
    }

    /// Begins a forward pass.
    pub fn stages(&self) -> Stages<'_> {
        Stages {
            session: self,
            next: 0,
        }
    }

    /// Gathers a shard: every rank gets the whole tensor.
    ///
    /// A loss of it is a [`Loss::OfWhole`].
    ///
    /// # Errors
    /// [`Error`] if the ranks fail.
    pub fn gather(&self, x: Shard) -> Result<Tensor<DIMS>, Error> {
        let whole = Layout::whole(x.layout().lengths());
        Ok(relayout(x, &whole, &self.group)?.into_tensor())
    }

    /// Runs the backward pass. Every rank must call it.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails in it: unlike [`Tensor::backward`], which unwinds.
    pub fn backward(&self, loss: Loss) -> Result<Gradients, CommError> {
        let loss = match loss {
            Loss::OfShard(loss) => loss,
            // Not `div_scalar`: Burn's backward of it rounds the factor to f32.
            Loss::OfWhole(loss) => loss.mul_scalar(1.0 / self.group.size() as f64),
        };
        let run = std::panic::AssertUnwindSafe(|| loss.backward());
        match std::panic::catch_unwind(run) {
            Ok(gradients) => Ok(gradients),
            Err(payload) => match payload.downcast::<CommError>() {
                Ok(error) => Err(*error),
                Err(payload) => std::panic::resume_unwind(payload),
            },
        }
    }

    /// The module's gradients, those of replicated parameters summed over the ranks in one bucket.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn reduce<M: Module>(
        &self,
        gradients: &mut Gradients,
        module: &Placed<M>,
    ) -> Result<GradientsParams, CommError> {
        gradients::reduce(gradients, module, &self.group)
    }

    /// What this rank sends in one forward and backward pass, by formula.
    pub fn expected_sends(&self) -> Elements {
        self.plan.sends(self.group.rank())
    }

    /// What this rank sends to gather an output of `channels` channels, by formula.
    pub fn expected_gather(&self, batch: usize, channels: usize) -> Elements {
        let layout = &self.plan.output;
        let (rank, ranks) = (self.group.rank(), self.group.size());
        let own = layout.local_lengths(rank).iter().product::<usize>();
        let all = layout.lengths().iter().product::<usize>();
        if layout.split_axes().iter().next().is_none() {
            return Elements::default();
        }
        let unit = batch * channels;
        Elements::both(
            (unit * (ranks - 1) * own) as u64,
            (unit * (all - own)) as u64,
        )
    }

    /// What this rank sends to sum the gradients of `count` replicated parameters, by formula.
    pub fn expected_reduce(&self, count: usize) -> u64 {
        cost::all_reduce(count, self.group.size(), self.group.rank()).forward
    }
}

/// A forward pass under way: hands the model its stages one after the other.
#[derive(Debug)]
pub struct Stages<'a> {
    session: &'a Session,
    next: usize,
}

impl<'a> Stages<'a> {
    fn advance(
        &mut self,
        wanted: &'static str,
        fits: impl Fn(&StageKind) -> bool,
    ) -> Result<StageRun<'a>, StageError> {
        let (index, model) = (self.next, &*self.session.model);
        let Some(stage) = model.stages.get(index) else {
            return Err(StageError::TooMany {
                declared: model.stages.len(),
                wanted,
            });
        };
        if !fits(&stage.kind) {
            return Err(StageError::Kind {
                index,
                name: stage.name.clone(),
                declared: stage.kind.name(),
                wanted,
            });
        }
        self.next += 1;
        Ok(StageRun {
            session: self.session,
            index,
        })
    }

    /// The next stage, a self-attention.
    ///
    /// # Errors
    /// [`StageError`] if the model declared something else.
    pub fn attention(&mut self) -> Result<StageRun<'a>, StageError> {
        self.advance("self-attention", |kind| {
            matches!(kind, StageKind::Attention(_))
        })
    }

    /// The next stage, a cross-attention.
    ///
    /// # Errors
    /// [`StageError`] if the model declared something else.
    pub fn cross_attention(&mut self) -> Result<StageRun<'a>, StageError> {
        self.advance("cross-attention", |kind| {
            matches!(kind, StageKind::CrossAttention { .. })
        })
    }

    /// The next stage, a feed-forward.
    ///
    /// # Errors
    /// [`StageError`] if the model declared something else.
    pub fn feed_forward(&mut self) -> Result<StageRun<'a>, StageError> {
        self.advance("feed-forward", |kind| {
            matches!(kind, StageKind::FeedForward { .. })
        })
    }

    /// Ends the forward pass: the last stage's residual stream in the output's layout.
    ///
    /// # Errors
    /// [`StageError::TooFew`] if stages are left, [`Error`] if the ranks fail.
    pub fn finish(self, x: Shard) -> Result<Shard, Error> {
        let declared = self.session.model.stages.len();
        if self.next != declared {
            return Err(StageError::TooFew {
                run: self.next,
                declared,
            }
            .into());
        }
        relayout(x, &self.session.plan.output, &self.session.group)
    }
}

/// One stage of a forward pass under way: the verbs, checked and traced.
#[derive(Debug, Clone, Copy)]
pub struct StageRun<'a> {
    session: &'a Session,
    index: usize,
}

impl<'a> StageRun<'a> {
    fn scope(&self) -> Scope<'a> {
        Scope {
            group: &self.session.group,
            stage: &self.session.model.stages[self.index],
            plan: &self.session.plan.stages[self.index],
        }
    }

    fn expect(place: &'static str, expected: &Layout, x: Shard) -> Result<Shard, LayoutError> {
        if x.layout() == expected {
            return Ok(x);
        }
        Err(LayoutError::Unexpected {
            place,
            expected: Box::new(expected.clone()),
            got: Box::new(x.layout().clone()),
        })
    }

    /// [`SequenceParallel::arrange`].
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    pub fn arrange(&self, x: Shard) -> Result<Shard, Error> {
        let scope = self.scope();
        let _span = tracing::info_span!("arrange", stage = %scope.stage.name).entered();
        let x = self.session.strategy.arrange(x, &scope)?;
        Ok(Self::expect("arrange", &scope.plan.residual, x)?)
    }

    /// [`SequenceParallel::enter`].
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    pub fn enter(&self, x: Shard) -> Result<Shard, Error> {
        let scope = self.scope();
        let _span = tracing::info_span!("enter", stage = %scope.stage.name).entered();
        let x = Self::expect("enter", &scope.plan.residual, x)?;
        let x = self.session.strategy.enter(x, &scope)?;
        Ok(Self::expect("enter", &scope.plan.inner, x)?)
    }

    /// [`SequenceParallel::attend`]: the output alone.
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the shapes do not fit.
    pub fn attend(&self, query: Shard, key: Shard, value: Shard) -> Result<Shard, Error> {
        Ok(self
            .attend_with([query, key, value], Logsumexp::Unwanted)?
            .output)
    }

    /// [`SequenceParallel::attend`].
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the shapes do not fit; [`StageError::Kind`] if the stage is no
    /// self-attention.
    pub fn attend_with(&self, qkv: [Shard; 3], logsumexp: Logsumexp) -> Result<Attended, Error> {
        let scope = self.scope();
        let _span = tracing::info_span!("attend", stage = %scope.stage.name).entered();
        let StageKind::Attention(attention) = &scope.stage.kind else {
            return Err(StageError::Kind {
                index: self.index,
                name: scope.stage.name.clone(),
                declared: scope.stage.kind.name(),
                wanted: "self-attention",
            }
            .into());
        };
        attention::check_heads(&qkv, attention.heads)?;
        self.session.strategy.attend(
            qkv,
            &AttentionScope {
                scope,
                attention,
                logsumexp,
            },
        )
    }

    /// [`SequenceParallel::leave`].
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    pub fn leave(&self, x: Shard, bias: Option<Tensor<1>>) -> Result<Shard, Error> {
        let scope = self.scope();
        let _span = tracing::info_span!("leave", stage = %scope.stage.name).entered();
        let x = self.session.strategy.leave(x, bias, &scope)?;
        Ok(Self::expect("leave", &scope.plan.residual, x)?)
    }

    /// [`leave`](Self::leave) through a sub-layer's last projection, whose bias is added once, after any
    /// reduction.
    ///
    /// # Errors
    /// As [`leave`](Self::leave).
    pub fn project(&self, x: Shard, projection: &Linear) -> Result<Shard, Error> {
        let x = x.map(|x| project_without_bias(x, projection))?;
        self.leave(x, projection.bias.as_ref().map(Param::val))
    }
}
