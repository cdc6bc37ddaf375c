//! A rank's part of a module: [`place`] cuts what the strategy shards and makes every parameter a leaf of the
//! rank's own.
//!
//! Two ranks whose parameters shared an autodiff node would share one graph and its lock, and their backward
//! passes would wait for each other for ever. A placed module cannot: it is made from untracked values.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Device, GradientCheckpointingStrategy, Tensor};

use crate::layout::select_ranges;
use crate::strategy::Placement;

/// A module whose parameters are this rank's.
#[derive(Debug, Clone)]
pub struct Placed<M> {
    /// The module.
    pub module: M,
    rank: usize,
    cuts: HashMap<ParamId, Cut>,
}

/// A parameter that is not whole on every rank.
#[derive(Debug, Clone)]
pub(crate) struct Cut {
    /// Its whole shape.
    pub(crate) shape: Vec<usize>,
    /// What each rank holds.
    pub(crate) placements: Vec<Placement>,
}

impl<M> Placed<M> {
    /// The placement of a parameter.
    pub fn placement(&self, id: ParamId) -> &Placement {
        self.cuts
            .get(&id)
            .map_or(&Placement::Replicated, |cut| &cut.placements[self.rank])
    }

    pub(crate) fn cut(&self, id: ParamId) -> Option<&Cut> {
        self.cuts.get(&id)
    }
}

/// A module cut by what `placements` gives for each parameter's path and shape: a placement a rank. See
/// [`crate::Session::place`].
pub fn place<M: Module>(
    module: &M,
    placements: impl Fn(&str, &[usize]) -> Vec<Placement>,
    rank: usize,
    device: &Device,
) -> Placed<M> {
    let mut cutter = Cutter {
        path: Vec::new(),
        placements,
        rank,
        cuts: HashMap::new(),
    };
    // `valid` leaves any graph behind, `fork` moves the values, `train` makes those leaves of this rank that
    // were trainable. Without autodiff on the device there is nothing to train.
    let module = module.valid().map(&mut cutter).fork(device);
    let module = match device.gradient_checkpointing_strategy() {
        Some(strategy) => module.train().map(&mut Checkpointing(strategy)),
        None => module,
    };
    Placed {
        module,
        rank,
        cuts: cutter.cuts,
    }
}

/// Gives the parameters the device's checkpointing strategy, which `train` does not: Burn refuses to mix two.
struct Checkpointing(GradientCheckpointingStrategy);

impl ModuleMapper for Checkpointing {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.with_gradient_checkpointing_strategy(self.0))
    }
}

struct Cutter<F> {
    path: Vec<String>,
    placements: F,
    rank: usize,
    cuts: HashMap<ParamId, Cut>,
}

impl<F: Fn(&str, &[usize]) -> Vec<Placement>> ModuleMapper for Cutter<F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = param.lazy_shape().as_slice().to_vec();
        let placements = (self.placements)(&self.path.join("."), &shape);
        let (dim, ranges) = match &placements[self.rank] {
            Placement::Replicated => return param,
            Placement::Sharded { dim, ranges } | Placement::Shared { dim, ranges } => {
                (*dim, ranges.clone())
            }
        };
        self.cuts.insert(param.id, Cut { shape, placements });
        param.map(|tensor| select_ranges(tensor, dim, &ranges))
    }
}
