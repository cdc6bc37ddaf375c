//! The gate of a SwiGLU network.

use std::convert::Infallible;

use burn::tensor::{Tensor, activation};

use crate::vjp::attach2;

/// `silu(gate)·up`, with `silu(x) = x / (1 + e⁻ˣ)` (Shazeer, arXiv:2002.05202).
///
/// # Shapes
/// - `gate`, `up`: any, alike; returns the same
///
/// # Gradient
/// With `s = 1 / (1 + e^−gate)`: `dgate = g·up·s·(1 + gate·(1 − s))`, `dup = g·gate·s`. Only the inputs are kept.
///
/// # Panics
/// If the shapes differ.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "a SwiGLU's two factors");
    let inner = [&gate, &up].map(|tensor| tensor.clone().inner());
    let y = forward(inner.clone());
    attach2([gate, up], y, move |gradient: Tensor<D>| {
        Ok::<_, Infallible>(backward(inner.clone(), gradient))
    })
}

fn forward<const D: usize>(inputs: [Tensor<D>; 2]) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&inputs[0]) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::forward::<f32, D>(inputs),
            Native::F64 => flex::forward::<f64, D>(inputs),
        };
    }
    portable_forward(inputs)
}

fn backward<const D: usize>(inputs: [Tensor<D>; 2], gradient: Tensor<D>) -> [Tensor<D>; 2] {
    #[cfg(feature = "flex")]
    if let Some(native) = super::rows::native(&inputs[0]) {
        use super::rows::Native;
        return match native {
            Native::F32 => flex::backward::<f32, D>(inputs, gradient),
            Native::F64 => flex::backward::<f64, D>(inputs, gradient),
        };
    }
    portable_backward(inputs, gradient)
}

pub(super) fn portable_forward<const D: usize>([gate, up]: [Tensor<D>; 2]) -> Tensor<D> {
    gate.clone() * activation::sigmoid(gate) * up
}

pub(super) fn portable_backward<const D: usize>(
    [gate, up]: [Tensor<D>; 2],
    gradient: Tensor<D>,
) -> [Tensor<D>; 2] {
    let s = activation::sigmoid(gate.clone());
    let slope = s.clone() * (gate.clone() * s.clone().neg().add_scalar(1.0)).add_scalar(1.0);
    [gradient.clone() * up * slope, gradient * gate * s]
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::real::{Real, vectorised};
    use super::super::rows::{Owned, Rows, WHOLE, written, written_beside};

    pub(super) fn forward<E: Real, const D: usize>([gate, up]: [Tensor<D>; 2]) -> Tensor<D> {
        let dims = up.dims();
        let [gate, up] = [gate, up].map(Rows::<E>::of);
        let (y, _) = written(dims, WHOLE, |rows, y| {
            vectorised(
                #[inline(always)]
                || {
                    for row in rows {
                        let inputs = gate.row(row).iter().zip(up.row(row));
                        y.extend(inputs.map(|(&gate, &up)| gate * gate.logistic() * up));
                    }
                },
            );
        });
        y
    }

    pub(super) fn backward<E: Real, const D: usize>(
        [gate, up]: [Tensor<D>; 2],
        gradient: Tensor<D>,
    ) -> [Tensor<D>; 2] {
        let (dims, mut dup) = (gate.dims(), Owned::<E>::of(gradient));
        let [gate, up] = [gate, up].map(Rows::<E>::of);
        let width = up.width();
        let dgate = written_beside(dims, dup.values(), |rows, dgate, dup| {
            vectorised(
                #[inline(always)]
                || {
                    for (row, dup) in rows.zip(dup.chunks_exact_mut(width)) {
                        let inputs = gate.row(row).iter().zip(up.row(row));
                        dgate.extend(dup.iter_mut().zip(inputs).map(|(dup, (&gate, &up))| {
                            let (g, s) = (*dup, gate.logistic());
                            *dup = g * gate * s;
                            g * up * s * (E::ONE + gate * (E::ONE - s))
                        }));
                    }
                },
            );
        });
        [dgate, dup.into_tensor()]
    }
}
