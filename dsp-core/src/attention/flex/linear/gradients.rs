//! The gradients of a block: from its rows and the state that it meets, and from the gradient of the state after it.

#![expect(
    unsafe_code,
    reason = "threads write rows of one tensor that they share out among themselves"
)]

use std::ops::Range;

use burn::tensor::Tensor;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::super::forward::padded;
use super::super::rows::{Rows, RowsOut};
use super::super::{Head, heads_of, pack, tensor};
use super::{Powers, STRIP, input, states_of, write};
use crate::attention::linear::Problem;
use crate::simd::{Left, Level, Store, multiply, panel_width};

/// The gradients of the query, the key and the value, from the rows of each block and the state before it, and with
/// what the gradients of the states after the blocks contribute, if they are known.
pub(in crate::attention) fn gradients(
    level: Level,
    [q, k, v]: [&Tensor<4>; 3],
    dout: &Tensor<4>,
    (met, after): (&Tensor<5>, Option<&Tensor<5>>),
    blocks: &[Range<usize>],
    problem: &Problem,
) -> [Tensor<4>; 3] {
    let (shape, device) = (q.dims(), q.device());
    let inputs = [q, dout].map(input);
    let (met, after) = (states_of(met), after.map(states_of));
    let mut dq = vec![0.0; shape.iter().product()];
    let [q, dout] = inputs.each_ref().map(Rows::of);
    let terms = GradientTerms {
        base: None,
        before: Some(Before {
            q,
            dout,
            met: Rows::of(&met),
            dq: RowsOut::new(&mut dq, [shape[0], shape[1], shape[2]], shape[3]),
        }),
        after: after.as_ref().map(Rows::of),
    };
    let [dk, dv] = key_gradients(level, [k, v], terms, blocks, problem);
    [tensor(dq, shape, &device), dk, dv]
}

/// The gradients of the key and the value to which those of the states after the blocks are added.
pub(in crate::attention) fn gradients_after(
    level: Level,
    kv: [&Tensor<4>; 2],
    within: [&Tensor<4>; 2],
    after: &Tensor<5>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> [Tensor<4>; 2] {
    let (base, after) = (within.map(input), states_of(after));
    let terms = GradientTerms {
        base: Some(base.each_ref().map(Rows::of)),
        before: None,
        after: Some(Rows::of(&after)),
    };
    key_gradients(level, kv, terms, blocks, problem)
}

fn key_gradients(
    level: Level,
    kv: [&Tensor<4>; 2],
    terms: GradientTerms<'_>,
    blocks: &[Range<usize>],
    problem: &Problem,
) -> [Tensor<4>; 2] {
    let device = kv[0].device();
    let shapes = kv.map(Tensor::dims);
    let inputs = kv.map(input);
    let [mut dk, mut dv] = shapes.map(|shape| vec![0.0; shape.iter().product()]);
    let of = |data, shape: [usize; 4]| RowsOut::new(data, [shape[0], shape[1], shape[2]], shape[3]);
    let powers = Powers::all(problem, blocks);
    let [k, v] = inputs.each_ref().map(Rows::of);
    let backward = Backward {
        k,
        v,
        terms,
        powers: &powers,
        dk: of(&mut dk, shapes[0]),
        dv: of(&mut dv, shapes[1]),
    };
    let heads = heads_of(shapes[0][0], &problem.heads);
    let kv_heads = shapes[0][2];
    let block = |scratch: &mut _, index: usize| {
        let (of_sample, head) = (index / kv_heads, index % kv_heads);
        let (sample, block) = (of_sample / blocks.len(), of_sample % blocks.len());
        level.run(BlockBack {
            backward: &backward,
            head: &heads[sample * kv_heads + head],
            index: block,
            rows: blocks[block].clone(),
            scratch,
        });
    };
    (0..heads.len() * blocks.len())
        .into_par_iter()
        .for_each_init(Scratch::default, block);
    [
        tensor(dk, shapes[0], &device),
        tensor(dv, shapes[1], &device),
    ]
}

/// What a thread needs for a block; kept from one to the next.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    q_panels: Vec<f32>,
    k: Vec<f32>,
    k_panels: Vec<f32>,
    k_transposed: Vec<f32>,
    v: Vec<f32>,
    v_transposed: Vec<f32>,
    dout: Vec<f32>,
    dout_panels: Vec<f32>,
    state: Vec<f32>,
    weights: Vec<f32>,
    dweights: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// One backward: what is read, and what is written.
struct Backward<'a> {
    k: Rows<'a>,
    v: Rows<'a>,
    terms: GradientTerms<'a>,
    powers: &'a [Powers],
    dk: RowsOut<'a>,
    dv: RowsOut<'a>,
}

