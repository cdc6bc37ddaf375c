//! The reduction of gradients after a backward pass: replicated parameters' are summed over the ranks, sharded
//! ones' are whole already, and what several ranks hold is summed over those; replicas' are summed in any case.

use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::collective::all_reduce_in;
use crate::error::CommError;
use crate::group::Group;
use crate::layout::select_ranges;
use crate::ledger::Phase;
use crate::place::Placed;
use crate::precision::{computed, computed_in};
use crate::shape::reshape;
use crate::strategy::Placement;

/// Sums those of the module's gradients over the group that belong to replicated and shared parameters.
///
/// All of one type of float go through one flat bucket and one all-reduce. A parameter that this rank did not use has no
/// gradient here and enters with zeros; so do those parts of a shared parameter that the rank does not hold. The
/// bucket's order is the module's, the same on every rank.
///
/// # Cost
/// One all-reduce of as many elements as [`reduced_parameters`] says.
///
/// # Errors
/// [`CommError`] if a rank fails.
pub fn reduce<M: Module>(
    gradients: &mut GradientsParams,
    placed: &Placed<M>,
    group: &Group,
) -> Result<(), CommError> {
    sum_in_bucket(gradients, placed, Members::OfOneModel, group)
}

/// The norm of all of the module's reduced gradients, the same on every rank: the square root of the sum of the
/// squares, in which a replicated parameter counts once, and so does what several ranks hold.
///
/// # Cost
/// One all-reduce of one number, counted outside of the passes.
///
/// # Errors
/// [`CommError`] if a rank fails.
pub fn norm<M: Module>(
    gradients: &GradientsParams,
    placed: &Placed<M>,
    group: &Group,
) -> Result<f64, CommError> {
    let mut squares = Squares {
        gradients,
        placed,
        rank: group.rank(),
        sum: 0.0,
        like: None,
    };
    placed.module.visit(&mut squares);
    let Some((device, dtype)) = squares.like else {
        return Ok(0.0);
    };
    let own = TensorData::new(vec![squares.sum], [1]);
    let own = Tensor::<1>::from_data(own, (&device, dtype));
    let sum = all_reduce_in(own, Phase::Outside, group)?;
    Ok(sum.into_scalar::<f64>().sqrt())
}

/// Sums all of the module's gradients over a group whose ranks hold the same parts of it: replicas.
///
/// # Cost
/// One all-reduce of as many elements as this rank holds trainable parameters.
///
/// # Errors
/// [`CommError`] if a rank fails.
pub fn sum<M: Module>(
    gradients: &mut GradientsParams,
    placed: &Placed<M>,
    replicas: &Group,
) -> Result<(), CommError> {
    sum_in_bucket(gradients, placed, Members::Replicas, replicas)
}

/// The gradients in the parameters' whole shapes: the parts of sharded ones are gathered, one after the other.
///
/// # Cost
/// An all-gather of each sharded or shared parameter, counted outside of the passes.
///
/// # Errors
/// [`CommError`] if a rank fails.
pub fn whole<M: Module>(
    mut gradients: GradientsParams,
    placed: &Placed<M>,
    group: &Group,
) -> Result<GradientsParams, CommError> {
    let mut gather = Gather {
        gradients: &mut gradients,
        placed,
        group,
        outcome: Ok(()),
    };
    placed.module.visit(&mut gather);
    gather.outcome?;
    Ok(gradients)
}

/// The number of elements that [`reduce`] sums: the replicated parameters and the shared ones, whole.
pub fn reduced_parameters<M: Module>(placed: &Placed<M>) -> usize {
    struct Count<'a, M> {
        placed: &'a Placed<M>,
        elements: usize,
    }
    impl<M> ModuleVisitor for Count<'_, M> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if !param.is_require_grad() {
                return;
            }
            self.elements += match self.placed.placement(param.id) {
                Placement::Replicated => param.shape().num_elements(),
                Placement::Sharded { .. } => 0,
                Placement::Shared { .. } => {
                    let cut = self.placed.cut(param.id);
                    cut.map_or(0, |cut| cut.shape.iter().product())
                }
            };
        }
    }
    let mut count = Count {
        placed,
        elements: 0,
    };
    placed.module.visit(&mut count);
    count.elements
}

