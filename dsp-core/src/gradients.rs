//! The reduction of gradients after a backward pass: replicated parameters' are summed over the ranks, sharded
//! ones' are whole already.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};

use crate::collective::all_reduce_in;
use crate::error::CommError;
use crate::group::Group;
use crate::ledger::Phase;
use crate::place::Placed;
use crate::shape::reshape;
use crate::strategy::Placement;

/// The module's gradients, those of replicated parameters summed over the group.
///
/// All go through one flat bucket and one all-reduce. A parameter that this rank did not use has no gradient
/// here and enters with zeros; the bucket's order is the module's, the same on every rank.
///
/// # Cost
/// One all-reduce of as many elements as there are replicated, trainable parameters.
///
/// # Errors
/// [`CommError`] if a rank fails.
pub fn reduce<M: Module>(
    gradients: &mut Gradients,
    placed: &Placed<M>,
    group: &Group,
) -> Result<GradientsParams, CommError> {
    let mut own = GradientsParams::from_module(gradients, &placed.module);
    let mut bucket = Collect {
        gradients: &mut own,
        is_replicated: |id| *placed.placement(id) == Placement::Replicated,
        seen: HashSet::new(),
        flat: Vec::new(),
    };
    placed.module.visit(&mut bucket);
    let flat = bucket.flat;
    if flat.is_empty() {
        return Ok(own);
    }
    let mut offset = 0;
    let mut spans = HashMap::new();
    for (id, piece) in &flat {
        let length = piece.dims()[0];
        spans.insert(*id, (offset, length));
        offset += length;
    }
    let pieces = flat.into_iter().map(|(_, piece)| piece).collect();
    let sums = all_reduce_in(Tensor::cat(pieces, 0), Phase::Gradients, group)?;
    placed.module.visit(&mut Register {
        sums,
        spans,
        gradients: &mut own,
    });
    Ok(own)
}

/// The number of elements that [`reduce`] sums.
pub fn replicated_parameters<M: Module>(placed: &Placed<M>) -> usize {
    struct Count<'a, M> {
        placed: &'a Placed<M>,
        seen: HashSet<ParamId>,
        elements: usize,
    }
    impl<M> ModuleVisitor for Count<'_, M> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let is_replicated = *self.placed.placement(param.id) == Placement::Replicated;
            if self.seen.insert(param.id) && is_replicated && param.is_require_grad() {
                self.elements += param.shape().num_elements();
            }
        }
    }
    let mut count = Count {
        placed,
        seen: HashSet::new(),
        elements: 0,
    };
    placed.module.visit(&mut count);
    count.elements
}

struct Collect<'a, F> {
    gradients: &'a mut GradientsParams,
    is_replicated: F,
    seen: HashSet<ParamId>,
    flat: Vec<(ParamId, Tensor<1>)>,
}

impl<F: Fn(ParamId) -> bool> ModuleVisitor for Collect<'_, F> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // A parameter that the module holds in two places has one gradient.
        let is_new = self.seen.insert(param.id);
        if !is_new || !param.is_require_grad() || !(self.is_replicated)(param.id) {
            return;
        }
        let count = param.shape().num_elements();
        let gradient = match self.gradients.remove::<D>(param.id) {
            Some(gradient) => reshape(gradient, [count]),
            None => {
                let value = param.val().inner();
                Tensor::zeros([count], (&value.device(), value.dtype()))
            }
        };
        self.flat.push((param.id, gradient));
    }
}

struct Register<'a> {
    sums: Tensor<1>,
    spans: HashMap<ParamId, (usize, usize)>,
    gradients: &'a mut GradientsParams,
}

impl ModuleVisitor for Register<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(&(start, length)) = self.spans.get(&param.id) {
            let sum = self.sums.clone().narrow(0, start, length);
            let gradient = reshape(sum, param.shape().dims::<D>());
            self.gradients.register(param.id, gradient);
        }
    }
}
