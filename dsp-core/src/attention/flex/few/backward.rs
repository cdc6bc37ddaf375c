//! The gradients, with the weights recomputed from the logsumexp.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::f64::consts::LOG2_E;
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::backward::{Backward, dot, known_lse, scale};
use super::super::rows::NewRows;
use super::super::visible::Visible;
use super::super::{Head, pack, shared_out};
use super::{BURST, ROW, counted, hide, see, side_by_side};
use crate::attention::Mask;
use crate::simd::{Ahead, Left, Run, Store, exp2, multiply};

/// What one thread needs for a part; kept from one to the next.
#[derive(Default)]
struct Scratch {
    visible: Visible,
    k: Vec<f32>,
    q_transposed: Vec<f32>,
    q: Vec<f32>,
    dout_transposed: Vec<f32>,
    dout: Vec<f32>,
    /// Of each row, the logsumexp to base 2.
    lse: Vec<f32>,
    /// Of each row, `dout · out`.
    delta: Vec<f32>,
    weights: Vec<f32>,
    gradients: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// The gradient of a key that none sees.
    nothing: Vec<f32>,
    /// What the next part reads and writes.
    ahead: Ahead,
}

/// Heads of a sample that lie side by side, and some queries with all their query heads, against all keys.
struct Part<'a> {
    backward: &'a Backward<'a>,
    heads: &'a [Head],
    queries: Range<usize>,
    sums: &'a [NewRows; 2],
    scratch: &'a mut Scratch,
}

