//! What ends a sub-layer, `x + gate·(h·W + b)`, and the switch that may follow, part by part of the channels: while
//! one part is on its way, the next is computed.
//!
//! ```text
//!              forward, in two parts                     backward
//!   computes   ▐ h·W₀ ▌▐ h·W₁ ▌                                  ▐ dW₀, dh ▌▐ dW₁, dh ▌
//!   moves              ▐  x₀  ▌▐  x₁  ▌                  ▐  dx₀  ▌▐  dx₁   ▌
//! ```
//!
//! A switch moves the residual stream, and a channel of that is complete with its own column of the sub-layer's last
//! projection. So of the transfer all but the last part's forward, and the first part's backward, has a product of
//! matrices to hide behind. It is one operation of the graph, both exchanges and products: the order of its backward
//! is in its own hands, the same on every rank.
//!
//! It sends what the switch as a whole sends, in as many more messages; a copy puts the parts side by side.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::blocks::{Blocks, DIMS};
use crate::error::{CommError, Error, Tracking};
use crate::fused::{channels, gated_sum, side_by_side};
use crate::group::{Group, InFlight, Request, Step};
use crate::layout::{Layout, Shard};
use crate::ledger::{Collective, Phase};
use crate::linear::{leading_ones, sum_of_rows, times, times_and_bias, weight_gradient};
use crate::partition::Partition;
use crate::shape::reshape;
use crate::vjp::attach5;

/// What ends a sub-layer: a projection, its bias, and the gate before the residual connection, if there is one.
#[derive(Debug, Clone)]
pub struct Ending {
    /// `[in, C]`, of which a rank may hold some of the rows.
    pub weight: Tensor<2>,
    /// `[C]`, added once.
    pub bias: Option<Tensor<1>>,
    /// `[…, C]`, the dims of the residual stream or 1.
    pub gate: Option<Tensor<DIMS>>,
}

impl Ending {
    /// Through a linear layer.
    pub fn of(projection: &Linear) -> Self {
        Self {
            weight: projection.weight.val(),
            bias: projection.bias.as_ref().map(Param::val),
            gate: None,
        }
    }

    /// The same, times `gate` before the sum.
    #[must_use]
    pub fn gated(self, gate: Tensor<DIMS>) -> Self {
        Self {
            gate: Some(gate),
            ..self
        }
    }
}

/// `x + gate·(h·W + b)`, and its switch to another layout, in parts.
///
/// # Shapes
/// - `x`: `[B, s1, s2, s3, C]`; `h`: `[B, s1, s2, s3, in]`, laid out alike
/// - returns: `[B, …, C]` laid out as `to`
///
/// # Gradient
/// All parts start back at once; each gives its columns' gradients as it comes.
///
/// # Errors
/// [`CommError`] if a rank fails or diverges.
pub(crate) fn switched(
    x: Shard,
    h: Shard,
    ending: Ending,
    to: &Layout,
    parts: NonZeroUsize,
    group: &Group,
) -> Result<Shard, Error> {
    let rank = x.rank();
    let Ending { weight, bias, gate } = ending;
    let switch = Switch::new(&x, to, parts, group);
    let (x, h) = (x.into_tensor(), h.into_tensor());
    let (dtype, device) = (x.dtype(), x.device());
    let (has_bias, has_gate) = (bias.is_some(), gate.is_some());
    let absent = |shape| Tensor::<DIMS>::zeros(shape, (&device, dtype));
    let bias = bias.map_or_else(|| absent([1; DIMS]), leading_ones);
    let gate = gate.unwrap_or_else(|| absent([1; DIMS]));
    let weight: Tensor<DIMS> = leading_ones(weight);

    let inputs = [x, h, weight, bias, gate];
    let tracking = Tracking::of(&inputs);
    let [x, h, weight, bias, gate] = inputs.each_ref().map(|input| input.clone().inner());
    let mut kept = Kept {
        asked: group.next_sequence(),
        switch,
        h,
        weight: weight.squeeze_dims(&[0, 1, 2]),
        gated: vec![],
        has_bias,
        h_tracked: inputs[1].is_tracked(),
        weight_tracked: inputs[2].is_tracked(),
        shapes: inputs.each_ref().map(Tensor::dims),
    };
    let mut flights = vec![];
    for (part, range) in kept.switch.ranges.iter().enumerate() {
        let of_part = |x: &Tensor<DIMS>| channels(x.clone(), range.clone());
        let columns = channels(kept.weight.clone(), range.clone());
        let bias = has_bias.then(|| reshape(of_part(&bias), [range.len()]));
        let y = times_and_bias(kept.h.clone(), columns, bias);
        let sum = match has_gate {
            true => {
                let gate = of_part(&gate);
                kept.gated.push([gate.clone(), y.clone()]);
                gated_sum::forward([of_part(&x), gate, y])
            }
            false => of_part(&x) + y,
        };
        flights.push(kept.switch.forth(part, sum, tracking)?);
    }
    let arrived = flights.into_iter().map(InFlight::wait);
    let output = side_by_side(arrived.collect::<Result<_, _>>()?);
    let output = attach5(inputs, output, move |gradient| kept.gradients(gradient));
    Ok(Shard::new(output, to.clone(), rank)?)
}

