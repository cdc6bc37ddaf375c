//! A model's run under a strategy, on one rank: [`Session`] walks it through the plan, stage by stage.
//!
//! What a verb returns is held against the plan, and what it takes too, but for `arrange`, which may be given any layout:
//! a forgotten switch is an error that names the axis and never a wrong number. Each verb is a span of the trace.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::Module;
use burn::nn::Linear;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Gradients, Tensor};

use crate::attention::{self, Attended, Dropout, HeadRange, Heads, Logsumexp};
use crate::blocks::DIMS;
use crate::collective::{Path, all_reduce_in, relayout};
use crate::cost::{self, Elements};
use crate::ending::{self, Ending};
use crate::error::{CommError, Error};
use crate::fused::gated_sum;
use crate::gradients;
use crate::group::Group;
use crate::layout::{Layout, LayoutError, Shard, Value};
use crate::ledger::Phase;
use crate::linear::affine;
use crate::place::{self, Placed};
use crate::strategy::{
    AttentionScope, AttentionStage, ModelShape, Parameter, Part, Plan, PlanError, Role, Scope,
    SequenceParallel, StageKind,
};
use crate::watch::Lookout;
pub use crate::watch::Watch;

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
    /// A strategy that sums the ranks' terms, and a sub-layer of which every rank holds all.
    #[error(
        "stage {index} ({name:?}) is to give each rank's terms of a sum, but no parameter of it was placed with \
         the role of rows: give Session::place the roles of its projections, in this stage"
    )]
    Unsharded {
        /// The stage's position.
        index: usize,
        /// Its name.
        name: String,
    },
    /// A sub-layer's last projection, and what comes to it, of different widths.
    #[error(
        "stage {index} ({name:?}) ends with a projection of {inputs} input features on this rank, and {given} come to it: \
         give Session::place the role of columns for what leads to them and of rows for this one, in the same units and \
         in this stage"
    )]
    Width {
        /// The stage's position.
        index: usize,
        /// Its name.
        name: String,
        /// The input features of the projection that the rank holds.
        inputs: usize,
        /// The features that it was given.
        given: usize,
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
    replicas: Option<Group>,
    model: Arc<ModelShape>,
    plan: Arc<Plan>,
    /// The stages of which a parameter was placed with the role of rows.
    sharded: Arc<Mutex<BTreeSet<usize>>>,
    watch: Watch,
    /// In how many parts a switch goes that follows a sub-layer's end.
    switch_parts: NonZeroUsize,
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
            replicas: None,
            model: Arc::new(model),
            plan: Arc::new(plan),
            sharded: Arc::default(),
            watch: Watch::Nothing,
            switch_parts: NonZeroUsize::MIN,
        })
    }

    /// The same session, which looks for more on the way.
    #[must_use]
    pub fn watching(self, watch: Watch) -> Self {
        Self { watch, ..self }
    }

    /// The same session, in which an all-to-all of the residual stream that follows a sub-layer's end
    /// ([`StageRun::end`]) goes in this many parts of the channels, each on its way while the next is computed: see
    /// [`crate::ending`]. In one part, as it is by default, it goes as a whole and nothing is computed meanwhile. A
    /// session that [watches](Self::watching) looks at what is sent first, and sends it as a whole.
    ///
    /// All ranks must say the same. It pays where the network is slower than memory.
    #[must_use]
    pub fn switching_in(self, switch_parts: NonZeroUsize) -> Self {
        Self {
            switch_parts,
            ..self
        }
    }

    /// The same session, one of several that train one model on different data: `replicas` are the ranks that
    /// hold this rank's part in each of them. [`reduce`](Self::reduce) then sums over them too, so each loss's
    /// terms are over the global count of terms, that of all replicas.
    ///
    /// On a mesh of `ranks × replicas`: `world.along(MeshAxis { stride: 1, size: ranks })` is the group,
    /// `world.along(MeshAxis { stride: ranks, size: replicas })` these.
    #[must_use]
    pub fn with_replicas(mut self, replicas: Group) -> Self {
        self.replicas = Some(replicas);
        self
    }

    /// The same session for another number of samples: a last, smaller part of a batch. Modules that this one
    /// placed serve it too.
    ///
    /// # Errors
    /// [`PlanError`] if the strategy cannot run as many.
    pub fn with_batch(&self, batch: usize) -> Result<Self, PlanError> {
        let model = ModelShape {
            batch,
            ..(*self.model).clone()
        };
        let plan = self.strategy.plan(&model, self.group.size())?;
        Ok(Self {
            model: Arc::new(model),
            plan: Arc::new(plan),
            ..self.clone()
        })
    }

    /// The ranks that hold this rank's part in other replicas, if there are any.
    pub fn replicas(&self) -> Option<&Group> {
        self.replicas.as_ref()
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

    /// This rank's part of a module: replicated parameters are whole, sharded ones cut, and each becomes a
    /// leaf of this rank's own autodiff graph, which no other rank's touches.
    ///
    /// `roles` gives the [`Role`] of the parameter at a path such as `blocks.0.attn.qkv.weight`, or the
    /// [`Part`] with its stage.
    ///
    /// # Panics
    /// If a parameter's shape does not fit its role: see [`Role::check`]. If the module holds a parameter in two places:
    /// see [`place`](place::place).
    pub fn place<M: Module, P: Into<Part>>(
        &self,
        module: &M,
        roles: impl Fn(&str) -> P,
        device: &Device,
    ) -> Placed<M> {
        let ranks = self.group.size();
        let placements = |path: &str, shape: &[usize]| {
            let Part { role, stage } = roles(path).into();
            if let Err(error) = role.check(path, shape) {
                panic!("{error}");
            }
            if let (Role::Rows { .. }, Some(stage)) = (role, stage) {
                self.sharded().insert(stage);
            }
            let parameter = Parameter {
                role,
                shape,
                plan: &self.plan,
                stage: stage.and_then(|stage| self.plan.stages.get(stage)),
            };
            let placement = |rank| self.strategy.placement(&parameter, rank, ranks);
            (0..ranks).map(placement).collect()
        };
        place::place(module, placements, self.group.rank(), device)
    }

    fn lookout<'a>(&'a self, stage: &'a str, verb: &'static str) -> Lookout<'a> {
        Lookout {
            watch: self.watch,
            group: &self.group,
            stage,
            verb,
        }
    }

    fn sharded(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.sharded.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// The module's gradients: those of replicated parameters summed over the ranks in one bucket, and then all
    /// of them over the replicas, if there are any.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn reduce<M: Module>(
        &self,
        gradients: &mut Gradients,
        module: &Placed<M>,
    ) -> Result<GradientsParams, CommError> {
        self.reduce_collected(
            GradientsParams::from_module(gradients, &module.module),
            module,
        )
    }

    /// [`reduce`](Self::reduce) of gradients that were taken out of their backward passes already: those of several
    /// parts of a batch, added up, so that they are sent once.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn reduce_collected<M: Module>(
        &self,
        mut gradients: GradientsParams,
        module: &Placed<M>,
    ) -> Result<GradientsParams, CommError> {
        gradients::reduce(&mut gradients, module, &self.group)?;
        if let Some(replicas) = &self.replicas {
            gradients::sum(&mut gradients, module, replicas)?;
        }
        Ok(gradients)
    }

    /// The norm of all of the model's reduced gradients, the same on every rank: what is held against a limit
    /// before a step. A parameter counts once, wherever it is held.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn gradient_norm<M: Module>(
        &self,
        gradients: &GradientsParams,
        module: &Placed<M>,
    ) -> Result<f64, CommError> {
        gradients::norm(gradients, module, &self.group)
    }

    /// The sum of a number over all ranks, those of the replicas included; outside of any pass.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn sum_over_ranks(&self, own: Tensor<1>) -> Result<Tensor<1>, CommError> {
        let sum = all_reduce_in(own.inner(), Phase::Outside, &self.group)?;
        match &self.replicas {
            Some(replicas) => all_reduce_in(sum, Phase::Outside, replicas),
            None => Ok(sum),
        }
    }

    /// Gradients in the parameters' whole shapes, for those who compare or write them: the parts of sharded ones
    /// are gathered.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn whole<M: Module>(
        &self,
        gradients: GradientsParams,
        module: &Placed<M>,
    ) -> Result<GradientsParams, CommError> {
        gradients::whole(gradients, module, &self.group)
    }

    /// The whole module, on every rank and outside of any graph: for those who compare or write it.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn whole_module<M: Module>(&self, module: &Placed<M>) -> Result<M, CommError> {
        place::whole(module, &self.group)
    }

    /// What this rank sends in one forward and backward pass, by formula.
    pub fn expected_sends(&self) -> Elements {
        self.plan.sends(self.group.rank())
    }

    /// What this rank sends to gather an output of `channels` channels, by formula.
    pub fn expected_gather(&self, batch: usize, channels: usize) -> Elements {
        let layout = &self.plan.output;
        if layout.split_axis().is_none() {
            return Elements::default();
        }
        let positions = |lengths: [usize; 3]| batch * channels * lengths.iter().product::<usize>();
        let own = positions(layout.local_lengths(self.group.rank()));
        cost::gather(own, positions(layout.lengths()), self.group.size())
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
        let Session { model, plan, .. } = self.session;
        let last = model.stages.last().map_or("output", |stage| &stage.name);
        let lookout = self.session.lookout(last, "finish");
        lookout.takes(&x)?;
        lookout.gives(relayout(x, &plan.output, &self.session.group)?)
    }
}

