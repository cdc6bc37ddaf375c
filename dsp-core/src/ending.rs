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
use crate::linear::{leading_ones, sum_of_rows, times, weight_gradient};
use crate::partition::Partition;
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
    let is_tracked = inputs.each_ref().map(Tensor::is_tracked);
    let shapes = inputs.each_ref().map(Tensor::dims);
    let is_any = match is_tracked.contains(&true) {
        true => Tracking::Tracked,
        false => Tracking::Untracked,
    };
    let [x, h, weight, bias, gate] = inputs.each_ref().map(|input| input.clone().inner());
    let weight: Tensor<2> = weight.squeeze_dims(&[0, 1, 2]);

    let asked = group.next_sequence();
    let mut flights = vec![];
    let mut projected = vec![];
    for (part, range) in switch.ranges.iter().enumerate() {
        let of_part = |x: &Tensor<DIMS>| channels(x.clone(), range.clone());
        let mut y = times(h.clone(), channels(weight.clone(), range.clone()));
        if has_bias {
            y = y + of_part(&bias);
        }
        let sum = match has_gate {
            true => {
                let gate = of_part(&gate);
                projected.push((gate.clone(), y.clone()));
                gated_sum::forward([of_part(&x), gate, y])
            }
            false => of_part(&x) + y,
        };
        flights.push(switch.forth(part, sum, is_any)?);
    }
    let arrived = flights.into_iter().map(InFlight::wait);
    let output = side_by_side(arrived.collect::<Result<_, _>>()?);

    let output = attach5(inputs, output, move |gradient: Tensor<DIMS>| {
        let back = |(part, range): (usize, &Range<usize>)| {
            switch.back(part, channels(gradient.clone(), range.clone()), asked)
        };
        let flights: Vec<_> = (switch.ranges.iter().enumerate())
            .map(back)
            .collect::<Result<_, _>>()?;
        let zeros = |input: usize| Tensor::zeros(shapes[input], (&gradient.device(), dtype));
        let (mut dx, mut dh, mut dweight, mut dbias, mut dgate) =
            (vec![], None, vec![], vec![], vec![]);
        for ((part, range), flight) in switch.ranges.iter().enumerate().zip(flights) {
            let own = flight.wait()?;
            let dy = match projected.get(part) {
                Some((gate, y)) => {
                    let [of_gate, dy] = gated_sum::backward([gate.clone(), y.clone(), own.clone()]);
                    dgate.push(of_gate);
                    dy
                }
                None => own.clone(),
            };
            dx.push(own);
            if has_bias {
                dbias.push(leading_ones(sum_of_rows(dy.clone())));
            }
            if is_tracked[1] {
                let columns = channels(weight.clone(), range.clone());
                let term = times(dy.clone(), columns.transpose());
                dh = Some(match dh {
                    Some(sum) => sum + term,
                    None => term,
                });
            }
            if is_tracked[2] {
                dweight.push(weight_gradient(h.clone(), dy));
            }
        }
        let joined = |parts: Vec<Tensor<DIMS>>, input: usize| match parts.is_empty() {
            true => zeros(input),
            false => side_by_side(parts),
        };
        let dweight = match dweight.is_empty() {
            true => zeros(2),
            false => leading_ones(side_by_side(dweight)),
        };
        Ok::<_, CommError>([
            side_by_side(dx),
            dh.unwrap_or_else(|| zeros(1)),
            dweight,
            joined(dbias, 3),
            joined(dgate, 4),
        ])
    });
    Ok(Shard::new(output, to.clone(), rank)?)
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
