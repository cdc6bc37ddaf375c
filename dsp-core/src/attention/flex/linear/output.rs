//! The output of a block: from the state that it meets, and what its rows give each other.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::ops::Range;

use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::forward::padded;
use super::super::rows::{NewRows, Rows};
use super::super::{pack, tensor};
use super::parts::of_state;
use super::{Powers, STRIP, add_to, input, states_of};
use crate::attention::linear::Problem;
use crate::simd::{Ahead, Left, Level, Run, Store, multiply};

/// The output: `[B, L, Hq, dv]`. Of the rows of each block alone, or with what the states that they meet give them.
pub(in crate::attention) fn output(
    level: Level,
    [q, k, v]: [&Tensor<4>; 3],
    met: Option<&Tensor<5>>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> Tensor<4> {
    let (inputs, met) = ([k, v].map(input), met.map(states_of));
    let within = Some(inputs.each_ref().map(Rows::of));
    let base = None;
    let met = met.as_ref().map(Rows::of);
    outputs(
        level,
        q,
        Terms { base, met, within },
        v.dims()[3],
        blocks,
        problem,
    )
}

/// An output to which the states that the blocks meet are added.
pub(in crate::attention) fn output_after(
    level: Level,
    q: &Tensor<4>,
    within: &Tensor<4>,
    met: &Tensor<5>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> Tensor<4> {
    let (base, met) = (input(within), states_of(met));
    let terms = Terms {
        base: Some(Rows::of(&base)),
        met: Some(Rows::of(&met)),
        within: None,
    };
    outputs(level, q, terms, within.dims()[3], blocks, problem)
}

fn outputs(
    level: Level,
    q: &Tensor<4>,
    terms: Terms<'_>,
    width: usize,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> Tensor<4> {
    let [samples, length, heads, _] = q.dims();
    let device = q.device();
    let q = input(q);
    let powers = Powers::all(problem, blocks);
    let forward = Forward {
        q: Rows::of(&q),
        terms,
        powers: &powers,
        problem,
        out: NewRows::new([samples, length, heads], width),
        width,
    };
    let parts = samples * heads * blocks.len();
    let place = |part: usize| {
        // Heads before blocks: the rows of a position's heads lie side by side.
        let (of_sample, head) = (part / heads, part % heads);
        (of_sample / blocks.len(), of_sample % blocks.len(), head)
    };
    let block = |scratch: &mut Scratch, part: usize| {
        if part + 1 < parts {
            let (sample, index, head) = place(part + 1);
            let rows = &blocks[index];
            let runs = forward.runs(sample, (index, rows), head);
            scratch.ahead.want(runs, rows.len());
        }
        let (sample, index, head) = place(part);
        level.run(Block {
            forward: &forward,
            sample,
            head,
            index,
            rows: blocks[index].clone(),
            scratch,
        });
    };
    (0..parts)
        .into_par_iter()
        .for_each_init(Scratch::default, block);
    tensor(forward.out.all(), [samples, length, heads, width], &device)
}

/// What a thread needs for a block; kept from one to the next.
#[derive(Default)]
pub(super) struct Scratch {
    q: Vec<f32>,
    k_transposed: Vec<f32>,
    /// Of the values, once the rows of the block have given each other what they do.
    pub(super) v_panels: Vec<f32>,
    state: Vec<f32>,
    weights: Vec<f32>,
    /// The output, in rows of whole vectors.
    pub(super) out: Vec<f32>,
    /// What is read and written after this block.
    pub(super) ahead: Ahead,
}

impl Scratch {
    /// Begins a block of `count` rows.
    #[inline(always)]
    pub(super) fn enter<'a, S: Simd>(
        &mut self,
        q: impl Iterator<Item = &'a [f32]>,
        [count, d, dv]: [usize; 3],
    ) {
        pack::by_rows::<S>(&mut self.q, q, d, 1.0);
        self.out.clear();
        let row = dv.next_multiple_of(S::F32_LANES);
        self.out.resize(count * row, 0.0);
    }

    /// Writes what the state before the block gives, whose rows are `state`.
    #[inline(always)]
    pub(super) fn reach<'a, S: Simd>(
        &mut self,
        simd: S,
        state: impl Iterator<Item = &'a [f32]>,
        powers: &Powers,
        [count, d, dv]: [usize; 3],
    ) {
        let [q_row, out_row] = [d, dv].map(|width| width.next_multiple_of(S::F32_LANES));
        pack::panels::<S>(&mut self.state, state, d, dv);
        multiply(
            simd,
            [count, dv, d],
            Left::rows(&self.q, q_row),
            (&self.state, d),
            (&mut self.out, out_row),
            Store::Set,
            &mut self.ahead,
        );
        for (row, out) in self.out.chunks_exact_mut(out_row).enumerate() {
            let reached = powers.reached(row);
            out.iter_mut().for_each(|x| *x *= reached);
        }
    }

    /// Adds what the rows of the block give each other.
    #[inline(always)]
    pub(super) fn within<'a, S: Simd>(
        &mut self,
        simd: S,
        (k, v): (
            impl Iterator<Item = &'a [f32]>,
            impl Iterator<Item = &'a [f32]>,
        ),
        powers: &Powers,
        [count, d, dv]: [usize; 3],
    ) {
        let [q_row, out_row] = [d, dv].map(|width| width.next_multiple_of(S::F32_LANES));
        pack::transposed_panels::<S>(&mut self.k_transposed, k, count, d);
        pack::panels::<S>(&mut self.v_panels, v, count, dv);
        let score_row = padded(count);
        self.weights.resize(STRIP * score_row, 0.0);
        for first in (0..count).step_by(STRIP) {
            let end = count.min(first + STRIP);
            multiply(
                simd,
                [end - first, end, d],
                Left::rows(&self.q[first * q_row..], q_row),
                (&self.k_transposed, d),
                (&mut self.weights, score_row),
                Store::Set,
                &mut self.ahead,
            );
            for row in first..end {
                let begin = (row - first) * score_row;
                powers.weigh(row, &mut self.weights[begin..begin + end]);
            }
            multiply(
                simd,
                [end - first, dv, end],
                Left::rows(&self.weights, score_row),
                (&self.v_panels, count),
                (&mut self.out[first * out_row..], out_row),
                Store::Add,
                &mut self.ahead,
            );
        }
    }
}

