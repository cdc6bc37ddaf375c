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
    sharded: HashMap<ParamId, Placement>,
}

impl<M> Placed<M> {
    /// The placement of a parameter.
    pub fn placement(&self, id: ParamId) -> &Placement {
        self.sharded.get(&id).unwrap_or(&Placement::Replicated)
    }
}

/// A module cut by the placement that `placement` gives for each parameter's path and shape. See
/// [`crate::Session::place`].
pub fn place<M: Module>(
    module: &M,
    placement: impl Fn(&str, &[usize]) -> Placement,
    device: &Device,
) -> Placed<M> {
    let mut cutter = Cutter {
        path: Vec::new(),
        placement,
        sharded: HashMap::new(),
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
        sharded: cutter.sharded,
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
    placement: F,
    sharded: HashMap<ParamId, Placement>,
}

impl<F: Fn(&str, &[usize]) -> Placement> ModuleMapper for Cutter<F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = param.lazy_shape();
        let placement = (self.placement)(&self.path.join("."), shape.as_slice());
        let Placement::Sharded { dim, ranges } = &placement else {
            return param;
        };
        let (dim, ranges) = (*dim, ranges.clone());
        self.sharded.insert(param.id, placement);
        param.map(|tensor| select_ranges(tensor, dim, &ranges))
    }
}