/// Who takes part in a sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Members {
    /// The ranks over which one model is spread: sharded parameters stay out.
    OfOneModel,
    /// Ranks that hold the same parts.
    Replicas,
}

fn sum_in_bucket<M: Module>(
    gradients: &mut GradientsParams,
    placed: &Placed<M>,
    members: Members,
    group: &Group,
) -> Result<(), CommError> {
    let mut bucket = Collect {
        gradients,
        placed,
        members,
        flat: Vec::new(),
    };
    placed.module.visit(&mut bucket);
    let mut flat = bucket.flat;
    while let Some((_, first)) = flat.first() {
        let dtype = first.dtype();
        let (alike, others) = (flat.into_iter()).partition(|(_, piece)| piece.dtype() == dtype);
        let alike: Vec<(ParamId, Tensor<1>)> = alike;
        flat = others;
        let mut offset = 0;
        let mut spans = HashMap::new();
        for (id, piece) in &alike {
            let length = piece.dims()[0];
            spans.insert(*id, (offset, length));
            offset += length;
        }
        let pieces = alike.into_iter().map(|(_, piece)| piece).collect();
        let sums = all_reduce_in(Tensor::cat(pieces, 0), Phase::Gradients, group)?;
        placed.module.visit(&mut Register {
            sums,
            spans,
            placed,
            members,
            gradients,
        });
    }
    Ok(())
}

struct Collect<'a, M> {
    gradients: &'a mut GradientsParams,
    placed: &'a Placed<M>,
    members: Members,
    flat: Vec<(ParamId, Tensor<1>)>,
}

impl<M> ModuleVisitor for Collect<'_, M> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_require_grad() {
            return;
        }
        let placement = match self.members {
            Members::OfOneModel => self.placed.placement(param.id),
            Members::Replicas => &Placement::Replicated,
        };
        if matches!(placement, Placement::Sharded { .. }) {
            return;
        }
        let gradient = self.gradients.remove::<D>(param.id).unwrap_or_else(|| {
            let value = param.val().inner();
            Tensor::zeros(value.dims(), (&value.device(), value.dtype()))
        });
        let fit = Fit::of(self.placed, param.id, self.members);
        self.flat.push((param.id, fit.flat(gradient)));
    }
}

/// How a parameter's gradient lies in a bucket: as it is, or, of a shared parameter, among zeros in its whole shape.
#[derive(Debug, Clone)]
pub(crate) struct Fit {
    /// The dim, the ranges of it that are here, and the whole shape.
    within: Option<(usize, Vec<Range<usize>>, Vec<usize>)>,
}

impl Fit {
    pub(crate) fn of<M>(placed: &Placed<M>, id: ParamId, members: Members) -> Self {
        let within = match (members, placed.placement(id), placed.cut(id)) {
            (Members::OfOneModel, Placement::Shared { dim, ranges }, Some(cut)) => {
                Some((*dim, ranges.clone(), cut.shape.clone()))
            }
            _ => None,
        };
        Self { within }
    }

    /// How many elements of the bucket a parameter of this shape takes.
    pub(crate) fn elements(&self, shape: &[usize]) -> usize {
        let whole = self.within.as_ref().map_or(shape, |(.., whole)| whole);
        whole.iter().product()
    }

    /// The gradient as the bucket has it.
    pub(crate) fn flat<const D: usize>(&self, gradient: Tensor<D>) -> Tensor<1> {
        let gradient = match &self.within {
            Some((dim, ranges, whole)) => spread(gradient, *dim, ranges, whole[*dim]),
            None => gradient,
        };
        let count = gradient.shape().num_elements();
        reshape(gradient, [count])
    }

