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
    use super::super::rows::{Owned, Rows, add_up, blocks};

    pub(super) fn forward<E: Real, const D: usize>(
        [x, gate, h]: [Tensor<D>; 3],
        groups: usize,
    ) -> Tensor<D> {
        let mut y = Owned::<E>::of(x);
        let [gate, h] = [gate, h].map(Rows::<E>::of);
        let (width, rows) = (h.width(), h.count() / groups.max(1));
        let groups = y.values().chunks_mut((rows * width).max(1)).enumerate();
        for (group, y) in groups {
            let gate = gate.row(group);
            blocks(y, width, |first, block| {
                vectorised(
                    #[inline(always)]
                    || {
                        for (row, y) in block.chunks_exact_mut(width).enumerate() {
                            let h = h.row(group * rows + first + row);
                            for (y, (&h, &gate)) in y.iter_mut().zip(h.iter().zip(gate)) {
                                *y += gate * h;
                            }
                        }
                    },
                );
            });
        }
        y.into_tensor()
    }

    pub(super) fn backward<E: Real, const D: usize>(
        [gate, h, gradient]: [Tensor<D>; 3],
        groups: usize,
    ) -> [Tensor<D>; 2] {
        let dims = gate.dims();
        let [gate, h] = [gate, h].map(Rows::<E>::of);
        let (width, rows) = (h.width(), h.count() / groups.max(1));
        // The gradient itself is the residual's, so this is a copy.
        let mut dh = Owned::<E>::of(gradient);
        let mut sums = vec![];
        let chunks = dh.values().chunks_mut((rows * width).max(1));
        for (group, dh) in chunks.enumerate() {
            let gate = gate.row(group);
            let of_blocks = blocks(dh, width, |first, block| {
                let mut dgate = vec![E::ZERO; width];
                vectorised(
                    #[inline(always)]
                    || {
                        for (row, dh) in block.chunks_exact_mut(width).enumerate() {
                            let h = h.row(group * rows + first + row);
                            let vectors = h.iter().zip(gate);
                            for ((dh, dgate), (&h, &gate)) in
                                dh.iter_mut().zip(&mut dgate).zip(vectors)
                            {
                                *dgate += *dh * h;
                                *dh *= gate;
                            }
                        }
                    },
                );
                dgate
            });
            sums.push(add_up(of_blocks, width));
        }
        sums.resize_with(groups, || vec![E::ZERO; width]);
        let dgate = Owned::from_vec(sums.concat(), &dims);
        [dgate.into_tensor(), dh.into_tensor()]
    }
}
