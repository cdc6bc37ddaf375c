//! The output and the logsumexp: for each strip of rows, tile by tile of keys, with an online softmax.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::f64::consts::{LN_2, LOG2_E};
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::rows::{NewRows, Rows};
use super::visible::Visible;
use super::{Head, Tiling, numbers, pack};
use crate::attention::softmax::{Problem, positions_of};
use crate::simd::{Ahead, Left, Level, Run, Store, exp2_row, multiply, panel_width, row_max};

/// One forward: what is read, and what is written.
pub(super) struct Forward<'a> {
    pub(super) level: Level,
    pub(super) tiling: Tiling,
    pub(super) problem: &'a Problem,
    /// Queries and keys.
    pub(super) lengths: [usize; 2],
    pub(super) q: Rows<'a>,
    pub(super) k: Rows<'a>,
    pub(super) v: Rows<'a>,
    pub(super) out: NewRows,
    pub(super) lse: NewRows,
}

/// Heads for each thread from which on they are shared out whole: no thread then waits long for another's last one.
const MANY: usize = 8;

/// The keys and values of one head, packed.
#[derive(Default)]
struct Packed {
    k: Vec<f32>,
    v: Vec<f32>,
}

/// What one thread needs for a block of rows; kept from one block to the next.
#[derive(Default)]
struct Scratch {
    visible: Visible,
    q: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    /// Of each row, the largest score so far and the sum of the powers relative to it.
    running: Vec<[f32; 2]>,
    dropped: Vec<bool>,
    /// What the next head reads and writes.
    ahead: Ahead,
}

impl Forward<'_> {
    /// Every head by itself, and where they are few, within a head every block of queries.
    pub(super) fn run(&self, heads: &[Head]) {
        if self.tiling.few.takes(self.lengths[1], self.problem) {
            return self.run_few(heads);
        }
        let many = heads.len() >= MANY * rayon::current_num_threads();
        (0..heads.len()).into_par_iter().for_each_init(
            Default::default,
            |(packed, scratch), index| {
                let (head, next) = (&heads[index], heads.get(index + 1));
                self.level.run(Pack {
                    forward: self,
                    head,
                    packed,
                });
                match many {
                    true => self.blocks(head, next, packed, scratch),
                    false => self.blocks_apart(head, packed),
                }
            },
        );
    }

    /// One after the other, with the rows of the next head asked for meanwhile.
    fn blocks(&self, head: &Head, next: Option<&Head>, packed: &Packed, scratch: &mut Scratch) {
        let [queries, keys] = self.lengths;
        let work = queries * keys * head.query.len() * (self.q.width() + self.v.width());
        let runs = next.into_iter().flat_map(|next| self.runs(next));
        (scratch.ahead).want_within(runs, queries.min(keys), work, usize::MAX);
        for index in 0..queries.div_ceil(self.block(head)) {
            self.run_block(head, packed, scratch, index);
        }
    }

    fn blocks_apart(&self, head: &Head, packed: &Packed) {
        (0..self.lengths[0].div_ceil(self.block(head)))
            .into_par_iter()
            .for_each_init(Scratch::default, |scratch, index| {
                self.run_block(head, packed, scratch, index);
            });
    }

    /// The queries of a block.
    fn block(&self, head: &Head) -> usize {
        (self.tiling.rows / head.query.len()).max(1)
    }

    fn run_block(&self, head: &Head, packed: &Packed, scratch: &mut Scratch, index: usize) {
        let ([queries, _], block) = (self.lengths, self.block(head));
        self.level.run(Block {
            forward: self,
            head,
            packed,
            queries: index * block..queries.min((index + 1) * block),
            scratch,
        });
    }

    /// What a head reads and writes.
    fn runs(&self, head: &Head) -> impl Iterator<Item = Run> {
        let Head { sample, kv, .. } = *head;
        let of_kv = [&self.k, &self.v].map(|x| x.run([sample, 0, kv]));
        let of_query = head.query.clone().flat_map(move |query| {
            let row = [sample, 0, query];
            [self.q.run(row), self.out.run(row)]
        });
        of_kv.into_iter().chain(of_query)
    }
}

struct Pack<'a> {
    forward: &'a Forward<'a>,
    head: &'a Head,
    packed: &'a mut Packed,
}

impl WithSimd for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Forward { k, v, lengths, .. } = self.forward;
        let Head { sample, kv, .. } = *self.head;
        let keys = lengths[1];
        let [of_k, of_v] = [k, v].map(|x| x.positions(sample, &(0..keys), kv));
        pack::transposed_panels::<S>(&mut self.packed.k, of_k, keys, k.width());
        pack::panels::<S>(&mut self.packed.v, of_v, keys, v.width());
    }
}

