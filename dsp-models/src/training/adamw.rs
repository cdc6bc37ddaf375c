//! AdamW (Loshchilov and Hutter, arXiv:1711.05101) over the parts of a module that a rank holds.
//!
//! The arithmetic is Burn's, one parameter at a time. What is ours is how states are held: by the parameters'
//! paths, and given out as modules of the same form, so that moments are gathered, cut and written like weights.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{
    AdamW as Arithmetic, AdamWConfig, AdamWState, AdaptiveMomentumState, GradientsParams, Optimizer,
};
use burn::tensor::Tensor;
use dsp_core::Placed;
use dsp_core::shape::reshape;

use super::config::{Decayed, TrainingConfig};

/// The optimizer of a rank's part of a module.
#[derive(Clone)]
pub struct AdamW {
    decaying: Arithmetic,
    still: Arithmetic,
    decayed: Decayed,
    /// By path, flat: AdamW knows no shapes.
    states: BTreeMap<String, AdamWState<1>>,
}

/// Debug by hand: Burn's optimizer has none.
impl std::fmt::Debug for AdamW {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdamW")
            .field("decayed", &self.decayed)
            .field("states", &self.states.len())
            .finish_non_exhaustive()
    }
}

/// The moments of all of a module's parameters, as modules of its form.
#[derive(Debug, Clone)]
pub struct Moments<M> {
    /// The means of the gradients.
    pub first: M,
    /// The means of their squares.
    pub second: M,
}

impl AdamW {
    /// One without moments, before the first step.
    pub fn new(config: &TrainingConfig) -> Self {
        let arithmetic = |weight_decay: f64| {
            AdamWConfig::new()
                .with_beta_1(config.beta_1 as f32)
                .with_beta_2(config.beta_2 as f32)
                .with_epsilon(config.epsilon as f32)
                .with_weight_decay(weight_decay as f32)
                .build()
        };
        Self {
            decaying: arithmetic(config.weight_decay),
            still: arithmetic(0.0),
            decayed: config.decayed,
            states: BTreeMap::new(),
        }
    }

    /// One that goes on with moments that are cut as the module is, after `steps` steps.
    pub fn with_moments<M: Module>(
        config: &TrainingConfig,
        moments: &Moments<Placed<M>>,
        steps: u64,
    ) -> Self {
        let first = flat_parameters(&moments.first.module);
        let mut second = flat_parameters(&moments.second.module);
        let states = first.into_iter().filter_map(|(path, first)| {
            let second = second.remove(&path)?;
            let state = AdaptiveMomentumState::new(steps as usize, first, second);
            Some((path, AdamWState::new(state)))
        });
        Self {
            states: states.collect(),
            ..Self::new(config)
        }
    }

    /// A step: the module with changed parameters.
    ///
    /// `scale` is what each gradient is multiplied by first. A parameter without a gradient has one of zeros.
    pub fn step<M: Module>(
        &mut self,
        module: M,
        gradients: &mut GradientsParams,
        rate: f64,
        scale: f64,
    ) -> M {
        module.map(&mut Step {
            optimizer: self,
            gradients,
            rate,
            scale,
            path: Vec::new(),
        })
    }

    /// Whether all moments that this rank holds are.
    pub(super) fn is_finite(&self) -> bool {
        self.states.values().all(|state| {
            let moments = &state.momentum;
            is_finite(moments.moment_1.clone()) && is_finite(moments.moment_2.clone())
        })
    }

    /// The moments, cut as the module is; zeros before the first step.
    pub fn moments<M: Module>(&self, placed: &Placed<M>) -> Moments<Placed<M>> {
        let of = |moment: fn(&AdamWState<1>) -> &Tensor<1>| {
            let module = placed.module.valid().map(&mut Fill {
                states: &self.states,
                moment,
                path: Vec::new(),
            });
            placed.with_module(module)
        };
        Moments {
            first: of(|state| &state.momentum.moment_1),
            second: of(|state| &state.momentum.moment_2),
        }
    }
}

struct Step<'a> {
    optimizer: &'a mut AdamW,
    gradients: &'a mut GradientsParams,
    rate: f64,
    scale: f64,
    path: Vec<String>,
}

impl ModuleMapper for Step<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        let gradient = self.gradients.remove::<D>(param.id);
        let path = self.path.join(".");
        let state = self.optimizer.states.remove(&path);
        let arithmetic = match self.optimizer.decayed {
            Decayed::Matrices if D < 2 => &self.optimizer.still,
            Decayed::All | Decayed::Matrices => &self.optimizer.decaying,
        };
        let (rate, scale) = (self.rate, self.scale);
        let mut next = None;
        let param = param.map(|tensor| {
            let (dims, recompute) = (tensor.dims(), tensor.gradient_checkpointing_strategy());
            let value = tensor.inner();
            let gradient = gradient.unwrap_or_else(|| value.zeros_like());
            let flat = [value.shape().num_elements()];
            // A part of no elements has nothing to learn.
            if flat == [0] {
                return restore(value, recompute);
            }
            let gradient = match scale {
                1.0 => gradient,
                scale => gradient.mul_scalar(scale),
            };
            let (value, state) =
                arithmetic.step(rate, reshape(value, flat), reshape(gradient, flat), state);
            next = state;
            restore(reshape(value, dims), recompute)
        });
        if let Some(state) = next {
            self.optimizer.states.insert(path, state);
        }
        param
    }
}

/// Whether every number of a tensor is one.
pub(super) fn is_finite<const D: usize>(x: Tensor<D>) -> bool {
    x.shape().num_elements() == 0 || x.is_finite().all().into_scalar::<bool>()
}

/// A parameter again, as it was before its step.
fn restore<const D: usize>(
    value: Tensor<D>,
    recompute: Option<burn::tensor::GradientCheckpointingStrategy>,
) -> Tensor<D> {
    let value = Tensor::from_inner(value);
    match recompute {
        Some(strategy) => value.with_gradient_checkpointing_strategy(strategy),
        None => value,
    }
    .require_grad()
}

struct Fill<'a> {
    states: &'a BTreeMap<String, AdamWState<1>>,
    moment: fn(&AdamWState<1>) -> &Tensor<1>,
    path: Vec<String>,
}

impl ModuleMapper for Fill<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let state = self.states.get(&self.path.join("."));
        param.map(|value| match state {
            Some(state) => reshape((self.moment)(state).clone(), value.dims()),
            None => value.zeros_like(),
        })
    }
}

/// A module's parameters by path, flat and outside of any graph.
fn flat_parameters<M: Module>(module: &M) -> BTreeMap<String, Tensor<1>> {
    struct Collect {
        path: Vec<String>,
        found: BTreeMap<String, Tensor<1>>,
    }
    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.path.push(name.to_owned());
        }

        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val().inner();
            let count = value.shape().num_elements();
            self.found
                .insert(self.path.join("."), reshape(value, [count]));
        }
    }
    let mut collect = Collect {
        path: Vec::new(),
        found: BTreeMap::new(),
    };
    module.visit(&mut collect);
    collect.found
}
