//! The output and the logsumexp.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::f64::consts::{LN_2, LOG2_E};
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::backward::scale;
use super::super::forward::Forward;
use super::super::visible::Visible;
use super::super::{Head, pack, shared_out};
use super::{BURST, ROW, counted, hide, see, side_by_side};
use crate::attention::Mask;
use crate::simd::{Ahead, Left, Run, Store, exp2, multiply};

/// Parts for each thread, where there are so many.
const PARTS: usize = 4;

/// What one thread needs for a part; kept from one to the next.
#[derive(Default)]
struct Scratch {
    visible: Visible,
    v: Vec<f32>,
    q_transposed: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    /// Of each row, the largest score, and then its logsumexp.
    largest: Vec<f32>,
    /// Of each row, the sum of the powers relative to its largest score.
    sums: Vec<f32>,
    /// What the next part reads and writes.
    ahead: Ahead,
}

/// Heads of a sample that lie side by side, and some queries with all their query heads, against all keys.
struct Part<'a> {
    forward: &'a Forward<'a>,
    heads: &'a [Head],
    queries: Range<usize>,
    scratch: &'a mut Scratch,
}

impl Forward<'_> {
    /// Some heads of a sample at a time, and where those are few, some queries.
    pub(in super::super) fn run_few(&self, heads: &[Head]) {
        let [queries, keys] = self.lengths;
        let parts = shared_out(heads, self.problem.heads.kv().len());
        let threads = rayon::current_num_threads();
        let piece = queries
            .div_ceil((PARTS * threads).div_ceil(parts.len()))
            .max(self.tiling.few.rows);
        let cut = |heads| {
            let starts = (0..queries).step_by(piece);
            starts.map(move |start| (heads, start..queries.min(start + piece)))
        };
        let parts: Vec<(&[Head], _)> = parts.into_iter().flat_map(cut).collect();
        (0..parts.len())
            .into_par_iter()
            .for_each_init(Scratch::default, |scratch, index| {
                let (heads, queries) = parts[index].clone();
                let ahead = &mut scratch.ahead;
                match parts.get(index + 1) {
                    Some((next, of_next)) => {
                        let count = of_next.len().min(keys);
                        let work = self.work(heads, &queries);
                        ahead.want_within(self.runs_of(next, of_next), count, work, BURST);
                    }
                    None => ahead.want([], 0),
                }
                self.level.run(Part {
                    forward: self,
                    heads,
                    queries,
                    scratch,
                });
            });
    }

    /// What a part does, in multiply-adds.
    fn work(&self, heads: &[Head], queries: &Range<usize>) -> usize {
        let [_, keys] = self.lengths;
        let of_head = |head: &Head| {
            let rows = queries.len() * head.query.len();
            rows * keys * (self.q.width() + self.v.width()) + (keys + 2 * rows) * ROW
        };
        heads.iter().map(of_head).sum()
    }

    /// What a part reads and writes.
    fn runs_of(&self, heads: &[Head], queries: &Range<usize>) -> impl Iterator<Item = Run> {
        let (sample, kv, query) = side_by_side(heads);
        let (of_kv, of_query) = ([sample, 0, kv.start], [sample, queries.start, query.start]);
        let read = [
            (&self.k, of_kv, kv.len()),
            (&self.v, of_kv, kv.len()),
            (&self.q, of_query, query.len()),
        ];
        (read.into_iter())
            .flat_map(|(rows, row, heads)| rows.runs(row, heads))
            .chain([self.out.runs(of_query, query.len())])
    }
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            forward,
            heads,
            queries: all_queries,
            scratch,
        } = self;
        let Forward {
            problem,
            lengths: [_, keys],
            q,
            k,
            v,
            ..
        } = forward;
        let (mut keys, lanes) = (*keys, S::F32_LANES);
        let (width, value_width) = (q.width(), v.width());
        let out_row = value_width.next_multiple_of(lanes);
        let factor = (problem.scale * LOG2_E) as f32;
        let Scratch {
            visible,
            v: packed_v,
            q_transposed,
            scores,
            out,
            largest,
            sums,
            ahead,
        } = scratch;
        let masked = problem.mask != Mask::Full;
        if masked {
            keys = see(visible, problem, heads, all_queries.clone(), keys);
        }
        for head in heads {
            let (group, sample) = (head.query.len(), head.sample);
            let block = forward.tiling.few.queries(group);
            let of_v = counted(v.positions(sample, &(0..keys), head.kv), ahead);
            pack::panels::<S>(packed_v, of_v, keys, value_width);
            for start in all_queries.clone().step_by(block) {
                let queries = start..all_queries.end.min(start + block);
                let rows = queries.len() * group;
                let stride = rows.next_multiple_of(lanes);
                let of_q = counted(head.rows(q, &queries), ahead);
                pack::transposed_panels::<S>(q_transposed, of_q, rows, width);
                scale(q_transposed, factor);
                scores.resize(keys * stride, 0.0);
                multiply(
                    simd,
                    [keys, rows, width],
                    k.left([sample, 0, head.kv]),
                    (q_transposed, width),
                    (scores, stride),
                    Store::Set,
                    ahead,
                );
                if masked {
                    hide(
                        visible,
                        start - all_queries.start,
                        group,
                        rows,
                        &mut scores[..keys * stride],
                        stride,
                    );
                }
                largest.resize(stride, 0.0);
                sums.resize(stride, 0.0);
                softmax(
                    simd,
                    &mut scores[..keys * stride],
                    &mut largest[..stride],
                    &mut sums[..stride],
                );
                out.resize(rows * out_row, 0.0);
                multiply(
                    simd,
                    [rows, value_width, keys],
                    Left::columns(scores, stride),
                    (packed_v, keys),
                    (out, out_row),
                    Store::Set,
                    ahead,
                );
                // A row that saw nothing has neither a largest score nor a sum: −∞.
                for (largest, sum) in largest.iter_mut().zip(&*sums).take(rows) {
                    *largest = (*largest + sum.log2()) * LN_2 as f32;
                }
                for (i, query) in head.query.clone().enumerate() {
                    let at = [sample, start, query];
                    let of_out = out[i * out_row..rows * out_row]
                        .chunks(out_row)
                        .step_by(group);
                    let of_lse = largest[i..rows].chunks(1).step_by(group);
                    // SAFETY: this part alone has these queries of this head, and writes their rows once.
                    unsafe {
                        forward.out.write(at, counted(of_out, ahead));
                        forward.lse.write(at, of_lse);
                    }
                }
            }
        }
    }
}