/// What is added up to the gradients.
struct GradientTerms<'a> {
    /// What is there already of the key's and the value's.
    base: Option<[Rows<'a>; 2]>,
    before: Option<Before<'a>>,
    /// What the gradients of the states give that come after the blocks.
    after: Option<Rows<'a>>,
}

/// What the rows of a block and the state before it give.
struct Before<'a> {
    q: Rows<'a>,
    dout: Rows<'a>,
    met: Rows<'a>,
    dq: RowsOut<'a>,
}

/// A block of one key-value head, with all its query heads.
struct BlockBack<'a> {
    backward: &'a Backward<'a>,
    head: &'a Head,
    index: usize,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
}

impl WithSimd for BlockBack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            backward,
            head,
            index,
            rows,
            scratch,
        } = self;
        let (sample, count) = (head.sample, rows.len());
        let Backward { k, v, terms, .. } = backward;
        let widths @ [d, dv] = [k.width(), v.width()];
        let [k_row, v_row] = widths.map(|width| width.next_multiple_of(S::F32_LANES));
        for (sum, row) in [(&mut scratch.dk, k_row), (&mut scratch.dv, v_row)] {
            sum.clear();
            sum.resize(count * row, 0.0);
        }
        let (of_k, of_v) = (
            k.positions(sample, &rows, head.kv),
            v.positions(sample, &rows, head.kv),
        );
        if terms.before.is_some() {
            pack::panels::<S>(&mut scratch.k_panels, of_k.clone(), count, d);
            pack::transposed_panels::<S>(&mut scratch.k_transposed, of_k.clone(), count, d);
            pack::transposed_panels::<S>(&mut scratch.v_transposed, of_v.clone(), count, dv);
        }
        let states = index * d..(index + 1) * d;
        for query in head.query.clone() {
            let powers = &backward.powers[query];
            if let Some(before) = &terms.before {
                scratch.before(simd, before, powers, (sample, &rows, query), &states);
            }
            if let Some(after) = &terms.after {
                let aged = || (0..count).map(|row| powers.aged(row, count));
                pack::weighted_rows::<S>(&mut scratch.k, of_k.clone().zip(aged()), d);
                pack::weighted_rows::<S>(&mut scratch.v, of_v.clone().zip(aged()), dv);
                let state = after.positions(sample, &states, query);
                scratch.after(simd, state, [count, d, dv]);
            }
        }
        for (offset, position) in rows.enumerate() {
            let at = [sample, position, head.kv];
            // SAFETY: this block alone has these rows of this head, and each is written once.
            let (dk, dv) = unsafe { (backward.dk.row(at), backward.dv.row(at)) };
            let [of_k, of_v] = match &terms.base {
                Some(base) => base.each_ref().map(|base| Some(base.row(at))),
                None => [None, None],
            };
            write(dk, &scratch.dk[offset * k_row..], of_k);
            write(dv, &scratch.dv[offset * v_row..], of_v);
        }
    }
}

