//! The gradients: for each tile of keys the blocks of rows, with the weights recomputed from the logsumexp.
//!
//! Five products a tile: scores and the weights' gradients, then what the tile adds to `dv`, `dk` and `dq`. The
//! sums of `dk` and `dv` belong to the tile of keys and stay in the second cache.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::f64::consts::LOG2_E;
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::forward::padded;
use super::rows::{NewRows, Rows};
use super::visible::Visible;
use super::{Head, Tiling, numbers, pack};
use crate::attention::softmax::{Problem, positions_of};
use crate::simd::{Ahead, Left, Level, Run, Store, exp2, multiply, panel_width};

/// One backward: what is read, and what is written.
pub(super) struct Backward<'a> {
    pub(super) level: Level,
    pub(super) tiling: Tiling,
    pub(super) problem: &'a Problem,
    pub(super) keys: usize,
    pub(super) q: Rows<'a>,
    pub(super) k: Rows<'a>,
    pub(super) v: Rows<'a>,
    pub(super) out: Rows<'a>,
    pub(super) dout: Rows<'a>,
    pub(super) lse: Rows<'a>,
    pub(super) dq: NewRows,
    /// `dk` and `dv` of each chunk of queries.
    pub(super) sums: Vec<[NewRows; 2]>,
}

/// The queries in as many chunks as make enough parts of the work of so few heads; `dk` and `dv` are in memory once for each.
/// Chunks depend on the problem alone, never on the threads, so that sums over them have the same bits on any number of threads.
pub(super) fn chunks(heads: usize, queries: usize) -> Vec<Range<usize>> {
    const PARTS: usize = 8;
    const LEAST: usize = 256;
    let count = PARTS
        .div_ceil(heads.max(1))
        .min(queries.div_ceil(LEAST))
        .max(1);
    (0..count)
        .map(|i| queries * i / count..queries * (i + 1) / count)
        .collect()
}

/// What one thread needs for a head; kept from one to the next.
#[derive(Default)]
struct Scratch {
    visible: Visible,
    k_transposed: Vec<f32>,
    v_transposed: Vec<f32>,
    k: Vec<f32>,
    q_rows: Vec<f32>,
    q: Vec<f32>,
    dout_rows: Vec<f32>,
    dout: Vec<f32>,
    /// Of each row, the logsumexp to base 2 and `dout · out`.
    known: Vec<[f32; 2]>,
    weights: Vec<f32>,
    scores: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    dropped: Vec<bool>,
    /// What the next part reads and writes.
    ahead: Ahead,
}

impl Backward<'_> {
    /// Every chunk of queries of every head by itself.
    pub(super) fn run(&self, heads: &[Head], chunks: &[Range<usize>]) {
        if self.tiling.few.takes(self.keys, self.problem) {
            return self.run_few(heads, chunks);
        }
        let parts: Vec<_> = (heads.iter())
            .flat_map(|head| chunks.iter().zip(&self.sums).map(move |part| (head, part)))
            .collect();
        let widths = self.q.width() + self.v.width();
        (0..parts.len())
            .into_par_iter()
            .for_each_init(Scratch::default, |scratch, index| {
                let (head, (queries, sums)) = parts[index];
                let work = queries.len() * self.keys * head.query.len() * 5 * widths / 2;
                let next = parts.get(index + 1);
                let runs = next.into_iter().flat_map(|&next| self.runs(next));
                (scratch.ahead).want_within(runs, queries.len().min(self.keys), work, usize::MAX);
                self.level.run(Part {
                    backward: self,
                    head,
                    queries: queries.clone(),
                    sums,
                    scratch,
                });
            });
    }

    /// What a part reads and writes.
    fn runs<'r>(
        &'r self,
        (head, (queries, [dk, dv])): (&'r Head, (&'r Range<usize>, &'r [NewRows; 2])),
    ) -> impl Iterator<Item = Run> + use<'r> {
        let Head { sample, kv, .. } = *head;
        let row = [sample, 0, kv];
        let of_kv = [self.k.run(row), self.v.run(row), dk.run(row), dv.run(row)];
        let of_query = head.query.clone().flat_map(move |query| {
            let row = [sample, queries.start, query];
            let read = [&self.q, &self.out, &self.dout].map(|x| x.run(row));
            read.into_iter().chain([self.dq.run(row)])
        });
        of_kv.into_iter().chain(of_query)
    }
}

