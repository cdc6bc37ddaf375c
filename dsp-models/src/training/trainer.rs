//! A training on one rank: the model's part, the optimizer, the steps that were made.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{DType, Device, Tensor};
use dsp_core::strategy::Part;
use dsp_core::{CommError, Loss, Overlap, Placed, Session};

use super::adamw::{AdamW, Moments, is_finite};
use super::config::{Compute, Reduce, TrainingConfig};
use super::snapshot::Snapshot;

/// A training under way, on one rank.
#[derive(Debug)]
pub struct Trainer<M: Module> {
    model: Placed<M>,
    optimizer: AdamW,
    config: TrainingConfig,
    steps: u64,
    /// From the first step on, if gradients are summed while they are computed.
    overlap: Option<Overlap>,
}

/// What a step was like, the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// The step, counted from 1.
    pub step: u64,
    /// The loss of all of the step's samples before the step.
    pub loss: f64,
    /// The norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// The learning rate.
    pub learning_rate: f64,
}

impl<M: Module> Trainer<M> {
    /// Begins a training of a model's first weights, which every rank must have alike.
    pub fn new<P: Into<Part>>(
        template: &M,
        roles: impl Fn(&str) -> P,
        config: TrainingConfig,
        session: &Session,
        device: &Device,
    ) -> Self {
        Self {
            model: session.place(template, roles, device),
            optimizer: AdamW::new(&config),
            config,
            steps: 0,
            overlap: None,
        }
    }

    /// Goes on with a training that was at a snapshot, on this mesh and under this strategy.
    pub fn resume<P: Into<Part>>(
        snapshot: &Snapshot<M>,
        roles: impl Fn(&str) -> P,
        config: TrainingConfig,
        session: &Session,
        device: &Device,
    ) -> Self {
        let place = |module: &M| session.place(module, &roles, device);
        let moments = Moments {
            first: place(&snapshot.moments.first),
            second: place(&snapshot.moments.second),
        };
        Self {
            model: place(&snapshot.model),
            optimizer: AdamW::with_moments(&config, &moments, snapshot.step),
            config,
            steps: snapshot.step,
            overlap: None,
        }
    }