/// What the backward pass needs.
struct Kept {
    switch: Switch,
    /// The sequence number of the first part's way forth.
    asked: u64,
    h: Tensor<DIMS>,
    weight: Tensor<2>,
    /// Of each part its gate and what that multiplies, if there is a gate.
    gated: Vec<[Tensor<DIMS>; 2]>,
    has_bias: bool,
    h_tracked: bool,
    weight_tracked: bool,
    /// Of x, h, weight, bias and gate.
    shapes: [[usize; DIMS]; 5],
}

impl Kept {
    /// The gradients of x, h, weight, bias and gate.
    fn gradients(&self, gradient: Tensor<DIMS>) -> Result<[Tensor<DIMS>; 5], CommError> {
        let like = (gradient.device(), gradient.dtype());
        let parts = || self.switch.ranges.iter().enumerate();
        let start = |(part, range): (usize, &Range<usize>)| {
            let own = channels(gradient.clone(), range.clone());
            self.switch.back(part, own, self.asked)
        };
        let flights: Vec<_> = parts().map(start).collect::<Result<_, _>>()?;
        let (mut dx, mut dh, mut dweight) = (vec![], None, vec![]);
        let (mut dbias, mut dgate) = (vec![], vec![]);
        for ((part, range), flight) in parts().zip(flights) {
            let own = flight.wait()?;
            let dy = match self.gated.get(part) {
                Some([gate, y]) => {
                    let inputs = [gate.clone(), y.clone(), own.clone()];
                    let [of_gate, dy] = gated_sum::backward(inputs);
                    dgate.push(of_gate);
                    dy
                }
                None => own.clone(),
            };
            dx.push(own);
            if self.has_bias {
                dbias.push(leading_ones(sum_of_rows(dy.clone())));
            }
            if self.h_tracked {
                let columns = channels(self.weight.clone(), range.clone());
                let term = times(dy.clone(), columns.transpose());
                dh = Some(match dh {
                    Some(sum) => sum + term,
                    None => term,
                });
            }
            if self.weight_tracked {
                dweight.push(leading_ones(weight_gradient(self.h.clone(), dy)));
            }
        }
        let zeros = |shape| Tensor::zeros(shape, (&like.0, like.1));
        let joined = |parts: Vec<Tensor<DIMS>>, shape| match parts.is_empty() {
            true => zeros(shape),
            false => side_by_side(parts),
        };
        let [_, of_h, of_weight, of_bias, of_gate] = self.shapes;
        Ok([
            side_by_side(dx),
            dh.unwrap_or_else(|| zeros(of_h)),
            joined(dweight, of_weight),
            joined(dbias, of_bias),
            joined(dgate, of_gate),
        ])
    }
}

/// A switch in parts of the channels: who holds what of each, before and after.
struct Switch {
    group: Group,
    ranges: Vec<Range<usize>>,
    /// Of each part.
    before: Vec<Arc<Blocks>>,
    after: Vec<Arc<Blocks>>,
}

impl Switch {
    fn new(x: &Shard, to: &Layout, parts: NonZeroUsize, group: &Group) -> Self {
        let [batch, .., width] = x.tensor().dims();
        let partition = Partition::balanced(width, parts.get().min(width.max(1)));
        let ranges: Vec<_> = (0..partition.ranks())
            .flat_map(|part| partition.ranges(part).to_vec())
            .collect();
        let blocks = |layout: &Layout| {
            let of_part =
                |range: &Range<usize>| Arc::new(layout.blocks(batch, range.len(), group.size()));
            ranges.iter().map(of_part).collect()
        };
        Self {
            group: group.clone(),
            before: blocks(x.layout()),
            after: blocks(to),
            ranges,
        }
    }

    fn forth(
        &self,
        part: usize,
        tensor: Tensor<DIMS>,
        tracking: Tracking,
    ) -> Result<InFlight, CommError> {
        self.group.start(Request {
            collective: Collective::AllToAll,
            phase: Phase::Forward,
            tracking,
            tensor,
            before: self.before[part].clone(),
            after: self.after[part].clone(),
            step: Self::step(part),
            answers: None,
        })
    }

    /// The way back of a part, where the first part's way forth was exchange `asked`.
    fn back(&self, part: usize, tensor: Tensor<DIMS>, asked: u64) -> Result<InFlight, CommError> {
        self.group.start(Request {
            collective: Collective::AllToAll,
            phase: Phase::Backward,
            tracking: Tracking::Untracked,
            tensor,
            before: self.after[part].clone(),
            after: self.before[part].clone(),
            step: Self::step(part),
            answers: Some(asked + part as u64),
        })
    }

    /// All parts together are one call.
    fn step(part: usize) -> Step {
        match part {
            0 => Step::First,
            _ => Step::Further,
        }
    }
}