/// One forward: what is read, and what is written.
struct Forward<'a> {
    q: Rows<'a>,
    terms: Terms<'a>,
    powers: &'a [Powers],
    problem: &'a Problem,
    out: NewRows,
    width: usize,
}

impl Forward<'_> {
    /// What a block of a head reads and writes.
    fn runs(
        &self,
        sample: usize,
        (index, rows): (usize, &Range<usize>),
        head: usize,
    ) -> impl Iterator<Item = Run> {
        let Terms { base, met, within } = &self.terms;
        let (d, count, at) = (self.q.width(), rows.len(), [sample, rows.start, head]);
        let kv = [sample, rows.start, self.problem.kv_head(head)];
        let within = within.iter().flatten().map(move |x| x.run(kv));
        let base = base.iter().map(move |x| x.run(at));
        let met = met.iter().map(move |met| {
            let met = met.run([sample, index * d, head]);
            of_state(met, d, count)
        });
        let own = [self.q.run(at), self.out.run(at)];
        own.into_iter().chain(within).chain(base).chain(met)
    }
}

/// What is added up to the output.
struct Terms<'a> {
    /// What is there already.
    base: Option<Rows<'a>>,
    /// What the states give that the blocks meet.
    met: Option<Rows<'a>>,
    /// What the rows of a block give each other, by their keys and values.
    within: Option<[Rows<'a>; 2]>,
}

/// A block of one query head.
struct Block<'a> {
    forward: &'a Forward<'a>,
    sample: usize,
    head: usize,
    index: usize,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            forward,
            sample,
            head,
            index,
            rows,
            scratch,
        } = self;
        let Forward {
            q,
            terms,
            problem,
            out: to,
            width: dv,
            ..
        } = forward;
        let powers = &forward.powers[head];
        let (count, d, dv) = (rows.len(), q.width(), *dv);
        let out_row = dv.next_multiple_of(S::F32_LANES);
        scratch.enter::<S>(q.positions(sample, &rows, head), [count, d, dv]);
        if let Some(met) = &terms.met {
            let of_block = index * d..(index + 1) * d;
            let state = met.positions(sample, &of_block, head);
            scratch.reach(simd, state, powers, [count, d, dv]);
        }
        if let Some([k, v]) = &terms.within {
            let kv_head = problem.kv_head(head);
            let of_k = k.positions(sample, &rows, kv_head);
            let of_v = v.positions(sample, &rows, kv_head);
            scratch.within(simd, (of_k, of_v), powers, [count, d, dv]);
        }
        if let Some(base) = &terms.base {
            add_to(
                &mut scratch.out,
                base.positions(sample, &rows, head),
                out_row,
            );
        }
        let out = scratch.out.chunks_exact(out_row);
        // SAFETY: this block alone has these rows of this head, and it comes once.
        unsafe { to.write([sample, rows.start, head], out) };
    }
}