    /// All that this training is, whole on every rank. Every rank of the session must call it.
    ///
    /// # Cost
    /// An all-gather of each sharded parameter and of its moments.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn snapshot(&self, session: &Session) -> Result<Snapshot<M>, CommError> {
        let moments = self.optimizer.moments(&self.model);
        Ok(Snapshot {
            model: session.whole_module(&self.model)?,
            moments: Moments {
                first: session.whole_module(&moments.first)?,
                second: session.whole_module(&moments.second)?,
            },
            step: self.steps,
        })
    }

    /// Whether every weight and every moment of the optimizer is finite, on all ranks: what is not stays so, step for step.
    /// Every rank of the session and its replicas must call it.
    ///
    /// # Cost
    /// A pass over what this rank holds, and an all-reduce of one number over ranks and replicas.
    ///
    /// # Errors
    /// [`CommError`] if a rank fails.
    pub fn is_finite(&self, session: &Session) -> Result<bool, CommError> {
        let mut weights = Finite {
            all: self.optimizer.is_finite(),
            device: None,
        };
        self.model.module.visit(&mut weights);
        let Some(device) = weights.device else {
            return Ok(true);
        };
        let own = Tensor::from_floats([if weights.all { 0.0 } else { 1.0 }], &device);
        Ok(session.sum_over_ranks(own)?.into_scalar::<f32>() == 0.0)
    }

    /// This rank's part of the model.
    pub fn model(&self) -> &Placed<M> {
        &self.model
    }

    /// How the training goes.
    pub fn config(&self) -> &TrainingConfig {
        &self.config
    }

    /// The steps that were made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// This rank's part of the model as passes compute with it: the weights themselves, or a copy in other floats
    /// whose gradients are theirs.
    pub fn computed(&self) -> M {
        self.in_floats(self.model.module.clone())
    }

    fn in_floats(&self, module: M) -> M {
        match self.config.compute {
            Compute::AsStored => module,
            Compute::Bf16 => module.map(&mut Copied(DType::BF16)),
        }
    }

    /// The groups for [`Reduce::Overlapped`], made once.
    fn overlap(&mut self, session: &Session) -> Result<Option<Overlap>, CommError> {
        if self.config.reduce == Reduce::Overlapped && self.overlap.is_none() {
            self.overlap = Some(Overlap::new(session, Reduce::BUCKET)?);
        }
        Ok(self.overlap.clone())
    }

    /// One step: forward and backward of each part of this replica's samples, the sum over ranks and replicas, the
    /// clipping, the optimizer.
    ///
    /// Each of `parts` gives a loss whose terms are over the *global* count: that of all the step's samples, those
    /// of other parts and of other replicas too. A replica may have more parts than another, at least one each; the
    /// ranks of a replica have the same.
    ///
    /// # Cost
    /// Beside the passes an all-reduce of the gradients over the ranks, one over the replicas, and two of a number;
    /// under [`Reduce::Overlapped`] those of the gradients go bucket by bucket, while the last pass runs.
    ///
    /// # Errors
    /// What a part returns; [`CommError`] if a rank fails.
    pub fn step<E: From<CommError>, F: FnOnce(&M) -> Result<Loss, E>>(
        &mut self,
        session: &Session,
        parts: impl IntoIterator<Item = F>,
    ) -> Result<Report, E> {
        let mut sum = GradientsAccumulator::<M>::new();
        let mut shown: Option<Tensor<1>> = None;
        let mut reduced = None;
        let mut parts = parts.into_iter().peekable();
        while let Some(part) = parts.next() {
            let is_last = parts.peek().is_none();
            let (module, reduction) = match self.overlap(session)?.filter(|_| is_last) {
                Some(overlap) => {
                    let (module, reduction) = overlap.begin(&self.model, sum.grads());
                    (module, Some(reduction))
                }
                None => (self.model.module.clone(), None),
            };
            let loss = part(&self.in_floats(module))?;
            let own = match &loss {
                Loss::OfShard(loss) => loss.clone().inner(),
                // It is there on every rank, and counts once.
                Loss::OfWhole(loss) => {
                    let ranks = session.group().size() as f64;
                    loss.clone().inner().mul_scalar(1.0 / ranks)
                }
            };
            shown = Some(match shown {
                Some(shown) => shown + own,
                None => own,
            });
            let mut gradients = session.backward(loss)?;
            match reduction {
                Some(reduction) => reduced = Some(reduction.finish(&mut gradients, &self.model)?),
                None => {
                    let module = &self.model.module;
                    sum.accumulate(module, GradientsParams::from_module(&mut gradients, module));
                }
            }
        }
        let loss = match shown {
            Some(own) => session.sum_over_ranks(own)?.into_scalar::<f64>(),
            None => 0.0,
        };
        let mut gradients = match reduced {
            Some(reduced) => reduced,
            None => session.reduce_collected(sum.grads(), &self.model)?,
        };
        let gradient_norm = session.gradient_norm(&gradients, &self.model)?;
        let scale = match self.config.clip_norm {
            Some(limit) if gradient_norm > limit => limit / gradient_norm,
            _ => 1.0,
        };
        let learning_rate = self.config.learning_rate_of(self.steps);
        let module = self.model.module.clone();
        let module = (self.optimizer).step(module, &mut gradients, learning_rate, scale);
        self.model = self.model.with_module(module);
        self.steps += 1;
        Ok(Report {
            step: self.steps,
            loss,
            gradient_norm,
            learning_rate,
        })
    }
}

/// Looks at a module's parameters.
struct Finite {
    all: bool,
    device: Option<Device>,
}

impl ModuleVisitor for Finite {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val().inner();
        self.device.get_or_insert_with(|| value.device());
        self.all = self.all && is_finite(value);
    }
}

/// Parameters in other floats, in the graph of those that they are copied from.
struct Copied(DType);

impl ModuleMapper for Copied {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| value.cast(self.0))
    }
}