/// Some queries of a head, with all its query heads, against all keys.
struct Block<'a> {
    forward: &'a Forward<'a>,
    head: &'a Head,
    packed: &'a Packed,
    queries: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            forward,
            head,
            packed,
            queries,
            scratch,
        } = self;
        let Forward {
            tiling,
            problem,
            lengths: [_, keys],
            q,
            v,
            ..
        } = forward;
        let (lanes, panel) = (S::F32_LANES, panel_width::<S>());
        let group = head.query.len();
        let rows = queries.len() * group;
        let (width, value_width) = (q.width(), v.width());
        let [q_row, out_row] = [width, value_width].map(|width| width.next_multiple_of(lanes));
        let tile = tiling.keys.next_multiple_of(panel);
        let score_row = padded(tile);

        let Scratch {
            visible,
            q: packed_q,
            scores,
            out,
            running,
            dropped,
            ahead,
        } = scratch;
        let positions = numbers(&problem.query_positions, queries.start).take(queries.len());
        visible.find(
            &problem.mask,
            head.sample,
            positions,
            &problem.key_positions,
        );
        let scale = (problem.scale * LOG2_E) as f32;
        pack::by_rows::<S>(packed_q, head.rows(q, &queries), width, scale);
        out.clear();
        out.resize(rows * out_row, 0.0);
        scores.resize(tiling.strip * score_row, 0.0);
        running.clear();
        running.resize(rows, [f32::NEG_INFINITY, 0.0]);

        for first_key in (0..*keys).step_by(tile) {
            let of_tile = first_key..(*keys).min(first_key + tile);
            for first_row in (0..rows).step_by(tiling.strip) {
                let strip = first_row..rows.min(first_row + tiling.strip);
                let of_strip = strip.start / group..(strip.end - 1) / group + 1;
                let seen = visible.hull(of_strip, &of_tile);
                if seen.is_empty() {
                    continue;
                }
                let start = seen.start / panel * panel;
                let columns = (seen.end - start).next_multiple_of(lanes);
                multiply(
                    simd,
                    [strip.len(), columns, width],
                    Left::rows(&packed_q[first_row * q_row..], q_row),
                    (&packed.k[start * width..], width),
                    (scores, score_row),
                    Store::Set,
                    ahead,
                );
                let dropping = problem.dropout.map(|dropout| {
                    let sample = numbers(&problem.samples, head.sample).next();
                    let keys = positions_of(&problem.key_positions, start..seen.end);
                    (dropout, sample.unwrap_or_default(), keys)
                });
                for row in strip.clone() {
                    let begin = (row - first_row) * score_row;
                    let scores = &mut scores[begin..begin + columns];
                    let (query, at) = head.row(&queries, row);
                    visible.hide(query, scores, start);
                    let [largest, sum] = &mut running[row];
                    let now = largest.max(row_max(simd, scores));
                    // So far nothing was seen, or nothing larger: what was summed keeps its measure.
                    if *largest < now && *largest > f32::NEG_INFINITY {
                        let smaller = (*largest - now).exp2();
                        *sum *= smaller;
                        let out = &mut out[row * out_row..(row + 1) * out_row];
                        out.iter_mut().for_each(|x| *x *= smaller);
                    }
                    *largest = now;
                    *sum += exp2_row(simd, scores, now.max(f32::MIN));
                    if let Some((dropout, sample, keys)) = &dropping {
                        dropped.clear();
                        let query = numbers(&problem.query_positions, at[1]).next();
                        let of_row = [
                            *sample,
                            problem.heads.query.start + at[2],
                            query.unwrap_or_default(),
                        ];
                        dropout.extend(dropped, of_row, keys);
                        for (score, dropped) in scores.iter_mut().zip(&*dropped) {
                            if *dropped {
                                *score = 0.0;
                            }
                        }
                    }
                }
                multiply(
                    simd,
                    [strip.len(), value_width, seen.len()],
                    Left::rows(&scores[seen.start - start..], score_row),
                    (&packed.v[seen.start * panel..], *keys),
                    (&mut out[first_row * out_row..], out_row),
                    Store::Add,
                    ahead,
                );
            }
        }

        let kept = (problem.dropout).map_or(1.0, |dropout| dropout.scale() as f32);
        for (row, [largest, sum]) in running.iter_mut().enumerate() {
            // The largest power is 1, so that only a row that saw nothing has none: it keeps its 0 and its −∞.
            if *sum == 0.0 {
                continue;
            }
            let factor = kept / *sum;
            let out = &mut out[row * out_row..(row + 1) * out_row];
            out.iter_mut().for_each(|x| *x *= factor);
            *largest = (*largest + sum.log2()) * LN_2 as f32;
        }
        for (i, query) in head.query.clone().enumerate() {
            let at = [head.sample, queries.start, query];
            let of_out = out[i * out_row..].chunks(out_row).step_by(group);
            let of_lse = running[i..].iter().step_by(group).map(|row| &row[..1]);
            // SAFETY: this block alone has these queries of this head, and writes their rows once.
            unsafe {
                forward.out.write(at, of_out);
                forward.lse.write(at, of_lse);
            }
        }
    }
}

/// The stride of rows of so many scores: an odd number of cache lines, so that rows lie in different sets.
#[inline(always)]
pub(super) fn padded(columns: usize) -> usize {
    const LINE: usize = 16;
    let lines = columns.div_ceil(LINE);
    (lines + 1 - lines % 2) * LINE
}