/// Some queries of a head, with all its query heads, against all keys.
struct Part<'a> {
    backward: &'a Backward<'a>,
    head: &'a Head,
    queries: Range<usize>,
    sums: &'a [NewRows; 2],
    scratch: &'a mut Scratch,
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            backward,
            head,
            queries,
            sums: [dk_out, dv_out],
            scratch,
        } = self;
        let Backward {
            tiling,
            problem,
            keys,
            q,
            v,
            ..
        } = backward;
        let keys = *keys;
        let (lanes, panel) = (S::F32_LANES, panel_width::<S>());
        let group = head.query.len();
        let rows = queries.len() * group;
        let (width, value_width) = (q.width(), v.width());
        let [q_row, v_row] = [width, value_width].map(|width| width.next_multiple_of(lanes));
        let tile = tiling.keys.next_multiple_of(panel);
        let score_row = padded(tile);
        let whole_queries = (tiling.rows / group).max(1);
        let block = whole_queries * group;
        scratch.pack::<S>(backward, head, &queries);
        let Scratch {
            visible,
            k_transposed,
            v_transposed,
            k: packed_k,
            q_rows,
            q: packed_q,
            dout_rows,
            dout: packed_dout,
            known,
            weights,
            scores,
            dq,
            dk,
            dv,
            dropped,
            ahead,
        } = scratch;
        weights.resize(block * score_row, 0.0);
        scores.resize(block * score_row, 0.0);
        dq.clear();
        dq.resize(rows * q_row, 0.0);

        for first_key in (0..keys).step_by(tile) {
            let of_tile = first_key..keys.min(first_key + tile);
            for (sums, row) in [(&mut *dk, q_row), (&mut *dv, v_row)] {
                sums.clear();
                sums.resize(of_tile.len() * row, 0.0);
            }
            for first_row in (0..rows).step_by(block) {
                let of_block = first_row..rows.min(first_row + block);
                let mut of_queries = of_block.start / group..of_block.end / group;
                let seen = visible.hull(of_queries.clone(), &of_tile);
                if seen.is_empty() {
                    continue;
                }
                // Without the queries that see nothing of the tile.
                let sees = |query: usize| !visible.hull(query..query + 1, &of_tile).is_empty();
                while !sees(of_queries.start) {
                    of_queries.start += 1;
                }
                while !sees(of_queries.end - 1) {
                    of_queries.end -= 1;
                }
                let (first_row, rows) = (of_queries.start * group, of_queries.len() * group);
                let start = seen.start / panel * panel;
                let columns = (seen.end - start).next_multiple_of(lanes);
                multiply(
                    simd,
                    [rows, columns, width],
                    Left::rows(&q_rows[first_row * q_row..], q_row),
                    (&k_transposed[start * width..], width),
                    (weights, score_row),
                    Store::Set,
                    ahead,
                );
                multiply(
                    simd,
                    [rows, columns, value_width],
                    Left::rows(&dout_rows[first_row * v_row..], v_row),
                    (&v_transposed[start * value_width..], value_width),
                    (scores, score_row),
                    Store::Set,
                    ahead,
                );
                let dropping = problem.dropout.map(|dropout| {
                    let sample = numbers(&problem.samples, head.sample).next();
                    let keys = positions_of(&problem.key_positions, start..seen.end);
                    (dropout, sample.unwrap_or_default(), keys)
                });
                for row in 0..rows {
                    let of_row = row * score_row..row * score_row + columns;
                    let (weights, scores) = (&mut weights[of_row.clone()], &mut scores[of_row]);
                    let (query, at) = head.row(&queries, first_row + row);
                    visible.hide(query, weights, start);
                    let [lse, delta] = known[first_row + row];
                    let Some((dropout, sample, keys)) = &dropping else {
                        differentiate(simd, weights, scores, lse, delta);
                        continue;
                    };
                    dropped.clear();
                    let query = numbers(&problem.query_positions, at[1]).next();
                    let of_row = [
                        *sample,
                        problem.heads.query.start + at[2],
                        query.unwrap_or_default(),
                    ];
                    dropout.extend(dropped, of_row, keys);
                    let kept = dropout.scale() as f32;
                    let drop_out = |row: &mut [f32]| {
                        for (x, dropped) in row.iter_mut().zip(&*dropped) {
                            *x = if *dropped { 0.0 } else { *x * kept };
                        }
                    };
                    drop_out(scores);
                    differentiate(simd, weights, scores, lse, delta);
                    drop_out(weights);
                }
                // The keys of the tile that are seen, of the matrices of weights and of sums.
                let (in_scores, in_tile) = (seen.start - start, seen.start - first_key);
                multiply(
                    simd,
                    [seen.len(), value_width, rows],
                    Left::columns(&weights[in_scores..], score_row),
                    (&packed_dout[first_row * panel..], known.len()),
                    (&mut dv[in_tile * v_row..], v_row),
                    Store::Add,
                    ahead,
                );
                multiply(
                    simd,
                    [seen.len(), width, rows],
                    Left::columns(&scores[in_scores..], score_row),
                    (&packed_q[first_row * panel..], known.len()),
                    (&mut dk[in_tile * q_row..], q_row),
                    Store::Add,
                    ahead,
                );
                multiply(
                    simd,
                    [rows, width, seen.len()],
                    Left::rows(&scores[in_scores..], score_row),
                    (&packed_k[seen.start * panel..], keys),
                    (&mut dq[first_row * q_row..], q_row),
                    Store::Add,
                    ahead,
                );
            }
            scale(dk, problem.scale as f32);
            let at = [head.sample, first_key, head.kv];
            // SAFETY: these sums are this chunk's, this part alone has this head of it, and writes a row of it once.
            unsafe {
                dk_out.write(at, dk.chunks(q_row));
                dv_out.write(at, dv.chunks(v_row));
            }
        }
        scale(dq, problem.scale as f32);
        for (i, query) in head.query.clone().enumerate() {
            let at = [head.sample, queries.start, query];
            let of_query = dq[i * q_row..].chunks(q_row).step_by(group);
            // SAFETY: this part alone has these queries of this head, and writes a row of them once.
            unsafe { backward.dq.write(at, of_query) };
        }
    }
}