/// Scores become weights, down the lanes: `p = 2^(s − largest) / sum`. Rows that see nothing have none.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32], largest: &mut [f32], sums: &mut [f32]) {
    let (scores, _) = S::as_mut_simd_f32s(scores);
    let (largest, _) = S::as_mut_simd_f32s(largest);
    let (sums, _) = S::as_mut_simd_f32s(sums);
    let vectors = largest.len();
    for (lane, (largest, sum)) in largest.iter_mut().zip(sums).enumerate() {
        let mut most = simd.splat_f32s(f32::NEG_INFINITY);
        for of_key in scores.chunks_exact(vectors) {
            most = simd.max_f32s(most, of_key[lane]);
        }
        let shift = simd.max_f32s(simd.splat_f32s(f32::MIN), most);
        let mut total = simd.splat_f32s(0.0);
        for of_key in scores.chunks_exact_mut(vectors) {
            let power = exp2(simd, simd.sub_f32s(of_key[lane], shift));
            total = simd.add_f32s(total, power);
            of_key[lane] = power;
        }
        // Powers that are all 0 stay so.
        let some = simd.max_f32s(simd.splat_f32s(f32::MIN_POSITIVE), total);
        let share = simd.div_f32s(simd.splat_f32s(1.0), some);
        for of_key in scores.chunks_exact_mut(vectors) {
            of_key[lane] = simd.mul_f32s(of_key[lane], share);
        }
        (*largest, *sum) = (most, total);
    }
}
