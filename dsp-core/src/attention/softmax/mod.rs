//! Softmax attention of the heads and rows that a rank holds, forward and backward, and the merge of results over
//! several sets of keys.
//!
//! | file | what it is |
//! |---|---|
//! | problem | [`Problem`]: all that is asked but the tensors |
//! | portable | in blocks, with plain Burn operations, on any backend |
//!
//! Where there are kernels for the tensors (`flex` and `gpu` beside this), these compute.

mod portable;
mod problem;
#[cfg(test)]
#[cfg(feature = "flex")]
mod tests;

use std::convert::Infallible;

use burn::tensor::Tensor;

#[cfg(feature = "flex")]
use super::flex;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use super::gpu;
use crate::precision::{computed, computed_in};
use crate::vjp;
use portable::{Blocks, backward_in, forward_in, merge_rows};
#[cfg(any(feature = "cuda", feature = "wgpu", feature = "flex"))]
pub(super) use problem::Sizes;
#[cfg(feature = "flex")]
pub(super) use problem::positions_of;
pub use problem::{HeadRange, Problem};

/// Attends: the output, and the logsumexp (natural logarithm) of each query's scores.
///
/// The tensors are untracked; see [`softmax_attention`] for a gradient. They share one floating
/// dtype, in which everything is computed; of 16 bits, in f32, in which their logsumexp then is, and
/// the output is rounded once.
///
/// # Shapes
/// - `q`: `[B, Lq, Hq, d]`, `k`: `[B, Lk, Hkv, d]`, `v`: `[B, Lk, Hkv, dv]`; any of them may be
///   empty
/// - returns: `[B, Lq, Hq, dv]` and `[B, Lq, Hq]`; `(0, −∞)` for a query that sees no key. The logsumexp is
///   that of all visible keys, those dropped included
///
/// # Cost
/// `2·B·Hq·(d + dv)` operations per visible pair of query and key. Memory: the results, and a
/// constant for one block's scores; by the CPU's kernels, that and a copy of one head's keys and values for each thread;
/// of 16 bits, where no kernel takes these, copies of all in f32.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn forward(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    problem: &Problem,
) -> (Tensor<4>, Tensor<3>) {
    Way::Best.forward(q, k, v, problem)
}

/// The gradients of `q`, `k` and `v`, recomputing the weights block by block from the logsumexp.
///
/// With `out` and `lse` merged over several sets of keys, and `k` and `v` one of those sets, the
/// results are that set's `dk` and `dv` and its part of `dq`.
///
/// # Shapes
/// - `q`, `k`, `v`: as in [`forward`]; `out`, `lse`: what it returned, or a [`merge`] of that
/// - `dout`: `[B, Lq, Hq, dv]`
/// - returns: `(dq, dk, dv)`, in the shapes of `q`, `k`, `v`; zero where nothing is visible
///
/// # Cost
/// 2.5 times the forward's operations. Memory: the results, a scaled copy of `q`, two numbers per
/// query, and a constant for one block's scores; of 16 bits, where no kernel takes these, copies of all in f32. By the
/// CPU's kernels, for each thread the scores, and of one head two copies of each of `q`, `k` and `dout` and one of `v` and
/// `dq`; and of fewer than 8 kv heads over all samples, whose queries are shared out too, `dk` and `dv` not once but
/// `⌈8/(B·Hkv)⌉` times, and at most `⌈Lq/256⌉`.
///
/// # Panics
/// If a shape contradicts another, or the problem.
pub fn backward(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    out: Tensor<4>,
    lse: Tensor<3>,
    dout: Tensor<4>,
    problem: &Problem,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    Way::Best.backward(q, k, v, out, lse, dout, problem)
}

/// Attends with a gradient: [`forward`], attached to the graphs of `q`, `k`, `v` with [`backward`].
///
/// The graph keeps `q`, `k`, `v`, the output and the logsumexp.
///
/// # Shapes
/// As [`forward`].
///
/// # Gradient
/// Through the output. The logsumexp is returned as a constant.
///
/// # Panics
/// As [`forward`].
pub fn softmax_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    problem: Problem,
) -> (Tensor<4>, Tensor<3>) {
    attached(Way::Best, q, k, v, problem)
}