impl Scratch {
    #[inline(always)]
    fn pack<S: Simd>(&mut self, backward: &Backward<'_>, head: &Head, queries: &Range<usize>) {
        let Backward {
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
        let positions = numbers(&problem.query_positions, queries.start).take(queries.len());
        (self.visible).find(
            &problem.mask,
            head.sample,
            positions,
            &problem.key_positions,
        );
        let [of_k, of_v] = [k, v].map(|x| x.positions(head.sample, &(0..*keys), head.kv));
        pack::transposed_panels::<S>(&mut self.k_transposed, of_k.clone(), *keys, k.width());
        pack::transposed_panels::<S>(&mut self.v_transposed, of_v, *keys, v.width());
        pack::panels::<S>(&mut self.k, of_k, *keys, k.width());
        let rows = queries.len() * head.query.len();
        let scale = (problem.scale * LOG2_E) as f32;
        pack::by_rows::<S>(&mut self.q_rows, head.rows(q, queries), q.width(), scale);
        pack::panels::<S>(&mut self.q, head.rows(q, queries), rows, q.width());
        pack::by_rows::<S>(
            &mut self.dout_rows,
            head.rows(dout, queries),
            v.width(),
            1.0,
        );
        pack::panels::<S>(&mut self.dout, head.rows(dout, queries), rows, v.width());
        self.known.clear();
        let results = head.rows(out, queries).zip(head.rows(dout, queries));
        for (lse, (out, dout)) in head.rows(lse, queries).zip(results) {
            self.known.push([known_lse(lse[0]), dot(out, dout)]);
        }
    }
}

/// Scores become weights, and the weights' gradients those of the scores: `p = 2^(s − lse)`, `ds = p (dp − δ)`.
#[inline(always)]
fn differentiate<S: Simd>(
    simd: S,
    scores: &mut [f32],
    gradients: &mut [f32],
    lse: f32,
    delta: f32,
) {
    let (scores, _) = S::as_mut_simd_f32s(scores);
    let (gradients, _) = S::as_mut_simd_f32s(gradients);
    let (lse, delta) = (simd.splat_f32s(lse), simd.splat_f32s(delta));
    for (score, gradient) in scores.iter_mut().zip(gradients) {
        *score = exp2(simd, simd.sub_f32s(*score, lse));
        *gradient = simd.mul_f32s(*score, simd.sub_f32s(*gradient, delta));
    }
}

/// A logsumexp to base 2. The weights of a row that saw nothing are 2^−∞.
#[inline(always)]
pub(super) fn known_lse(lse: f32) -> f32 {
    match lse == f32::NEG_INFINITY {
        true => f32::INFINITY,
        false => lse * LOG2_E as f32,
    }
}

#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums side by side, which any processor adds at once.
    let mut sums = [0.0; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[inline(always)]
pub(super) fn scale(rows: &mut [f32], factor: f32) {
    rows.iter_mut().for_each(|x| *x *= factor);
}
