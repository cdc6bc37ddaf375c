//! The forward sweep: of a block the output, and the state after it.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::ops::Range;

use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::super::rows::{NewRows, Rows};
use super::super::super::{pack, tensor};
use super::super::parts::{of_state, parts, steps};
use super::super::states::{StatesOut, hand_on};
use super::super::{Powers, input, output};
use crate::attention::linear::Problem;
use crate::simd::{Level, Run};

/// The output: `[B, L, Hq, dv]`; the state that leaves, `[B, Hq, d, dv]`, and those that the blocks meet,
/// `[B, Hq, blocks·d, dv]`.
pub(in super::super) fn forward(
    level: Level,
    [q, k, v]: [&Tensor<4>; 3],
    blocks: &[Range<usize>],
    problem: &Problem,
) -> (Tensor<4>, [Tensor<4>; 2]) {
    let ([samples, length, heads, d], dv) = (q.dims(), v.dims()[3]);
    let device = q.device();
    let inputs = [q, k, v].map(input);
    let [q, k, v] = inputs.each_ref().map(Rows::of);
    let forward = Forward {
        q,
        k,
        v,
        powers: &Powers::all(problem, blocks),
        blocks,
        problem,
        out: NewRows::new([samples, length, heads], dv),
        states: StatesOut::new([samples, heads, blocks.len()], [d, dv]),
    };
    let of_part = |scratch: &mut _, (sample, heads)| {
        level.run(Part {
            forward: &forward,
            sample,
            heads,
            scratch,
        });
    };
    (parts(samples, heads).into_par_iter()).for_each_init(Scratch::default, of_part);
    let Forward { out, states, .. } = forward;
    let out = tensor(out.all(), [samples, length, heads, dv], &device);
    (out, states.tensors(&device))
}

/// What a thread needs for a part; kept from one to the next.
#[derive(Default)]
struct Scratch {
    block: output::Scratch,
    k: Vec<f32>,
    states: Vec<f32>,
}

/// One forward: what is read, and what is written.
struct Forward<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    powers: &'a [Powers],
    blocks: &'a [Range<usize>],
    problem: &'a Problem,
    out: NewRows,
    states: StatesOut,
}

/// Query heads of a sample that lie side by side.
struct Part<'a> {
    forward: &'a Forward<'a>,
    sample: usize,
    heads: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            forward,
            sample,
            heads,
            scratch,
        } = self;
        let Scratch {
            block,
            k: packed_k,
            states,
        } = scratch;
        let Forward {
            q, k, v, blocks, ..
        } = forward;
        let (d, dv) = (q.width(), v.width());
        let row = dv.next_multiple_of(S::F32_LANES);
        states.clear();
        states.resize(heads.len() * d * row, 0.0);
        for ([index, nth], next) in steps(0..blocks.len(), heads.len()) {
            let (rows, head) = (&blocks[index], heads.start + nth);
            let sizes @ [count, ..] = [rows.len(), d, dv];
            let powers = &forward.powers[head];
            let kv_head = forward.problem.kv_head(head);
            let state = &mut states[nth * d * row..(nth + 1) * d * row];
            if let Some([index, nth]) = next {
                let runs = forward.runs(sample, index, heads.start + nth);
                block.ahead.want(runs, blocks[index].len());
            }
            // SAFETY: this part alone has this head, and meets each of its blocks once.
            unsafe { (forward.states).meet([sample, head, index], state.chunks_exact(row)) };
            block.enter::<S>(q.positions(sample, rows, head), sizes);
            block.reach(
                simd,
                state.chunks_exact(row).map(|row| &row[..dv]),
                powers,
                sizes,
            );
            let of_k = k.positions(sample, rows, kv_head);
            let of_v = v.positions(sample, rows, kv_head);
            block.within(simd, (of_k.clone(), of_v), powers, sizes);
            // SAFETY: this part alone has this head, and each of its blocks comes once.
            unsafe { (forward.out).write([sample, rows.start, head], block.out.chunks_exact(row)) };
            let aged = (0..count).map(|row| powers.aged(row, count));
            pack::weighted_rows::<S>(packed_k, of_k.zip(aged), d);
            let kv = (&**packed_k, &*block.v_panels);
            hand_on(simd, state, powers, kv, sizes, &mut block.ahead);
        }
        // SAFETY: this part alone has these heads, and is at the end once.
        unsafe { (forward.states).leave([sample, heads.start], states.chunks_exact(row)) };
    }
}

impl Forward<'_> {
    /// What a block of a head reads and writes.
    fn runs(&self, sample: usize, index: usize, head: usize) -> [Run; 5] {
        let (rows, d) = (&self.blocks[index], self.q.width());
        let (at, kv_head) = (rows.start, self.problem.kv_head(head));
        let met = self.states.run([sample, head, index]);
        [
            self.q.run([sample, at, head]),
            self.k.run([sample, at, kv_head]),
            self.v.run([sample, at, kv_head]),
            self.out.run([sample, at, head]),
            of_state(met, d, rows.len()),
        ]
    }
}