impl Backward<'_> {
    /// Some heads of a sample at a time, and each chunk of queries by itself.
    pub(in super::super) fn run_few(&self, heads: &[Head], chunks: &[Range<usize>]) {
        let parts: Vec<_> = (shared_out(heads, self.problem.heads.kv().len()).into_iter())
            .flat_map(|heads| chunks.iter().zip(&self.sums).map(move |part| (heads, part)))
            .collect();
        (0..parts.len())
            .into_par_iter()
            .for_each_init(Scratch::default, |scratch, index| {
                let (heads, (queries, sums)) = parts[index];
                match parts.get(index + 1) {
                    Some(&next) => {
                        let count = next.1.0.len().min(self.keys);
                        let work = self.work(heads, queries);
                        (scratch.ahead).want_within(self.runs_of(next), count, work, BURST);
                    }
                    None => scratch.ahead.want([], 0),
                }
                self.level.run(Part {
                    backward: self,
                    heads,
                    queries: queries.clone(),
                    sums,
                    scratch,
                });
            });
    }

    /// What a part does, in multiply-adds.
    fn work(&self, heads: &[Head], queries: &Range<usize>) -> usize {
        let of_head = |head: &Head| {
            let rows = queries.len() * head.query.len();
            let widths = self.q.width() + self.v.width();
            rows * self.keys * 5 * widths / 2 + (3 * self.keys + 4 * rows) * ROW
        };
        heads.iter().map(of_head).sum()
    }

    /// What a part reads and writes.
    fn runs_of<'r>(
        &'r self,
        (heads, (queries, [dk, dv])): (&'r [Head], (&'r Range<usize>, &'r [NewRows; 2])),
    ) -> impl Iterator<Item = Run> + use<'r> {
        let (sample, kv, query) = side_by_side(heads);
        let (of_kv, of_query) = ([sample, 0, kv.start], [sample, queries.start, query.start]);
        let reads = [&self.k, &self.v].map(|x| (x, of_kv, kv.len()));
        let reads_of_query = [&self.q, &self.out, &self.dout].map(|x| (x, of_query, query.len()));
        let reads = reads.into_iter().chain(reads_of_query);
        let writes = [
            (dk, of_kv, kv.len()),
            (dv, of_kv, kv.len()),
            (&self.dq, of_query, query.len()),
        ];
        (reads.flat_map(|(rows, row, heads)| rows.runs(row, heads)))
            .chain(writes.map(|(rows, row, heads)| rows.runs(row, heads)))
    }
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            backward,
            heads,
            queries: all_queries,
            sums: [dk_out, dv_out],
            scratch,
        } = self;
        let Backward {
            tiling,
            problem,
            keys,
            q,
            k,
            v,
            out,
            dout,
            lse,
            ..
        } = backward;
        let (all_keys, lanes) = (*keys, S::F32_LANES);
        let (width, value_width) = (q.width(), v.width());
        let [q_row, v_row] = [width, value_width].map(|width| width.next_multiple_of(lanes));
        let factor = (problem.scale * LOG2_E) as f32;
        let Scratch {
            visible,
            k: packed_k,
            q_transposed,
            q: packed_q,
            dout_transposed,
            dout: packed_dout,
            lse: known,
            delta,
            weights,
            gradients,
            dq,
            dk,
            dv,
            nothing,
            ahead,
        } = scratch;
        let mut keys = all_keys;
        let masked = problem.mask != Mask::Full;
        if masked {
            keys = see(visible, problem, heads, all_queries.clone(), keys);
        }
        dk.resize(keys * q_row, 0.0);
        dv.resize(keys * v_row, 0.0);
        nothing.resize(q_row.max(v_row), 0.0);
        for head in heads {
            let (group, sample) = (head.query.len(), head.sample);
            let block = tiling.few.queries(group);
            let of_k = counted(k.positions(sample, &(0..keys), head.kv), ahead);
            pack::panels::<S>(packed_k, of_k, keys, width);
            for start in all_queries.clone().step_by(block) {
                let queries = start..all_queries.end.min(start + block);
                let rows = queries.len() * group;
                let stride = rows.next_multiple_of(lanes);
                let of_q = head.rows(q, &queries);
                let of_dout = head.rows(dout, &queries);
                let counted_q = counted(of_q.clone(), ahead);
                pack::transposed_panels::<S>(q_transposed, counted_q, rows, width);
                scale(q_transposed, factor);
                pack::panels::<S>(packed_q, of_q, rows, width);
                let counted_dout = counted(of_dout.clone(), ahead);
                pack::transposed_panels::<S>(dout_transposed, counted_dout, rows, value_width);
                pack::panels::<S>(packed_dout, of_dout.clone(), rows, value_width);
                // Lanes beyond the rows have no weights.
                known.clear();
                known.extend(head.rows(lse, &queries).map(|lse| known_lse(lse[0])));
                known.resize(stride, f32::INFINITY);
                delta.clear();
                let results = counted(head.rows(out, &queries), ahead).zip(of_dout);
                delta.extend(results.map(|(out, dout)| dot(out, dout)));
                delta.resize(stride, 0.0);

                let scores = keys * stride;
                weights.resize(scores, 0.0);
                gradients.resize(scores, 0.0);
                multiply(
                    simd,
                    [keys, rows, width],
                    k.left([sample, 0, head.kv]),
                    (q_transposed, width),
                    (weights, stride),
                    Store::Set,
                    ahead,
                );
                multiply(
                    simd,
                    [keys, rows, value_width],
                    v.left([sample, 0, head.kv]),
                    (dout_transposed, value_width),
                    (gradients, stride),
                    Store::Set,
                    ahead,
                );
                if masked {
                    hide(
                        visible,
                        start - all_queries.start,
                        group,
                        rows,
                        &mut weights[..scores],
                        stride,
                    );
                }
                let pairs = (&mut weights[..scores], &mut gradients[..scores]);
                differentiate(simd, pairs, known, delta);
                let store = match start == all_queries.start {
                    true => Store::Set,
                    false => Store::Add,
                };
                multiply(
                    simd,
                    [keys, value_width, rows],
                    Left::rows(weights, stride),
                    (packed_dout, rows),
                    (dv, v_row),
                    store,
                    ahead,
                );
                multiply(
                    simd,
                    [keys, width, rows],
                    Left::rows(gradients, stride),
                    (packed_q, rows),
                    (dk, q_row),
                    store,
                    ahead,
                );
                dq.resize(rows * q_row, 0.0);
                multiply(
                    simd,
                    [rows, width, keys],
                    Left::columns(gradients, stride),
                    (packed_k, keys),
                    (dq, q_row),
                    Store::Set,
                    ahead,
                );
                scale(dq, problem.scale as f32);
                for (i, query) in head.query.clone().enumerate() {
                    let of_query = dq[i * q_row..rows * q_row].chunks(q_row).step_by(group);
                    let at = [sample, start, query];
                    // SAFETY: this part alone has these queries of this head, and writes a row of them once.
                    unsafe { (backward.dq).write(at, counted(of_query, ahead)) };
                }
            }
            scale(dk, problem.scale as f32);
            let at = [sample, 0, head.kv];
            let unseen = std::iter::repeat_n(&nothing[..], all_keys - keys);
            let dk = dk.chunks(q_row).chain(unseen.clone());
            let dv = dv.chunks(v_row).chain(unseen);
            // SAFETY: these sums are this chunk's, this part alone has this head of it, and writes a row of it once.
            unsafe {
                dk_out.write(at, counted(dk, ahead));
                dv_out.write(at, counted(dv, ahead));
            }
        }
    }
}

/// Scores become weights, and the weights' gradients those of the scores, down the lanes: `p = 2^(s − lse)`,
/// `ds = p (dp − δ)`.
#[inline(always)]
fn differentiate<S: Simd>(
    simd: S,
    (scores, gradients): (&mut [f32], &mut [f32]),
    lse: &[f32],
    delta: &[f32],
) {
    let (scores, _) = S::as_mut_simd_f32s(scores);
    let (gradients, _) = S::as_mut_simd_f32s(gradients);
    let ((lse, _), (delta, _)) = (S::as_simd_f32s(lse), S::as_simd_f32s(delta));
    let of_keys = (scores.chunks_exact_mut(lse.len())).zip(gradients.chunks_exact_mut(lse.len()));
    for (scores, gradients) in of_keys {
        let known = lse.iter().zip(delta);
        for ((score, gradient), (lse, delta)) in scores.iter_mut().zip(gradients).zip(known) {
            *score = exp2(simd, simd.sub_f32s(*score, *lse));
            *gradient = simd.mul_f32s(*score, simd.sub_f32s(*gradient, *delta));
        }
    }
}