/// The result over two disjoint sets of keys from the result over each.
///
/// `out ← out − σ(lse' − lse)(out − out')`, `lse ← lse − log σ(lse − lse')`: no exponential of a
/// logsumexp is ever taken, so that nothing overflows. Where one side saw no key (`lse` is −∞ and
/// `out` is 0) the result is the other side; where neither did, `(0, −∞)`.
///
/// All is computed in the logsumexps' dtype, and the output returned in that of `a`'s: where many results of 16 bits
/// are merged one after the other, begin with one cast to f32, so that none of the sums is rounded to 16 bits.
///
/// # Shapes
/// - outputs: `[B, Lq, Hq, dv]`, logsumexps: `[B, Lq, Hq]`
pub fn merge(a: (Tensor<4>, Tensor<3>), b: (Tensor<4>, Tensor<3>)) -> (Tensor<4>, Tensor<3>) {
    let (dtype, computed) = (a.0.dtype(), a.1.dtype());
    let rows = |(out, lse): (Tensor<4>, Tensor<3>)| (out.cast(computed), lse.unsqueeze_dim(3));
    let (out, lse) = merge_rows(rows(a), rows(b));
    (out.cast(dtype), lse.squeeze_dim(3))
}

/// How attention is computed.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// By the kernels of [`super::flex`], or of `gpu`, where there are some for the tensors, else portably; in f32 at
    /// least.
    Best,
    /// With Burn's operations, in such blocks.
    #[cfg_attr(not(test), expect(dead_code, reason = "the oracle of the tests"))]
    Portable(Blocks),
    /// By the kernels of [`super::flex`], with an instruction set and such tiles.
    #[cfg(all(test, feature = "flex"))]
    Flex(crate::simd::Level, flex::Tiling),
}

impl Way {
    fn forward(
        self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        problem: &Problem,
    ) -> (Tensor<4>, Tensor<3>) {
        match self {
            Self::Best => {
                #[cfg(any(feature = "cuda", feature = "wgpu"))]
                if let Some(results) = gpu::forward(&q, &k, &v, problem) {
                    return results;
                }
                let dtype = q.dtype();
                if dtype != computed_in(dtype) {
                    let [q, k, v] = [q, k, v].map(computed);
                    let (out, lse) = self.forward(q, k, v, problem);
                    return (out.cast(dtype), lse);
                }
                #[cfg(feature = "flex")]
                if let Some(results) = flex::forward(&q, &k, &v, problem) {
                    return results;
                }
                forward_in(Blocks::DEFAULT, q, k, v, problem)
            }
            Self::Portable(blocks) => forward_in(blocks, q, k, v, problem),
            #[cfg(all(test, feature = "flex"))]
            Self::Flex(level, tiling) => flex::forward_in((level, tiling), &q, &k, &v, problem),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the names of the formula")]
    fn backward(
        self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        out: Tensor<4>,
        lse: Tensor<3>,
        dout: Tensor<4>,
        problem: &Problem,
    ) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        #[cfg(any(feature = "cuda", feature = "wgpu", feature = "flex"))]
        let tensors = [&q, &k, &v, &out, &dout];
        match self {
            Self::Best => {
                #[cfg(any(feature = "cuda", feature = "wgpu"))]
                if let Some([dq, dk, dv]) = gpu::backward(tensors, &lse, problem) {
                    return (dq, dk, dv);
                }
                let dtype = q.dtype();
                if dtype != computed_in(dtype) {
                    let [q, k, v, out, dout] = [q, k, v, out, dout].map(computed);
                    let gradients = self.backward(q, k, v, out, computed(lse), dout, problem);
                    let [dq, dk, dv] = <[_; 3]>::from(gradients).map(|x| x.cast(dtype));
                    return (dq, dk, dv);
                }
                #[cfg(feature = "flex")]
                if let Some([dq, dk, dv]) = flex::backward(tensors, &lse, problem) {
                    return (dq, dk, dv);
                }
                backward_in(Blocks::DEFAULT, q, k, v, out, lse, dout, problem)
            }
            Self::Portable(blocks) => backward_in(blocks, q, k, v, out, lse, dout, problem),
            #[cfg(all(test, feature = "flex"))]
            Self::Flex(level, tiling) => {
                let [dq, dk, dv] = flex::backward_in((level, tiling), tensors, &lse, problem);
                (dq, dk, dv)
            }
        }
    }
}

/// [`softmax_attention`], in this way.
fn attached(
    way: Way,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    problem: Problem,
) -> (Tensor<4>, Tensor<3>) {
    let inputs = [q, k, v];
    let [q, k, v] = inputs.clone().map(Tensor::inner);
    let (out, lse) = way.forward(q.clone(), k.clone(), v.clone(), &problem);
    let constant_lse = match inputs.iter().find(|input| input.is_autodiff()) {
        Some(input) => vjp::constant_like(lse.clone(), input),
        None => lse.clone(),
    };
    let kept = out.clone();
    let out = vjp::attach3(inputs, out, move |dout| {
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        let (out, lse) = (kept.clone(), lse.clone());
        let (dq, dk, dv) = way.backward(q, k, v, out, lse, dout, &problem);
        Ok::<_, Infallible>([dq, dk, dv])
    });
    (out, constant_lse)
}