impl Scratch {
    /// Adds to `dk` and `dv` what the rows of the block give, and writes `dq`.
    #[inline(always)]
    fn before<S: Simd>(
        &mut self,
        simd: S,
        before: &Before<'_>,
        powers: &Powers,
        (sample, rows, head): (usize, &Range<usize>, usize),
        states: &Range<usize>,
    ) {
        let Before { q, dout, met, dq } = before;
        let (lanes, panel) = (S::F32_LANES, panel_width::<S>());
        let (count, d, dv) = (rows.len(), q.width(), dout.width());
        let [q_row, v_row] = [d, dv].map(|width| width.next_multiple_of(lanes));
        let (of_q, of_dout) = (
            q.positions(sample, rows, head),
            dout.positions(sample, rows, head),
        );
        pack::by_rows::<S>(&mut self.q, of_q.clone(), d, 1.0);
        pack::panels::<S>(&mut self.q_panels, of_q, count, d);
        pack::by_rows::<S>(&mut self.dout, of_dout.clone(), dv, 1.0);
        pack::panels::<S>(&mut self.dout_panels, of_dout, count, dv);
        let state = met.positions(sample, states, head);
        pack::transposed_panels::<S>(&mut self.state, state, d, dv);
        let out = &mut self.dq;
        out.resize(count * q_row, 0.0);
        multiply(
            simd,
            [count, d, dv],
            Left::rows(&self.dout, v_row),
            (&self.state, dv),
            (out, q_row),
            Store::Set,
        );
        for (row, out) in out.chunks_exact_mut(q_row).take(count).enumerate() {
            let reached = powers.reached(row);
            out.iter_mut().for_each(|x| *x *= reached);
        }
        let score_row = padded(count);
        for weights in [&mut self.weights, &mut self.dweights] {
            weights.resize(STRIP * score_row, 0.0);
        }
        for first in (0..count).step_by(STRIP) {
            let end = count.min(first + STRIP);
            let strip = end - first;
            multiply(
                simd,
                [strip, end, d],
                Left::rows(&self.q[first * q_row..], q_row),
                (&self.k_transposed, d),
                (&mut self.weights, score_row),
                Store::Set,
            );
            multiply(
                simd,
                [strip, end, dv],
                Left::rows(&self.dout[first * v_row..], v_row),
                (&self.v_transposed, dv),
                (&mut self.dweights, score_row),
                Store::Set,
            );
            for row in first..end {
                let begin = (row - first) * score_row;
                let of_row = begin..begin + end;
                powers.weigh(row, &mut self.weights[of_row.clone()]);
                powers.weigh(row, &mut self.dweights[of_row]);
            }
            let [weights, dweights] = [&self.weights, &self.dweights];
            let from = first * panel;
            multiply(
                simd,
                [strip, d, end],
                Left::rows(dweights, score_row),
                (&self.k_panels, count),
                (&mut out[first * q_row..], q_row),
                Store::Add,
            );
            multiply(
                simd,
                [end, d, strip],
                Left::columns(dweights, score_row),
                (&self.q_panels[from..], count),
                (&mut self.dk, q_row),
                Store::Add,
            );
            multiply(
                simd,
                [end, dv, strip],
                Left::columns(weights, score_row),
                (&self.dout_panels[from..], count),
                (&mut self.dv, v_row),
                Store::Add,
            );
        }
        for (position, out) in rows.clone().zip(out.chunks_exact(q_row)) {
            // SAFETY: this block alone has these rows of this head, and each is written once.
            let to = unsafe { dq.row([sample, position, head]) };
            write(to, out, None);
        }
    }

    /// Adds to `dk` and `dv` what the gradient of the state after the block gives, by the aged keys and values.
    #[inline(always)]
    fn after<'a, S: Simd>(
        &mut self,
        simd: S,
        state: impl Iterator<Item = &'a [f32]> + Clone,
        [count, d, dv]: [usize; 3],
    ) {
        let lanes = S::F32_LANES;
        let [k_row, v_row] = [d, dv].map(|width| width.next_multiple_of(lanes));
        pack::panels::<S>(&mut self.state, state.clone(), d, dv);
        multiply(
            simd,
            [count, dv, d],
            Left::rows(&self.k, k_row),
            (&self.state, d),
            (&mut self.dv, v_row),
            Store::Add,
        );
        pack::transposed_panels::<S>(&mut self.state, state, d, dv);
        multiply(
            simd,
            [count, d, dv],
            Left::rows(&self.v, v_row),
            (&self.state, dv),
            (&mut self.dk, k_row),
            Store::Add,
        );
    }
}