    /// What is here of what the bucket has.
    pub(crate) fn held(&self, flat: Tensor<1>) -> Tensor<1> {
        let Some((dim, ranges, whole)) = &self.within else {
            return flat;
        };
        let (before, behind) = (&whole[..*dim], &whole[dim + 1..]);
        let view = [
            before.iter().product(),
            whole[*dim],
            behind.iter().product(),
        ];
        let held = select_ranges(reshape::<_, 3>(flat, view), 1, ranges);
        let count = held.shape().num_elements();
        reshape(held, [count])
    }
}

/// A part of a parameter in its place, zeros around it.
fn spread<const D: usize>(
    part: Tensor<D>,
    dim: usize,
    ranges: &[Range<usize>],
    length: usize,
) -> Tensor<D> {
    let like = (&part.device(), part.dtype());
    let zeros = |count: usize| {
        let mut shape = part.dims();
        shape[dim] = count;
        Tensor::<D>::zeros(shape, like)
    };
    let mut pieces = Vec::new();
    let (mut taken, mut end) = (0, 0);
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        if range.start > end {
            pieces.push(zeros(range.start - end));
        }
        pieces.push(part.clone().narrow(dim, taken, range.len()));
        taken += range.len();
        end = range.end;
    }
    if length > end {
        pieces.push(zeros(length - end));
    }
    Tensor::cat(pieces, dim)
}

struct Register<'a, M> {
    sums: Tensor<1>,
    spans: HashMap<ParamId, (usize, usize)>,
    placed: &'a Placed<M>,
    members: Members,
    gradients: &'a mut GradientsParams,
}

impl<M> ModuleVisitor for Register<'_, M> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(&(start, length)) = self.spans.get(&param.id) else {
            return;
        };
        let span = start..start + length;
        let sum = select_ranges(self.sums.clone(), 0, std::slice::from_ref(&span));
        let fit = Fit::of(self.placed, param.id, self.members);
        let gradient = reshape(fit.held(sum), param.shape().dims::<D>());
        self.gradients.register(param.id, gradient);
    }
}

struct Squares<'a, M> {
    gradients: &'a GradientsParams,
    placed: &'a Placed<M>,
    rank: usize,
    sum: f64,
    like: Option<(Device, DType)>,
}

impl<M> ModuleVisitor for Squares<'_, M> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_require_grad() {
            return;
        }
        let value = param.val().inner();
        (self.like).get_or_insert_with(|| (value.device(), computed_in(value.dtype())));
        let Some(gradient) = self.gradients.get::<D>(param.id) else {
            return;
        };
        let own = match self.placed.cut(param.id) {
            Some(cut) => {
                let owned = cut.owned(self.rank);
                select_ranges(gradient, owned.dim, &owned.local)
            }
            None if self.rank == 0 => gradient,
            None => return,
        };
        if own.shape().num_elements() > 0 {
            // In 16 bits the square of 256 is infinite.
            let own = computed(own);
            self.sum += (own.clone() * own).sum().into_scalar::<f64>();
        }
    }
}

struct Gather<'a, M> {
    gradients: &'a mut GradientsParams,
    placed: &'a Placed<M>,
    group: &'a Group,
    outcome: Result<(), CommError>,
}

impl<M> ModuleVisitor for Gather<'_, M> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(cut) = self.placed.cut(param.id) else {
            return;
        };
        if !param.is_require_grad() || self.outcome.is_err() {
            return;
        }
        let part = self.gradients.remove::<D>(param.id).unwrap_or_else(|| {
            let value = param.val().inner();
            Tensor::zeros(value.dims(), (&value.device(), value.dtype()))
        });
        match cut.gather(part, self.group) {
            Ok(whole) => self.gradients.register(param.id, whole),
            Err(error) => self.outcome = Err(error),
        }
    }
}
