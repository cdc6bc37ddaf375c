//! The backward sweep, from the last block on: the gradients of a block, and that of the state before it.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::ops::Range;

use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::super::rows::{NewRows, Rows};
use super::super::super::{Head, heads_of, pack, shared_out, tensor};
use super::super::gradients::{self, Before};
use super::super::parts::steps;
use super::super::states::hand_on;
use super::super::{Powers, input, states_of};
use crate::attention::linear::Problem;
use crate::simd::{Level, Run};

/// The gradients of the query, the key and the value.
pub(in super::super) fn backward(
    level: Level,
    [q, k, v]: [&Tensor<4>; 3],
    dout: &Tensor<4>,
    met: &Tensor<5>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> [Tensor<4>; 3] {
    let (shapes, device) = ([q, k, v].map(Tensor::dims), q.device());
    let inputs = [q, k, v, dout].map(input);
    let met = states_of(met);
    let [q, k, v, dout] = inputs.each_ref().map(Rows::of);
    let [dq, dk, dv] =
        shapes.map(|[samples, length, heads, width]| NewRows::new([samples, length, heads], width));
    let backward = Backward {
        before: Before {
            q,
            dout,
            met: Rows::of(&met),
        },
        k,
        v,
        dq,
        dk,
        dv,
        powers: &Powers::all(problem, blocks),
        blocks,
    };
    let [samples, _, kv_heads, _] = shapes[1];
    let heads = heads_of(samples, &problem.heads);
    let of_part = |scratch: &mut _, heads| {
        level.run(Part {
            backward: &backward,
            heads,
            scratch,
        });
    };
    (shared_out(&heads, kv_heads).into_par_iter()).for_each_init(Scratch::default, of_part);
    let Backward { dq, dk, dv, .. } = backward;
    let [of_q, of_k, of_v] = shapes;
    [(dq, of_q), (dk, of_k), (dv, of_v)].map(|(rows, shape)| tensor(rows.all(), shape, &device))
}

/// What a thread needs for a part; kept from one to the next.
#[derive(Default)]
struct Scratch {
    block: gradients::Scratch,
    q: Vec<f32>,
    /// The gradients of the query heads' states.
    states: Vec<f32>,
}

/// One backward: what is read, and what is written.
struct Backward<'a> {
    before: Before<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    dq: NewRows,
    dk: NewRows,
    dv: NewRows,
    powers: &'a [Powers],
    blocks: &'a [Range<usize>],
}

/// Key-value heads of a sample that lie side by side, each with its query heads.
struct Part<'a> {
    backward: &'a Backward<'a>,
    heads: &'a [Head],
    scratch: &'a mut Scratch,
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            backward,
            heads,
            scratch,
        } = self;
        let Scratch {
            block,
            q: packed_q,
            states,
        } = scratch;
        let Backward {
            before,
            k,
            v,
            blocks,
            ..
        } = backward;
        let widths @ [d, dv] = [k.width(), v.width()];
        let row = dv.next_multiple_of(S::F32_LANES);
        let first = heads.first().map_or(0, |head| head.query.start);
        let queries: usize = heads.iter().map(|head| head.query.len()).sum();
        states.clear();
        states.resize(queries * d * row, 0.0);
        for ([index, nth], next) in steps((0..blocks.len()).rev(), heads.len()) {
            let (rows, head) = (&blocks[index], &heads[nth]);
            let (sample, count) = (head.sample, rows.len());
            let met = index * d..(index + 1) * d;
            if let Some([index, nth]) = next {
                let runs = backward.runs(index, &heads[nth]);
                block.ahead.want(runs, blocks[index].len());
            }
            let kv = (
                k.positions(sample, rows, head.kv),
                v.positions(sample, rows, head.kv),
            );
            block.enter::<S>(count, widths);
            block.pack::<S>(kv.clone(), count, widths);
            for query in head.query.clone() {
                let powers = &backward.powers[query];
                let at = (query - first) * d * row;
                let state = &mut states[at..at + d * row];
                block.before(simd, before, powers, (sample, rows, query), &met);
                let from = block.query_gradient::<S>(d);
                // SAFETY: this part alone has this head, and each of its blocks comes once.
                unsafe { (backward.dq).write([sample, rows.start, query], from) };
                let after = state.chunks_exact(row).map(|row| &row[..dv]);
                block.after(simd, kv.clone(), after, powers, [count, d, dv]);
                let reached = (0..count).map(|row| powers.reached(row));
                let of_q = before.q.positions(sample, rows, query);
                pack::weighted_rows::<S>(packed_q, of_q.zip(reached), d);
                let ab = (&**packed_q, &*block.dout_panels);
                hand_on(simd, state, powers, ab, [count, d, dv], &mut block.ahead);
            }
            let at = [sample, rows.start, head.kv];
            let [of_k, of_v] = block.key_gradients::<S>(widths);
            // SAFETY: this part alone has this head, and each of its blocks comes once.
            unsafe {
                backward.dk.write(at, of_k);
                backward.dv.write(at, of_v);
            }
        }
    }
}

impl Backward<'_> {
    /// What a block of a head reads and writes.
    fn runs(&self, index: usize, head: &Head) -> impl Iterator<Item = Run> {
        let (rows, sample) = (&self.blocks[index], head.sample);
        let at = [sample, rows.start, head.kv];
        let of_query = move |query| {
            let at = [sample, rows.start, query];
            let read = self.before.runs(at, index, rows.len());
            read.into_iter().chain([self.dq.run(at)])
        };
        [
            self.k.run(at),
            self.v.run(at),
            self.dk.run(at),
            self.dv.run(at),
        ]
        .into_iter()
        .chain(head.query.clone().flat_map(of_query))
    }
}
