//! A rank's part of a module: [`place`] cuts what the strategy shards and makes every parameter a leaf of the
//! rank's own.
//!
//! Two ranks whose parameters shared an autodiff node would share one graph and its lock, and their backward
//! passes would wait for each other for ever. A placed module cannot: it is made from untracked values.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Device, GradientCheckpointingStrategy, Tensor};

use crate::blocks::{Blocks, DimBlocks};
use crate::error::{CommError, Tracking};
use crate::group::{Group, Request, Step};
use crate::layout::select_ranges;
use crate::ledger::{Collective, Phase};
use crate::shape::reshape;
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

    /// Other values of the same parameters, cut as these are: an optimizer's moments, an average.
    ///
    /// `module` is this one's with its parameters mapped, so that each still has its id and its shape.
    pub fn with_module(&self, module: M) -> Self {
        Self {
            module,
            rank: self.rank,
            cuts: self.cuts.clone(),
        }
    }
}

/// A module cut by what `placements` gives for each parameter's path and shape: a placement a rank. See
/// [`crate::Session::place`].
///
/// # Panics
/// If the module holds a parameter in two places: each would be a leaf of its own here, with a part of the gradient.
/// Use one `Param` in both.
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
        paths: HashMap::new(),
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
    /// Where each parameter was met.
    paths: HashMap<ParamId, String>,
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
        let path = self.path.join(".");
        let placements = (self.placements)(&path, &shape);
        if let Some(other) = self.paths.insert(param.id, path.clone()) {
            panic!(
                "the module holds one parameter in two places, {other:?} and {path:?}, where it would get two \
                 gradients: hold it once and use it twice"
            );
        }
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

/// The whole module, on every rank: the parts of sharded parameters are gathered, one after the other. See
/// [`crate::Session::whole_module`].
pub fn whole<M: Module>(placed: &Placed<M>, group: &Group) -> Result<M, CommError> {
    let mut gather = Gather {
        cuts: &placed.cuts,
        group,
        outcome: Ok(()),
    };
    let module = placed.module.valid().map(&mut gather);
    gather.outcome.map(|()| module)
}

struct Gather<'a> {
    cuts: &'a HashMap<ParamId, Cut>,
    group: &'a Group,
    outcome: Result<(), CommError>,
}

impl ModuleMapper for Gather<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(cut) = self.cuts.get(&param.id) else {
            return param;
        };
        param.map(|part| {
            if self.outcome.is_err() {
                return part;
            }
            match cut.gather(part.clone(), self.group) {
                Ok(whole) => whole,
                Err(error) => {
                    self.outcome = Err(error);
                    part
                }
            }
        })
    }
}

/// Which rank's values of a cut parameter count: of what several ranks hold, the first one's.
pub(crate) struct Owned {
    /// The dim that is cut.
    pub(crate) dim: usize,
    /// Each rank's own, in the whole parameter.
    pub(crate) ranges: Vec<Vec<Range<usize>>>,
    /// This rank's own, in what it holds.
    pub(crate) local: Vec<Range<usize>>,
}

impl Cut {
    /// What belongs to each rank.
    pub(crate) fn owned(&self, this: usize) -> Owned {
        let mut taken: Vec<Range<usize>> = Vec::new();
        let mut owned = Owned {
            dim: 0,
            ranges: Vec::new(),
            local: Vec::new(),
        };
        for (rank, placement) in self.placements.iter().enumerate() {
            let mut ranges = Vec::new();
            let mut held_before = 0;
            if let Placement::Sharded { dim, ranges: held }
            | Placement::Shared { dim, ranges: held } = placement
            {
                owned.dim = *dim;
                for range in held {
                    for piece in not_in(range, &taken) {
                        if rank == this {
                            let start = held_before + piece.start - range.start;
                            owned.local.push(start..start + piece.len());
                        }
                        ranges.push(piece);
                    }
                    held_before += range.len();
                }
            }
            taken.extend(ranges.iter().cloned());
            owned.ranges.push(ranges);
        }
        owned
    }

    /// The whole parameter, or its gradient, outside of any graph, from the ranks' parts. Of what several ranks
    /// hold, the first one's counts.
    pub(crate) fn gather<const D: usize>(
        &self,
        part: Tensor<D>,
        group: &Group,
    ) -> Result<Tensor<D>, CommError> {
        let Owned { dim, ranges, local } = self.owned(group.rank());
        let part = select_ranges(part, dim, &local);
        let (outer, inner) = (
            self.shape[..dim].iter().product(),
            self.shape[dim + 1..].iter().product(),
        );
        let length = self.shape[dim];
        let after = Blocks::replicated([outer, length, inner, 1, 1], group.size());
        let before = after
            .clone()
            .with_dim(1, DimBlocks::from_ranges(length, ranges));
        let count = before.dim(1).count(group.rank());
        let whole = group.exchange(Request {
            collective: Collective::AllGather,
            phase: Phase::Outside,
            tracking: Tracking::Untracked,
            tensor: reshape(part.inner(), [outer, count, inner, 1, 1]),
            before: Arc::new(before),
            after: Arc::new(after),
            step: Step::First,
            answers: None,
        })?;
        Ok(reshape(whole, std::array::from_fn(|dim| self.shape[dim])))
    }
}

/// What of `range` is in none of `taken`.
fn not_in(range: &Range<usize>, taken: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut left: Vec<Range<usize>> = std::iter::once(range.clone()).collect();
    for other in taken {
        left = left
            .into_iter()
            .flat_map(|range| {
                [
                    range.start..range.end.min(other.start),
                    range.start.max(other.end)..range.end,
                ]
            })
            .filter(|range| range.start < range.end)
            .collect();
    }
    left
}