/// What [`StageRun::attend_with`] is asked beside the output. By default nothing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Attend {
    /// Whether the logsumexp is wanted too.
    pub logsumexp: Logsumexp,
    /// Which of the attention's probabilities are dropped, if any. Every rank must give the same: what is
    /// drawn for a pair of a query and a key is then the same under every strategy.
    pub dropout: Option<Dropout>,
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

    /// A look at what a verb takes, and back.
    fn lookout(&self, verb: &'static str) -> Lookout<'a> {
        self.session.lookout(&self.scope().stage.name, verb)
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
        let lookout = self.lookout("arrange");
        lookout.takes(&x)?;
        let x = self.session.strategy.arrange(x, &scope)?;
        lookout.gives(Self::expect("arrange", &scope.plan.residual, x)?)
    }

    /// [`SequenceParallel::enter`].
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    pub fn enter(&self, x: Shard) -> Result<Shard, Error> {
        let scope = self.scope();
        let _span = tracing::info_span!("enter", stage = %scope.stage.name).entered();
        let lookout = self.lookout("enter");
        lookout.takes(&x)?;
        let x = Self::expect("enter", &scope.plan.residual, x)?;
        let x = self.session.strategy.enter(x, &scope)?;
        lookout.gives(Self::expect("enter", &scope.plan.inner, x)?)
    }

    /// [`SequenceParallel::attend`]: the output alone.
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the shapes do not fit.
    pub fn attend(&self, query: Shard, key: Shard, value: Shard) -> Result<Shard, Error> {
        Ok(self
            .attend_with([query, key, value], Attend::default())?
            .output)
    }

    /// [`SequenceParallel::attend`].
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the shapes or layouts do not fit; [`StageError::Kind`] if the stage is no
    /// self-attention; [`Error::LinearDropout`] for dropout of a linear attention.
    pub fn attend_with(&self, qkv: [Shard; 3], options: Attend) -> Result<Attended, Error> {
        let Attend { logsumexp, dropout } = options;
        // What drops nothing asks for no draws, and is no dropout for a linear attention to refuse.
        let dropout = dropout.filter(|dropout| dropout.probability() > 0.0);
        let scope = self.scope();
        let _span = tracing::info_span!("attend", stage = %scope.stage.name).entered();
        let attention = self.self_attention()?;
        let inner = &scope.plan.inner;
        let laid_out = |x| Self::expect("attend", inner, x);
        // Keys of another length than the queries are not planned: the strategy sees whether it takes them.
        let of_keys = |x: Shard| match x.layout().lengths() == inner.lengths() {
            true => laid_out(x),
            false => Ok(x),
        };
        let [query, key, value] = qkv;
        let qkv = [laid_out(query)?, of_keys(key)?, of_keys(value)?];
        let heads = self.held_heads(attention.heads);
        let channels = qkv.each_ref().map(|x| x.tensor().dims()[4]);
        attention::check_heads(channels, &heads, attention.heads.dim)?;
        attention::check_dropout(&attention.form, dropout)?;
        let lookout = self.lookout("attend");
        qkv.iter().try_for_each(|x| lookout.takes(x))?;
        let attended = self.session.strategy.attend(
            qkv,
            &AttentionScope {
                scope,
                attention,
                heads: &heads,
                logsumexp,
                dropout,
            },
        )?;
        Ok(Attended {
            output: lookout.gives(laid_out(attended.output)?)?,
            logsumexp: attended.logsumexp.map(laid_out).transpose()?,
        })
    }

    /// [`SequenceParallel::join`]: how a sub-layer goes on that was declared to need all heads
    /// ([`Closing::AllHeads`](crate::strategy::Closing)).
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    pub fn join(&self, x: Shard) -> Result<Shard, Error> {
        let scope = self.scope();
        let _span = tracing::info_span!("join", stage = %scope.stage.name).entered();
        let attention = self.self_attention()?;
        let heads = self.held_heads(attention.heads);
        let lookout = self.lookout("join");
        lookout.takes(&x)?;
        let x = Self::expect("join", &scope.plan.inner, x)?;
        let x = self.session.strategy.join(
            x,
            &AttentionScope {
                scope,
                attention,
                heads: &heads,
                logsumexp: Logsumexp::Unwanted,
                dropout: None,
            },
        )?;
        lookout.gives(Self::expect("join", &scope.plan.residual, x)?)
    }

    fn self_attention(&self) -> Result<&'a AttentionStage, StageError> {
        let stage = self.scope().stage;
        match &stage.kind {
            StageKind::Attention(attention) => Ok(attention),
            kind => Err(StageError::Kind {
                index: self.index,
                name: stage.name.clone(),
                declared: kind.name(),
                wanted: "self-attention",
            }),
        }
    }

    /// The cross-attention to keys and values that every rank holds: [`attention::cross_attention`].
    ///
    /// # Errors
    /// [`Error`] if the shapes or layouts do not fit, [`StageError::Kind`] if the stage is no cross-attention.
    pub fn cross_attend(
        &self,
        query: Shard,
        key: Tensor<3>,
        value: Tensor<3>,
        lengths: Arc<[usize]>,
    ) -> Result<Shard, Error> {
        let scope = self.scope();
        let _span = tracing::info_span!("attend", stage = %scope.stage.name).entered();
        let StageKind::CrossAttention { heads } = scope.stage.kind else {
            return Err(StageError::Kind {
                index: self.index,
                name: scope.stage.name.clone(),
                declared: scope.stage.kind.name(),
                wanted: "cross-attention",
            }
            .into());
        };
        let query = Self::expect("cross_attend", &scope.plan.inner, query)?;
        let held = self.held_heads(heads);
        attention::cross_attention(query, key, value, (&held, heads.dim), lengths)
    }

    fn held_heads(&self, heads: Heads) -> HeadRange {
        let (rank, ranks) = (self.session.group.rank(), self.session.group.size());
        let plan = &self.session.plan.stages[self.index];
        self.session.strategy.held_heads(heads, plan, rank, ranks)
    }

    /// [`SequenceParallel::leave`].
    ///
    /// # Errors
    /// [`Error`] if the ranks fail or the layouts do not fit.
    pub fn leave(&self, x: Shard, bias: Option<Tensor<1>>) -> Result<Shard, Error> {
        let scope = self.scope();
        let _span = tracing::info_span!("leave", stage = %scope.stage.name).entered();
        self.check_sharded()?;
        let lookout = self.lookout("leave");
        lookout.takes(&x)?;
        let x = Self::expect("leave", &scope.plan.inner, x)?;
        let x = self.session.strategy.leave(x, bias, &scope)?;
        lookout.gives(Self::expect("leave", &scope.plan.residual, x)?)
    }

    /// [`leave`](Self::leave) through a sub-layer's last projection, whose bias is added once, after any
    /// reduction.
    ///
    /// # Errors
    /// As [`leave`](Self::leave).
    pub fn project(&self, x: Shard, projection: &Linear) -> Result<Shard, Error> {
        let Ending { weight, bias, .. } = Ending::of(projection);
        self.leave_through(x, weight, bias)
    }

    fn leave_through(
        &self,
        x: Shard,
        weight: Tensor<2>,
        bias: Option<Tensor<1>>,
    ) -> Result<Shard, Error> {
        self.check_sharded()?;
        let x = self.fitting("leave", x, &weight)?;
        let x = x.map(|x| affine(x, weight, None))?;
        self.leave(x, bias)
    }

    /// Holds a sub-layer of which each rank is to give its terms to the roles of its parameters.
    fn check_sharded(&self) -> Result<(), StageError> {
        let scope = self.scope();
        if scope.plan.value == Value::Complete || self.session.sharded().contains(&self.index) {
            return Ok(());
        }
        Err(StageError::Unsharded {
            index: self.index,
            name: scope.stage.name.clone(),
        })
    }

    /// What comes to a sub-layer's last projection, which takes its channels.
    fn fitting(&self, place: &'static str, x: Shard, weight: &Tensor<2>) -> Result<Shard, Error> {
        let scope = self.scope();
        let x = Self::expect(place, &scope.plan.inner, x)?;
        let ([inputs, _], [.., given]) = (weight.dims(), x.tensor().dims());
        if inputs != given {
            return Err(StageError::Width {
                index: self.index,
                name: scope.stage.name.clone(),
                inputs,
                given,
            }
            .into());
        }
        Ok(x)
    }

    /// Ends a sub-layer: `x + gate·(h·W + b)`, the bias added once, after any reduction. `x` is the residual stream
    /// as [`arrange`](Self::arrange) gave it, `h` what the sub-layer's last projection takes.
    ///
    /// # Shapes
    /// - `x`: `[B, …, C]`; `h`: `[B, …, in]` laid out as [`StagePlan::inner`](crate::strategy::StagePlan)
    /// - returns: `[B, …, C]`, where this stage has the residual stream, or already where the next one does if the
    ///   session [switches in parts](Session::switching_in)
    ///
    /// # Errors
    /// As [`leave`](Self::leave).
    pub fn end(&self, x: Shard, h: Shard, ending: Ending) -> Result<Shard, Error> {
        let scope = self.scope();
        if let Some(to) = self.switch_in_parts() {
            let _span = tracing::info_span!("end", stage = %scope.stage.name).entered();
            let x = Self::expect("end", &scope.plan.residual, x)?;
            let h = self.fitting("end", h, &ending.weight)?;
            return ending::switched(x, h, ending, to, self.session.switch_parts, scope.group);
        }
        let Ending { weight, bias, gate } = ending;
        let h = self.leave_through(h, weight, bias)?;
        match gate {
            Some(gate) => Ok(x.map(|x| gated_sum(x, gate, h.into_tensor()))?),
            None => Ok(x.plus(h)?),
        }
    }

    /// Where the residual stream goes next, if it goes there in parts: by an all-to-all, from a stage whose activations
    /// are complete where the residual stream is.
    fn switch_in_parts(&self) -> Option<&'a Layout> {
        let Session {
            plan, switch_parts, ..
        } = self.session;
        let stage = &plan.stages[self.index];
        let next = plan.stages.get(self.index + 1);
        let to = next.map_or(&plan.output, |next| &next.residual);
        let in_place = stage.value == Value::Complete && stage.inner == stage.residual;
        let path = || Path::between(&stage.residual, to, self.session.group.size());
        let wanted = switch_parts.get() > 1 && self.session.watch == Watch::Nothing;
        (wanted && in_place && stage.residual != *to && path() == Ok(Path::AllToAll)).then_some(to)
    }
}
