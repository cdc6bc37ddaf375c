//! A state that comes into a chunk reaches states along it, aged by the positions that it has passed by then.

use burn::tensor::Tensor;

use super::Problem;
#[cfg(feature = "flex")]
use crate::fused::rows::{Native, native};

/// `met + λ^passed(i)·state` for each head and each of the `i` states along the chunk, in one pass over `met`, which is
/// changed in place where nobody else has it.
///
/// # Shapes
/// - `met`: `[B, Hq, n, d, dv]`; `state`: `[B, Hq, d, dv]`, of its dtype; returns as `met`
pub(super) fn received(
    met: Tensor<5>,
    state: &Tensor<4>,
    passed: impl Fn(usize) -> usize,
    problem: &Problem,
) -> Tensor<5> {
    #[cfg(feature = "flex")]
    match native(state) {
        Some(Native::F32) => return flex::received::<f32>(met, state, passed, problem),
        Some(Native::F64) => return flex::received::<f64>(met, state, passed, problem),
        None => {}
    }
    portable(met, state, passed, problem)
}

pub(super) fn portable(
    met: Tensor<5>,
    state: &Tensor<4>,
    passed: impl Fn(usize) -> usize,
    problem: &Problem,
) -> Tensor<5> {
    let like = (&state.device(), state.dtype());
    let passing = problem.powers(met.dims()[2], passed, like);
    met + state.clone().unsqueeze_dim::<5>(2) * passing.unsqueeze_dim::<5>(4)
}

#[cfg(feature = "flex")]
mod flex {
    use burn::tensor::Tensor;

    use super::super::portable::raised;
    use super::Problem;
    use crate::fused::real::{Real, vectorised};
    use crate::fused::rows::{Rows, WHOLE, changed};
    use crate::shape::reshape;

    pub(super) fn received<E: Real>(
        met: Tensor<5>,
        state: &Tensor<4>,
        passed: impl Fn(usize) -> usize,
        problem: &Problem,
    ) -> Tensor<5> {
        let dims = met.dims();
        let [samples, heads, states, d, dv] = dims;
        let width = d * dv;
        let state = Rows::<E>::of(reshape(state.clone(), [samples * heads, width]));
        let of_head = |decay: &f64| {
            let power = |of: usize| E::of(raised(*decay, passed(of)));
            (0..states).map(power).collect::<Vec<_>>()
        };
        let powers: Vec<Vec<E>> = problem.decays().iter().map(of_head).collect();
        let met = reshape(met, [samples * heads, states, width]);
        let (met, _) = changed::<E, _, 3>(met, WHOLE, |first, block| {
            vectorised(
                #[inline(always)]
                || {
                    for (index, met) in block.chunks_exact_mut(width).enumerate() {
                        let (head, of) = ((first + index) / states, (first + index) % states);
                        let power = powers[head % heads][of];
                        for (met, &state) in met.iter_mut().zip(state.row(head)) {
                            *met += state * power;
                        }
                    }
                },
            );
        });
        reshape(met, dims)
    }
}
