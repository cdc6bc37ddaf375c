//! A residual connection through a gate.

use std::convert::Infallible;

use burn::tensor::{DType, Tensor};

use super::is_half;
use super::spread::{groups, sum_to};
use crate::vjp::attach3;

/// `x + gate·h`.
///
/// # Shapes
/// - `x`, `h`: `[…, C]`, alike; `gate`: `[…, C]`, the dims of `x` or 1
/// - returns: as `x`
///
/// # Gradient
/// `dx = g`, `dgate = g·h` summed over the dims along which the gate is 1, `dh = g·gate`. The gate and `h` are kept.
///
/// # Panics
/// If the shapes do not fit.
pub fn gated_sum<const D: usize>(x: Tensor<D>, gate: Tensor<D>, h: Tensor<D>) -> Tensor<D> {
    let [inner_gate, inner_h] = [&gate, &h].map(|tensor| tensor.clone().inner());
    let inputs = [x.clone().inner(), inner_gate.clone(), inner_h.clone()];
    let y = forward(inputs);
    attach3([x, gate, h], y, move |gradient: Tensor<D>| {
        let inputs = [inner_gate.clone(), inner_h.clone(), gradient.clone()];
        let [dgate, dh] = backward(inputs);
        Ok::<_, Infallible>([gradient, dgate, dh])
    })
}

/// `x + gate·h` of `[x, gate, h]`, untracked.
pub(crate) fn forward<const D: usize>(inputs: [Tensor<D>; 3]) -> Tensor<D> {
    let [x, gate, h] = inputs.each_ref().map(Tensor::dims);
    assert_eq!(x, h, "a gated sum's two terms");
    let groups = groups("a gated sum's gate", x, gate);
    #[cfg(feature = "flex")]
    if let (Some(native), Some(groups)) = (super::rows::native(&inputs[0]), groups) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::forward::<f32, D>(inputs, groups),
            Native::F64 => flex::forward::<f64, D>(inputs, groups),
        };
    }
    portable_forward(inputs)
}

/// `dgate` and `dh`, from the gate, `h` and the gradient.
pub(crate) fn backward<const D: usize>(inputs: [Tensor<D>; 3]) -> [Tensor<D>; 2] {
    let dtype = inputs[0].dtype();
    let groups = groups("a gated sum's gate", inputs[1].dims(), inputs[0].dims());
    if is_half(dtype) {
        let inputs = inputs.map(|input| input.cast(DType::F32));
        return backward(inputs).map(|gradient| gradient.cast(dtype));
    }
    #[cfg(feature = "flex")]
    if let (Some(native), Some(groups)) = (super::rows::native(&inputs[0]), groups) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::backward::<f32, D>(inputs, groups),
            Native::F64 => flex::backward::<f64, D>(inputs, groups),
        };
    }
    portable_backward(inputs)
}

fn portable_forward<const D: usize>([x, gate, h]: [Tensor<D>; 3]) -> Tensor<D> {
    x + gate * h
}

fn portable_backward<const D: usize>([gate, h, gradient]: [Tensor<D>; 3]) -> [Tensor<D>; 2] {
    let dgate = sum_to(gradient.clone() * h, gate.dims());
    [dgate, gradient * gate]
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::real::{Real, vectorised};
    use super::super::rows::{Owned, Rows, WHOLE, of_groups, written};

    pub(super) fn forward<E: Real, const D: usize>(
        [x, gate, h]: [Tensor<D>; 3],
        groups: usize,
    ) -> Tensor<D> {
        let dims = x.dims();
        let [x, gate, h] = [x, gate, h].map(Rows::<E>::of);
        let group = x.count() / groups.max(1);
        let (y, _) = written(dims, WHOLE, |rows, y| {
            vectorised(
                #[inline(always)]
                || {
                    for row in rows {
                        let gated = gate.row(row / group).iter().zip(h.row(row));
                        let terms = x.row(row).iter().zip(gated);
                        y.extend(terms.map(|(&x, (&gate, &h))| x + gate * h));
                    }
                },
            );
        });
        y
    }

    pub(super) fn backward<E: Real, const D: usize>(
        [gate, h, gradient]: [Tensor<D>; 3],
        groups: usize,
    ) -> [Tensor<D>; 2] {
        let (dims, of_gate) = (h.dims(), gate.dims());
        // The gradient is also that of `x`, so it is not changed.
        let [gate, h, gradient] = [gate, h, gradient].map(Rows::<E>::of);
        let (width, group) = (h.width(), h.count() / groups.max(1));
        let (dh, sums) = written(dims, group, |rows, dh| {
            let gate = gate.row(rows.start / group);
            let mut dgate = vec![E::ZERO; width];
            vectorised(
                #[inline(always)]
                || {
                    for row in rows {
                        let g = gradient.row(row);
                        for (dgate, (&g, &h)) in dgate.iter_mut().zip(g.iter().zip(h.row(row))) {
                            *dgate += g * h;
                        }
                        dh.extend(g.iter().zip(gate).map(|(&g, &gate)| g * gate));
                    }
                },
            );
            dgate
        });
        let dgate = of_groups(sums, groups, width).concat();
        [Owned::from_vec(dgate, &of_gate).into_tensor(), dh]
    }
}
